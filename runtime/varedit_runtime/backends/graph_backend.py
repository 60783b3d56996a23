"""A backend that runs a bundle's graphs: each stage is one or more steps of the wiring."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial

import numpy as np

from varedit_runtime.backends.base import Backend, Sampling, ScaleOutput
from varedit_runtime.backends.wiring import (
    CONDITION,
    DECODER,
    ENCODER,
    PREFILL,
    REFERENCES,
    SYMBOLIC,
    TEXT,
    Step,
    wire,
)
from varedit_runtime.errors import BackendError
from varedit_runtime.manifest import UNGUIDED, Model, Variant, scale_name


class GraphBackend(Backend):
    """All graphs of a variant; an implementation runs one of them, on memory of its own.

    `wiring` says which memory each tensor is: an implementation keeps a value for each name, and
    `_run` reads and writes those that a step names.
    """

    def __init__(
        self,
        variant: Variant,
        model: Model,
        provider: str,
        symbolic: bool,
        twin: str = SYMBOLIC,
        unguided: bool = True,
    ) -> None:
        """symbolic: whether scales run on the one graph of symbolic lengths, the twin.

        unguided: whether there are graphs for edits or scales without guidance too. Raises
        BundleError when the graphs are not those of an edit.
        """
        self.variant, self.model, self.provider = variant, model, provider
        self._wire = partial(wire, variant, model, symbolic, twin, unguided)
        # Of the edit whose text was taken last: tokens, and pictures.
        self._tokens, self._batch = variant.text_tokens, variant.batch
        self._steps_of: dict[tuple[int, int], dict[str, Step]] = {}
        self.steps = self._steps(self._tokens, self._batch)
        self._unguided = False

    @abstractmethod
    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a step on the values that it is fed; return copies of those that are read.

        Values are those of the largest batch and the longest text. A step of a smaller edit reads
        and writes their beginnings alone.
        """

    @abstractmethod
    def _drop(self, scale: int) -> None:
        """Move the conditional rows of caches together, before the first unguided scale."""

    @property
    def drops_rows(self) -> bool:
        return CONDITION + UNGUIDED in self.steps

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        batch, tokens = token_ids.shape
        step = self._steps(tokens, batch)[TEXT]
        (features,) = self._fed(step, {"token_ids": token_ids, "prompt_mask": text_mask})
        return features

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        return self._code(ENCODER, "pictures", pictures)

    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        rows, self._tokens = inputs["text_mask"].shape
        self._unguided = self.variant.guided and "learned" not in inputs
        self._batch = rows if self._unguided else rows * self.variant.batch // self.variant.rows
        self._fed(self._step(CONDITION), self._of_all_rows(inputs))

    def prefill(self, source_tokens: np.ndarray) -> None:
        self._fed(self._step(PREFILL), {"source_tokens": source_tokens})
        if REFERENCES in self.steps:
            self._fed(self._step(REFERENCES), {})

    def predict(self, scale: int, sampling: Sampling) -> ScaleOutput:
        if not (sampling.guided or self._unguided) and self.drops_rows:
            self._drop(scale)
            self._unguided = True
        return ScaleOutput(*self._fed(self._step(scale_name(scale)), self._chosen(scale, sampling)))

    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        return self._code(DECODER, f"sum.{len(self.variant.grids)}", running_sum)

    def _of_all_rows(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Enlarge inputs of the condition to the shapes of their values, and add `learned`."""
        given = self._filled(CONDITION, inputs)
        learned = {"learned": np.zeros(self.variant.rows, np.bool_)}
        return {**learned, **given} if self.variant.guided else given

    def _filled(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Enlarge what a step is fed to the shapes of the values that it is written to."""
        shapes = {view.value: view.shape for view in self.steps[name].inputs.values()}
        return {value: _beginning(x, shapes[value]) for value, x in given.items()}

    def _fed(self, step: Step, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run a step of an edit of any size; return what is read of it, in order."""
        name = step.name.removesuffix(UNGUIDED)  # its values in the form that is the larger one
        taken = self._run(step, self._filled(name, given))
        shapes = {view.value: view.shape for view in step.outputs.values()}
        return [_beginning(taken[value], shapes[value]) for value in step.read]

    def _steps(self, tokens: int, batch: int) -> dict[str, Step]:
        """Return the steps of an edit by name.

        tokens: what its texts are padded to. batch: its pictures.
        """
        key = tokens, batch
        if key not in self._steps_of:
            steps = self._wire(text_tokens=tokens, batch=batch)
            self._steps_of[key] = {step.name: step for step in steps}
        return self._steps_of[key]

    @property
    def edit_steps(self) -> dict[str, Step]:
        """The steps of the edit whose text was taken last."""
        return self._steps(self._tokens, self._batch)

    def _step(self, name: str) -> Step:
        """Return a step of the edit, in the form for its rows."""
        return self.edit_steps[name + UNGUIDED if self._unguided else name]

    def _code(self, name: str, value: str, array: np.ndarray) -> np.ndarray:
        """Run a coder, which has one input and one output.

        Raises BackendError for an array that is no batch of what the graph takes.
        """
        step = self._steps(self.variant.text_tokens, len(array))[name]
        (taken,) = {view.shape[1:] for view in step.inputs.values()}
        if array.shape[1:] != taken:
            told = f"{value} is a batch of {array.shape[1:]}; it must be one of {taken}"
            raise BackendError(f"cannot run graph {name}: {told}")
        (coded,) = self._fed(step, {value: array})
        return coded

    def _chosen(self, scale: int, sampling: Sampling) -> dict[str, np.ndarray]:
        """Turn a sampling into the values that its scale is fed."""
        nothing, batch = np.zeros(sampling.noise.shape, np.bool_), len(sampling.noise)
        bits, mask = sampling.forced_bits, sampling.forced_mask
        given = {
            "guidance_scale": np.full(batch, sampling.guidance_scale, np.float32),
            "temperature": np.full(batch, sampling.temperature, np.float32),
            "noise": sampling.noise.astype(np.float32, copy=False),
            "forced_bits": nothing if bits is None else bits,
            "forced_mask": nothing if mask is None else mask,
        }
        fed = self.steps[scale_name(scale)].fed
        return {
            value: array for name, array in given.items() if (value := f"{name}.{scale}") in fed
        }


def _beginning(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array that begins with the same numbers: fewer of them, or repeated to fill it."""
    return array if array.shape == shape else np.resize(array, shape)

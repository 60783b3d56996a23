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
        self._tokens = variant.text_tokens  # of the text that was taken last
        self._steps_of: dict[int, dict[str, Step]] = {}
        self.steps = self._steps(variant.text_tokens)
        self._unguided = False

    @abstractmethod
    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a step on the values that it is fed; return copies of those that are read."""

    @abstractmethod
    def _drop(self, scale: int) -> None:
        """Move the conditional rows of caches together, before the first unguided scale."""

    @property
    def drops_rows(self) -> bool:
        return CONDITION + UNGUIDED in self.steps

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        batch, tokens = token_ids.shape
        step = self._steps(tokens)[TEXT]
        given = self._filled(TEXT, {"token_ids": token_ids, "prompt_mask": text_mask})
        (taken,) = self._run(step, given).values()
        # Features are the value's beginning: unconditional rows, or nothing, are behind them.
        return np.resize(taken, (batch, tokens, taken.shape[2]))

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        return self._code(ENCODER, {"pictures": pictures})

    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        rows, self._tokens = inputs["text_mask"].shape
        self._unguided = rows < self.variant.rows
        self._run(self._step(CONDITION), self._of_all_rows(inputs))

    def prefill(self, source_tokens: np.ndarray) -> None:
        self._run(self._step(PREFILL), {"source_tokens": source_tokens})
        if REFERENCES in self.steps:
            self._run(self._step(REFERENCES), {})

    def predict(self, scale: int, sampling: Sampling) -> ScaleOutput:
        if not (sampling.guided or self._unguided) and self.drops_rows:
            self._drop(scale)
            self._unguided = True
        taken = self._run(self._step(scale_name(scale)), self._chosen(scale, sampling))
        return ScaleOutput(
            taken[f"logits.{scale}"], taken[f"bits.{scale}"], taken[f"sum.{scale + 1}"]
        )

    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        return self._code(DECODER, {f"sum.{len(self.variant.grids)}": running_sum})

    def _of_all_rows(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pad inputs of the condition to the shapes of their values, and add `learned`."""
        given = self._filled(CONDITION, inputs)
        learned = {"learned": np.zeros(self.variant.rows, np.bool_)}
        return {**learned, **given} if self.variant.guided else given

    def _filled(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Enlarge what a step is fed to the shapes of the values that it is written to.

        Steps of an edit without guidance, or with a short text, read their beginning alone.
        """
        shapes = {view.value: view.shape for view in self.steps[name].inputs.values()}
        return {value: np.resize(x, shapes[value]) for value, x in given.items()}

    def _steps(self, tokens: int) -> dict[str, Step]:
        """Return the steps of an edit whose texts are padded to a number of tokens, by name."""
        if tokens not in self._steps_of:
            steps = self._wire(text_tokens=tokens)
            self._steps_of[tokens] = {step.name: step for step in steps}
        return self._steps_of[tokens]

    def _step(self, name: str) -> Step:
        """Return a step in the form for the rows and the text that the edit has."""
        return self._steps(self._tokens)[name + UNGUIDED if self._unguided else name]

    def _code(self, name: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run a coder, which has one output."""
        (taken,) = self._run(self.steps[name], given).values()
        return taken

    def _of_each(self, setting: float | np.ndarray) -> np.ndarray:
        """Return a setting of each picture."""
        return np.full(self.variant.batch, setting, np.float32)

    def _chosen(self, scale: int, sampling: Sampling) -> dict[str, np.ndarray]:
        """Turn a sampling into the values that its scale is fed."""
        nothing = np.zeros(sampling.noise.shape, np.bool_)
        bits, mask = sampling.forced_bits, sampling.forced_mask
        given = {
            "guidance_scale": self._of_each(sampling.guidance_scale),
            "temperature": self._of_each(sampling.temperature),
            "noise": sampling.noise.astype(np.float32, copy=False),
            "forced_bits": nothing if bits is None else bits,
            "forced_mask": nothing if mask is None else mask,
        }
        fed = self.steps[scale_name(scale)].fed
        return {
            value: array for name, array in given.items() if (value := f"{name}.{scale}") in fed
        }

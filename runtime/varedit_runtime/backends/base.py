"""What runs the graphs of a variant: what every backend offers, stage by stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from varedit_runtime.backends.wiring import (
    CONDITION,
    DECODER,
    ENCODER,
    PREFILL,
    REFERENCES,
    TEXT,
    Step,
    wire,
)
from varedit_runtime.manifest import Model, Variant, scale_name


@dataclass(frozen=True)
class Sampling:
    """How a scale's bits are chosen.

    noise float32 [B, h, w, c] in [0, 1). forced_bits, forced_mask bool of the same shape: bits
    that are taken as they are where the mask is set.
    """

    noise: np.ndarray
    guidance_scale: float
    temperature: float
    forced_bits: np.ndarray | None = None
    forced_mask: np.ndarray | None = None


@dataclass(frozen=True)
class ScaleOutput:
    """logits float32 [B, h, w, c, 2], guided; bits bool [B, h, w, c]; running_sum [B, d, H, W]."""

    logits: np.ndarray
    bits: np.ndarray
    running_sum: np.ndarray


@dataclass(frozen=True)
class Negatives:
    """Negative prompts: ids and mask as in Prompts; present bool [B]: which rows have one."""

    ids: np.ndarray
    mask: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class Prompts:
    """Token ids int64 and mask bool [B, T] of a batch's instructions, padded.

    negatives: None where the bundle has no guidance.
    """

    ids: np.ndarray
    mask: np.ndarray
    negatives: Negatives | None = None


@dataclass(frozen=True)
class WholeEdit:
    """logits: of every scale; pictures float32 [B, 3, H, W], not yet clamped."""

    logits: Sequence[np.ndarray]
    pictures: np.ndarray


EditWhole = Callable[[Prompts, np.ndarray, Sequence[Sampling]], WholeEdit]


class Backend(ABC):
    """All graphs of a variant, loaded. One edit at a time, its stages in this order.

    provider: on what they run. Each stage raises BackendError when its graph cannot be run.
    """

    def __init__(self, variant: Variant, model: Model, provider: str, symbolic: bool) -> None:
        """symbolic: whether scales run on the one graph of symbolic lengths.

        Raises BundleError when the graphs are not those of an edit.
        """
        self.variant, self.model, self.provider = variant, model, provider
        self.steps: dict[str, Step] = {step.name: step for step in wire(variant, model, symbolic)}

    @abstractmethod
    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a step on its values that are fed. -> copies of those that are read"""

    @property
    @abstractmethod
    def buffer_bytes(self) -> int:
        """Memory of the caches and of what passes between graphs, allocated once."""

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of a GPU's memory that are taken; None where this is not known."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free what is held outside of Python. Nothing may be run afterwards."""

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        """Ids int64 and mask bool [B, T] -> features float32 [B, T, text]."""
        return self._code(TEXT, {"token_ids": token_ids, "text_mask": text_mask})

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures float32 [B, 3, H, W] in [-1, 1] -> source tokens [B, h, w, c]."""
        return self._code(ENCODER, {"pictures": pictures})

    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Take the text of the edit to come: the inputs of the condition graph, by name."""
        self._run(self.steps[CONDITION], inputs)

    def prefill(self, source_tokens: np.ndarray) -> None:
        """Take the source of the edit to come, tokens [B, h, w, c]; `condition` comes first."""
        self._run(self.steps[PREFILL], {"source_tokens": source_tokens})
        if REFERENCES in self.steps:
            self._run(self.steps[REFERENCES], {})

    def predict(self, scale: int, sampling: Sampling) -> ScaleOutput:
        """Predict a scale; the prefill and, in order, the scales before it must have run."""
        taken = self._run(self.steps[scale_name(scale)], self._chosen(scale, sampling))
        return ScaleOutput(
            taken[f"logits.{scale}"], taken[f"bits.{scale}"], taken[f"sum.{scale + 1}"]
        )

    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        """A sum of codes [B, d, H, W] -> pictures float32 [B, 3, H, W], not yet clamped."""
        return self._code(DECODER, {f"sum.{len(self.variant.grids)}": running_sum})

    @property
    def whole(self) -> EditWhole | None:
        """All stages without the host in between; None where it can only be by stages."""
        return None

    def _code(self, name: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """The one output of a coder."""
        (taken,) = self._run(self.steps[name], given).values()
        return taken

    def _chosen(self, scale: int, sampling: Sampling) -> dict[str, np.ndarray]:
        """A sampling as the values of its scale."""
        nothing = np.zeros(sampling.noise.shape, np.bool_)
        bits, mask = sampling.forced_bits, sampling.forced_mask
        given = {
            "guidance_scale": np.array([sampling.guidance_scale], np.float32),
            "temperature": np.array([sampling.temperature], np.float32),
            "noise": sampling.noise.astype(np.float32, copy=False),
            "forced_bits": nothing if bits is None else bits,
            "forced_mask": nothing if mask is None else mask,
        }
        fed = self.steps[scale_name(scale)].fed
        return {
            value: array for name, array in given.items() if (value := f"{name}.{scale}") in fed
        }

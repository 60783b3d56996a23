"""What every backend offers, stage by stage, and how an edit is driven through one.

A backend runs the stages of an edit: compiled engines, ONNX Runtime, or the PyTorch reference.
Arrays go in and out, so all of them are driven by the same code and can be compared with each
other. Between stages a backend keeps what the next ones read (the text's keys and values, those of
the source and of earlier scales, the running sum), in memory of its own; the host gives and takes
the rest:

    encode_text      ids -> features                            once, and once for negative prompts
    encode_pictures  pictures -> source tokens                  once
    condition        features ->                                once
    prefill          source tokens ->                           once
    predict          noise, parameters, forced bits -> logits, bits, running sum     once per scale
    decode           running sum -> pictures                    once

A backend that runs a bundle's graphs extends `graph_backend.GraphBackend`, and gets all of these
for one method that runs a graph. Any other implements `Backend`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from varedit_runtime.backends.wiring import CONDITION, DECODER, ENCODER, PREFILL, TEXT
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError
from varedit_runtime.manifest import Variant, scale_name


@dataclass(frozen=True)
class Sampling:
    """How a scale's bits are chosen.

    noise: float32 [B, h, w, c] in [0, 1). guidance_scale, temperature: a number, or float32 [B]
    with one for each picture. forced_bits, forced_mask: bool of the shape of noise; where the mask
    is set, the forced bit is taken instead of a drawn one (teacher forcing). guided: False where
    this scale and all later ones have a guidance of 1 for every picture, so that nobody needs
    unconditional rows any more.
    """

    noise: np.ndarray
    guidance_scale: float | np.ndarray
    temperature: float | np.ndarray
    forced_bits: np.ndarray | None = None
    forced_mask: np.ndarray | None = None
    guided: bool = True


@dataclass(frozen=True)
class ScaleOutput:
    """What a backend predicts for one scale.

    logits: guided, float32 [B, h, w, c, 2]. bits: bool [B, h, w, c]. running_sum: the sum of codes
    up to and with this scale, float32 [B, d, H, W].
    """

    logits: np.ndarray
    bits: np.ndarray
    running_sum: np.ndarray


@dataclass(frozen=True)
class Negatives:
    """Negative prompts of a batch.

    ids, mask: as in Prompts. present: bool [B], which rows have a negative prompt; the others take
    the unconditional text that the model learned.
    """

    ids: np.ndarray
    mask: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class Prompts:
    """A batch's instructions: token ids int64 [B, T], padded, and mask bool [B, T] of real tokens.

    T is one of the backend's `text_lengths`. negatives: None where the edit has no unconditional
    rows, and so no guidance.
    """

    ids: np.ndarray
    mask: np.ndarray
    negatives: Negatives | None = None


@dataclass(frozen=True)
class WholeEdit:
    """Logits of every scale, and pictures float32 [B, 3, H, W], not yet clamped."""

    logits: Sequence[np.ndarray]
    pictures: np.ndarray


# Prompts, pictures as `Backend.encode_pictures` takes them, samplings of all scales, and whether
# the caches hold the prefill of these prompts and pictures.
EditWhole = Callable[[Prompts, np.ndarray, Sequence[Sampling], bool], WholeEdit]


class WeightsLostError(BackendError):
    """Weights were exchanged in part, and can be neither completed nor put back."""


class Backend(Protocol):
    """Runs the stages of one edit at a time, in the order of its methods.

    variant: the shapes that it was loaded for. provider: the device or library that computes.
    Every stage raises BackendError when it cannot be run.
    """

    variant: Variant
    provider: str

    @abstractmethod
    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        """Encode token ids int64 and mask bool [B, T] as features float32 [B, T, text].

        T is one of `text_lengths`.
        """

    @abstractmethod
    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Encode pictures float32 [B, 3, H, W] in [-1, 1] as source tokens [B, h, w, c]."""

    @abstractmethod
    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Take the text of the edit to come: the inputs of the condition graph, by name.

        They have R rows: two for each picture, and `learned`; or one for each picture where the
        variant has no guidance or, if the backend `drops_rows`, the edit has none.
        """

    @abstractmethod
    def prefill(self, source_tokens: np.ndarray) -> None:
        """Take the source of the edit to come, tokens [B, h, w, c]; `condition` comes first."""

    @abstractmethod
    def predict(self, scale: int, sampling: Sampling) -> ScaleOutput:
        """Predict a scale; the prefill and, in order, the scales before it must have run.

        The scale predicted last may be predicted again, with other bits: the next one goes on from
        the latest. After a scale that was not guided, none can be.
        """

    @abstractmethod
    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        """Decode a sum of codes [B, d, H, W] to pictures float32 [B, 3, H, W], not yet clamped."""

    @property
    def drops_rows(self) -> bool:
        """Whether unconditional rows can be left out of an edit, or of its last scales."""
        return False

    @property
    def text_lengths(self) -> Sequence[int]:
        """The numbers of tokens that texts may be padded to, ascending, the most at last."""
        return [self.variant.text_tokens]

    @property
    def batches(self) -> Sequence[int]:
        """The numbers of pictures B that an edit may have, ascending, the most at last."""
        return [self.variant.batch]

    @property
    def whole(self) -> EditWhole | None:
        """Run all stages without the host in between; None where that is not possible."""
        return None

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the caches and of what passes between stages, where allocated once."""
        return 0

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of a GPU's memory that are taken; None where this is not known."""
        return None

    def prepare_weights(self, bundle: Bundle) -> Callable[[], None]:
        """Load the weights of another bundle of the same graphs; return what puts them in place.

        Nothing is run meanwhile. The returned function is called with signals held back. If it
        raises, the present weights stay in place, except if it raises WeightsLostError: then
        nothing may be run afterwards.

        Raises BackendError where this backend cannot, or the memory is too small for both;
        BundleError if a file is damaged.
        """
        raise BackendError(
            f"a backend that runs on {self.provider} cannot take other weights while it is open: "
            "open another editor"
        )

    def close(self) -> None:
        """Free what is held outside of Python. Nothing may be run afterwards."""


@dataclass(frozen=True)
class StageOutput:
    """What the host takes from a stage: arrays by name, none from `condition` and `prefill`."""

    stage: str
    arrays: Mapping[str, np.ndarray]


class Encoders(Protocol):
    """What encodes texts and pictures: a backend, or what was kept of its results."""

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray: ...

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray: ...


def edit_by_stages(
    backend: Backend,
    prompts: Prompts,
    pictures: np.ndarray,
    samplings: Iterable[Sampling],
    encoders: Encoders | None = None,
    prefilled: bool = False,
) -> Iterator[StageOutput]:
    """Drive an edit through a backend; each stage runs when its output is asked for.

    So a caller can time every stage, check its output, show the picture so far, or stop. pictures:
    as `Backend.encode_pictures` takes them; samplings: one per scale, each asked for in its turn.
    encoders: by default the backend. prefilled: whether the backend's caches hold the prefill.
    """
    encoders, text = encoders or backend, dict[str, np.ndarray]()
    if not prefilled:
        text = _encode_prompts(encoders, prompts)
        yield StageOutput(TEXT, {"text_features": text["text_features"]})
    source = encoders.encode_pictures(pictures)
    yield StageOutput(ENCODER, {"source_tokens": source})
    if not prefilled:
        backend.condition(text)
        yield StageOutput(CONDITION, {})
        backend.prefill(source)
        yield StageOutput(PREFILL, {})
    total = np.empty(0)
    for scale, sampling in enumerate(samplings):
        output = backend.predict(scale, sampling)
        total = output.running_sum
        yield StageOutput(scale_name(scale), vars(output))
    yield StageOutput(DECODER, {"pictures": backend.decode(total)})


def _encode_prompts(backend: Encoders, prompts: Prompts) -> dict[str, np.ndarray]:
    """Encode a batch's texts as the inputs of `Backend.condition`."""
    features = negative = backend.encode_text(prompts.ids, prompts.mask)
    if (negatives := prompts.negatives) is not None:
        if negatives.present.any():  # else nothing reads them, and any features will do
            negative = backend.encode_text(negatives.ids, negatives.mask)
        features = np.concatenate((features, negative))
    return {"text_features": features, **condition_masks(prompts)}


def condition_masks(prompts: Prompts) -> dict[str, np.ndarray]:
    """Return the inputs of `Backend.condition` besides features: rows of instructions come first.

    text_mask: of real tokens. learned: rows that take the text that the model learned.
    """
    if (negatives := prompts.negatives) is None:
        return {"text_mask": prompts.mask}
    learned = np.concatenate((np.zeros_like(negatives.present), ~negatives.present))
    return {"text_mask": np.concatenate((prompts.mask, negatives.mask)), "learned": learned}

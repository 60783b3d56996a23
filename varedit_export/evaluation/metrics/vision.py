"""What metrics with a model of pictures share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from varedit_export.evaluation.case import Edited, Values
from varedit_runtime.bundle import file_digest
from varedit_runtime.errors import CheckpointError, needs_extra, reason

if TYPE_CHECKING:
    import torch

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one of them, the former if it is there
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of levels


class EachAlone(ABC):
    """A metric that computes the scores of one edit after the other."""

    at_once = 1

    def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
        """Return the scores of each edit."""
        import torch

        with torch.inference_mode():
            return [self.scores(one) for one in edited]

    @abstractmethod
    def scores(self, one: Edited) -> Values:
        """Return an edit's scores."""


def repository(*beside: str) -> Sequence[Sequence[str]]:
    """Return the choices of files of a model's repository: its weights and what is beside them."""
    return [(weights, "config.json", *beside) for weights in WEIGHTS]


def digest(folder: Path | None, name: str, files: Sequence[str] = WEIGHTS) -> str:
    """Return a digest of the files that a folder has of some. Raises CheckpointError if of none.

    name: the metric's, for the message.
    """
    found = [path for file in files if folder and (path := folder / file).is_file()]
    if not found:
        raise CheckpointError(f"{name}: {folder} has no {' or '.join(files)}")
    try:
        return hashlib.sha256("".join(map(file_digest, found)).encode()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{name}: {folder} cannot be read: {error.strerror}") from error


@contextmanager
def loading(name: str, folder: Path | None) -> Iterator[None]:
    """Turn any failure of a library to load a model into a CheckpointError."""
    with needs_extra("export"):
        import transformers

        transformers.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{name}: {folder} cannot be loaded: {reason(error)}") from error


def prepared(
    picture: Image.Image, shortest: int, crop: int, levels: Sequence[Sequence[float]]
) -> "torch.Tensor":
    """Return a picture as models of pictures take it: fp32 [1, 3, crop, crop].

    Its shorter side is resized to `shortest`, bicubic; the centre is cropped; levels in [0, 1] are
    normalised by a mean and a standard deviation for each colour.
    """
    import torch

    width, height = (shortest * side // min(picture.size) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - crop) // 2, (height - crop) // 2
    pixels = np.asarray(resized.crop((left, top, left + crop, top + crop)), np.float32) / 255
    mean, deviation = (np.asarray(values, np.float32) for values in levels)
    return torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1)[None]


def cosine(a: "torch.Tensor", b: "torch.Tensor") -> float:
    """Return the cosine of the angle between two vectors; 0 if one has no length."""
    import torch

    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-12))

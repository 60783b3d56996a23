"""Similarities of DINO's features.

- dino_source, dino_target: cosines between features of the result and of the source, or the right
  result, as MagicBrush's repository has them (OSU-NLP-Group/MagicBrush, evaluation/image_eval.py):
  the class token of ViT-S/16.
- structure: PIE-Bench's structure distance (cure-lab/PnPInversion,
  evaluation/matrics_calculator.py): the mean squared difference between source and result of the
  cosines between the keys of all pairs of patches, in the last layer of ViT-B/8. As there, levels
  go up to 255 although they are normalised as if to 1, and pictures are resized to 224 px without
  antialiasing, as torchvision 0.13.1 did.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from varedit_export.evaluation.case import Edited, Family, Score, Values
from varedit_export.evaluation.metrics.vision import (
    IMAGENET,
    EachAlone,
    cosine,
    digest,
    loading,
    prepared,
    repository,
)

if TYPE_CHECKING:
    import torch

_SIDE, _LONGEST = 224, 480  # of a picture that structure is taken of
_KEYS = (".k_proj", ".attention.key")  # how versions of transformers call what computes keys


class _Vit(EachAlone):
    """A vision transformer that transformers saved."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self.identity = folder, digest(folder, "dino")

    @cached_property
    def _model(self) -> Any:
        with loading("dino", self._folder):
            from transformers import ViTModel

            return ViTModel.from_pretrained(
                self._folder, add_pooling_layer=False, local_files_only=True
            ).eval()


class Dino(_Vit):
    """The similarity of whole pictures."""

    def scores(self, one: Edited) -> Values:
        result = self._feature(one.result)
        target = None if one.target is None else cosine(result, self._feature(one.target))
        return {"dino_source": cosine(result, self._feature(one.source)), "dino_target": target}

    def _feature(self, picture: Image.Image) -> "torch.Tensor":
        pixels = prepared(picture, 256, 224, IMAGENET)
        return self._model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]


class Structure(_Vit):
    """The distance of structures."""

    def scores(self, one: Edited) -> Values:
        difference = self._similarities(one.source) - self._similarities(one.result)
        return {"structure": float(difference.square().mean())}

    def _similarities(self, picture: Image.Image) -> "torch.Tensor":
        """Return the cosines between the keys of all pairs of tokens: [tokens, tokens]."""
        kept: list[Any] = []
        names = [name for name, _ in self._model.named_modules() if name.endswith(_KEYS)]
        hook = self._model.get_submodule(names[-1]).register_forward_hook(
            lambda module, given, keys: kept.append(keys[0])
        )
        try:
            self._model(_levels(picture), interpolate_pos_encoding=True)
        finally:
            hook.remove()
        [keys] = kept
        lengths = keys.norm(dim=-1, keepdim=True)
        return keys @ keys.T / (lengths @ lengths.T).clamp(min=1e-8)


def _levels(picture: Image.Image) -> "torch.Tensor":
    """Return a picture as PIE-Bench's repository gives it to the model: fp32 [1, 3, H, W]."""
    import torch

    pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None]
    scale = min(_SIDE / min(picture.size), _LONGEST / max(picture.size))
    size = [round(side * scale) for side in picture.size[::-1]]
    resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear")
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return (resized - mean) / deviation


DINO = Family(
    (Score("dino_source", "DINO source"), Score("dino_target", "DINO target")),
    Dino,
    "hf://facebook/dino-vits16",
    repository(),
)
STRUCTURE = Family(
    (Score("structure", "structure distance", better=-1, digits=4),),
    Structure,
    "hf://facebook/dino-vitb8",
    repository(),
)

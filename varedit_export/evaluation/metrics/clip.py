"""Similarities of CLIP, which are cosines between embeddings of pictures and of captions.

- clip_out: the result and the caption of the right result. EMU-Edit's CLIP-Out, and PIE-Bench's
  score of the whole picture.
- clip_dir: the change from source to result, and that from one caption to the other. EMU-Edit's
  CLIP-Dir.
- clip_edit: the result, black outside of the mask, and the caption. PIE-Bench's of the edited
  region.
- clip_source, clip_target: the result and the source, or the right result. CLIP-I of EMU-Edit, and
  of MagicBrush.

PIE-Bench's repository (cure-lab/PnPInversion) takes torchmetrics' CLIPScore, which is 100 times the
cosine; the paper of VAREdit gives the cosine. Which CLIP is taken depends on the benchmark.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from varedit_export.evaluation.case import Edited, Family, Score, Values
from varedit_export.evaluation.metrics.vision import (
    EachAlone,
    cosine,
    digest,
    loading,
    prepared,
    repository,
)

if TYPE_CHECKING:
    import torch

_LEVELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_LOCAL: Any = {"local_files_only": True}
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


class Clip(EachAlone):
    """The metric. folder: of a CLIP that transformers saved."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self.identity = folder, digest(folder, "clip")

    @cached_property
    def _models(self) -> tuple[Any, Any, Any]:
        """The models of pictures and of texts, and the tokenizer."""
        with loading("clip", self._folder):
            from transformers import (
                AutoTokenizer,
                CLIPTextModelWithProjection,
                CLIPVisionModelWithProjection,
            )

            vision = CLIPVisionModelWithProjection.from_pretrained(self._folder, **_LOCAL).eval()
            text = CLIPTextModelWithProjection.from_pretrained(self._folder, **_LOCAL).eval()
            # A folder's own code never runs, nor is anyone asked whether it may.
            tokenizer = AutoTokenizer.from_pretrained(
                self._folder, trust_remote_code=False, **_LOCAL
            )
            return vision, text, tokenizer

    def scores(self, one: Edited) -> Values:
        before, caption = one.case.before, one.case.caption
        source, result = self.picture(one.source), self.picture(one.result)
        found: dict[str, float | None] = {"clip_source": cosine(source, result)}
        if one.target is not None:
            found["clip_target"] = cosine(self.picture(one.target), result)
        if caption is not None:
            text = self.text(caption)
            found["clip_out"] = cosine(result, text)
            if before is not None and before != caption:
                found["clip_dir"] = cosine(result - source, text - self.text(before))
            if one.mask is not None and one.mask.any():
                region = np.asarray(one.result) * one.mask[..., None]
                found["clip_edit"] = cosine(self.picture(Image.fromarray(region)), text)
        return found

    def picture(self, picture: Image.Image) -> "torch.Tensor":
        """Return a picture's embedding, of length 1: [1, D]."""
        model = self._models[0]
        side = model.config.image_size
        return _embedding(model(prepared(picture, side, side, _LEVELS)).image_embeds)

    def text(self, text: str) -> "torch.Tensor":
        """Return a text's embedding, of length 1: [1, D]. Text beyond CLIP's length is cut."""
        _, model, tokenizer = self._models
        longest = model.config.max_position_embeddings
        tokens = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt")
        return _embedding(model(**tokens).text_embeds)


def _embedding(vectors: "torch.Tensor") -> "torch.Tensor":
    return vectors / vectors.norm(dim=-1, keepdim=True)


CLIP = Family(
    (
        Score("clip_out", "CLIP-Out"),
        Score("clip_dir", "CLIP-Dir"),
        Score("clip_edit", "CLIP-Edit"),
        Score("clip_source", "CLIP-I source"),
        Score("clip_target", "CLIP-I target"),
    ),
    Clip,
    "hf://openai/clip-vit-base-patch32",
    repository(*_TOKENIZER),
)

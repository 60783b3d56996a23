"""Distances of pixels.

To the source, outside of the mask, as PIE-Bench's repository computes them
(cure-lab/PnPInversion, evaluation/matrics_calculator.py): both pictures are black inside of the
mask, and means are over all pixels, those inside too. PSNR there is infinite for equal pictures;
here it is at most 100 dB, so that it has a mean. SSIM is torchmetrics', as there.

To the right result, as MagicBrush's repository computes them (OSU-NLP-Group/MagicBrush,
evaluation/image_eval.py): L1 and L2, the mean absolute and squared differences in [0, 1], of
results that are resized to the right result's size. EMU-Edit's L1 is to the source.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from varedit_export.evaluation.case import Edited, Family, Score, Values
from varedit_runtime.errors import needs_extra

BEST_PSNR = 100.0


class Pixels:
    """The metric."""

    identity, at_once = "1", 1

    def __init__(self, _: Path | None) -> None:
        with needs_extra("evaluate"):
            import torchmetrics  # noqa: F401  # pyright: ignore[reportUnusedImport]

    def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
        return [_outside(one) | _to_source(one) | _to_target(one) for one in edited]


def _outside(one: Edited) -> dict[str, float | None]:
    """Return distances to the source outside of the mask; None where nothing is outside."""
    if one.mask is None or one.mask.all():
        return dict.fromkeys(("psnr", "ssim", "mse"))
    kept = ~one.mask[..., None]
    source, result = _levels(one.source) * kept, _levels(one.result) * kept
    mse = float(np.square(source - result).mean())
    return {"psnr": psnr(mse), "ssim": _ssim(source, result), "mse": mse}


def _to_source(one: Edited) -> dict[str, float | None]:
    return {"l1_source": float(np.abs(_levels(one.source) - _levels(one.result)).mean())}


def _to_target(one: Edited) -> dict[str, float | None]:
    if one.target is None:
        return dict.fromkeys(("l1", "l2"))
    difference = _levels(one.result.resize(one.target.size)) - _levels(one.target)
    return {"l1": float(np.abs(difference).mean()), "l2": float(np.square(difference).mean())}


def psnr(mse: float) -> float:
    """Return the PSNR in dB of a mean squared error of levels in [0, 1]."""
    return min(BEST_PSNR, 10 * float(np.log10(1 / mse))) if mse > 0 else BEST_PSNR


def _levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float64) / 255


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(p.astype(np.float32)).permute(2, 0, 1)[None] for p in (a, b))
    similarity = structural_similarity_index_measure(x, y, data_range=1.0)
    assert isinstance(similarity, torch.Tensor)
    return similarity.item()


PIXELS = Family(
    (
        Score("psnr", "PSNR outside, dB", digits=2),
        Score("ssim", "SSIM outside"),
        Score("mse", "MSE outside", better=-1, digits=5),
        Score("l1_source", "L1 to source", better=-1),
        Score("l1", "L1 to target", better=-1),
        Score("l2", "L2 to target", better=-1),
    ),
    Pixels,
)

"""LPIPS of what is outside of the mask, with SqueezeNet, as PIE-Bench's repository computes it.

That repository (cure-lab/PnPInversion, evaluation/matrics_calculator.py) takes torchmetrics' LPIPS
with net_type="squeeze" of both pictures, black inside of the mask. It is written here again,
because torchmetrics' needs torchvision, and downloads weights by itself. The folder of weights has
torchvision's squeezenet1_1-b8a52dc0.pth; LPIPS' own are in torchmetrics. Both are read as data
(weights_only).
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varedit_export.evaluation.case import Edited, Family, Score, Values
from varedit_export.evaluation.metrics.vision import EachAlone, digest, loading

if TYPE_CHECKING:
    import torch

FEATURES = "squeezenet1_1-b8a52dc0.pth"
_FIRES = (3, 4, 6, 7, 9, 10, 11, 12)  # places of Fire modules in SqueezeNet 1.1's features
_POOLS = (2, 5, 8)
_TAPS = (1, 4, 7, 9, 10, 11, 12)  # the places after which LPIPS compares
# LPIPS' own normalisation, of levels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(EachAlone):
    """The metric."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self.identity = folder, digest(folder, "lpips", (FEATURES,))

    @cached_property
    def _weights(self) -> "dict[str, torch.Tensor]":
        with loading("lpips", self._folder):
            import torch
            from torchmetrics.functional.image import lpips

            assert self._folder is not None
            heads = Path(lpips.__file__).parent / "lpips_models/squeeze.pth"
            files = [
                torch.load(path, map_location="cpu", weights_only=True)
                for path in (self._folder / FEATURES, heads)
            ]
            return {name: weight for file in files for name, weight in file.items()}

    def scores(self, one: Edited) -> Values:
        return {"lpips": self._distance(one)}

    def _distance(self, one: Edited) -> float | None:
        """Return the distance of what is outside of the mask; None if nothing is."""
        if one.mask is None or one.mask.all():
            return None
        kept = ~one.mask[..., None]
        pairs = zip(
            *(self._features(np.asarray(p) * kept) for p in (one.source, one.result)), strict=True
        )
        distances = [
            ((a - b).square() * self._weights[f"lin{n}.model.1.weight"]).sum(1).mean()
            for n, (a, b) in enumerate(pairs)
        ]
        return float(sum(distances))

    def _features(self, pixels: np.ndarray) -> "Iterator[torch.Tensor]":
        """Yield the features at every tap, of length 1 at each position: [1, C, H, W]."""
        import torch
        from torch.nn.functional import max_pool2d, relu

        x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255 * 2 - 1
        shift, scale = (torch.tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x = relu(self._convolved((x - shift) / scale, "features.0", stride=2))
        for place in range(1, 13):
            if place in _POOLS:
                x = max_pool2d(x, 3, 2, ceil_mode=True)
            elif place in _FIRES:
                x = self._fire(x, f"features.{place}")
            if place in _TAPS:
                yield x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()

    def _fire(self, x: "torch.Tensor", name: str) -> "torch.Tensor":
        import torch

        squeezed = torch.relu(self._convolved(x, f"{name}.squeeze"))
        narrow = self._convolved(squeezed, f"{name}.expand1x1")
        wide = self._convolved(squeezed, f"{name}.expand3x3", padding=1)
        return torch.relu(torch.cat([narrow, wide], 1))

    def _convolved(
        self, x: "torch.Tensor", name: str, stride: int = 1, padding: int = 0
    ) -> "torch.Tensor":
        from torch.nn.functional import conv2d

        weight, bias = (self._weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return conv2d(x, weight, bias, stride, padding)


LPIPS = Family((Score("lpips", "LPIPS outside", better=-1),), Lpips, files=((FEATURES,),))

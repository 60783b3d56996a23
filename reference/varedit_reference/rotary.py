"""Two-dimensional rotary position embedding (RoPE, arXiv 2104.09864), released and paper layout.

Channels (2p, 2p+1) of a query or key are a point of the plane, turned by an angle that grows with
the position. The dot product of two turned points depends on the difference of their angles alone,
so attention sees relative positions. Of the D/2 pairs the first half turns by the row, the other
half by the column, at D/4 frequencies:

    angle[i] = row · f[i],   angle[D/4 + i] = column · f[i],   f[i] = 10000^(-2i / (D/2))

Positions are measured on the finest grid, so that tokens of all scales at the same place of the
picture get (nearly) the same angles: of an 8 x 8 picture, a 2 x 2 scale has rows and columns 0 and
4. The source is shifted, so that it is told from the target scale on the same grid.

Where positions come from differs, and weights work with the layout they were trained with alone:

- paper (Eq. 9-10): (row·floor(h/h_k), column·floor(w/w_k)); the source has 64 added to both.
- released: one table is made for the 1024 px schedule, source first (64 x 64 positions, shifted by
  64), then its 13 scales. A model of any resolution reads that table from the start, as many
  entries as it has tokens. At 512 px all of them lie in the 64 x 64 source part: scale 1, behind
  32·32 source tokens, gets entry 1024, position (16 + 64, 64) instead of (0, 0). This looks like
  an accident, but must be kept: the released weights learned these positions.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varedit_reference.config import Grid, TransformerConfig

SOURCE_OFFSET = 64  # of the paper's layout, at every resolution
BASE = 10000.0


@dataclass(frozen=True)
class Rotation:
    """The rotation of a run of S tokens: cosines and sines of their angles, fp32 [S, D/2]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_RHSD: Tensor) -> Tensor:
        """Rotate queries or keys [R, H, S, D] by pairs of neighbours (2p, 2p+1), not by halves."""
        even, odd = x_RHSD.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = (even * self.cos - odd * self.sin, even * self.sin + odd * self.cos)
        return torch.stack(rotated, dim=-1).flatten(-2)  # pairs interleaved again


def source_rotation(config: TransformerConfig, device: torch.device) -> Rotation:
    """Return the rotation of the source's tokens."""
    return _rotation(config, (None,), device)


def scale_rotation(config: TransformerConfig, scale: int, device: torch.device) -> Rotation:
    """Return the rotation of a target scale's tokens; scale counts from 0."""
    return _rotation(config, (scale,), device)


def full_rotation(config: TransformerConfig, device: torch.device) -> Rotation:
    """Return the rotation of the teacher-forced sequence [source | scale 1 .. scale K]."""
    return _rotation(config, (None, *range(len(config.grids))), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached inference tensor could not take part in training
def _rotation(
    config: TransformerConfig, parts: tuple[int | None, ...], device: torch.device
) -> Rotation:
    points = [source_positions(config) if k is None else scale_positions(config, k) for k in parts]
    angles = _angles(torch.cat(points), config.head_width)  # in fp64, rounded once
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def source_positions(config: TransformerConfig) -> Tensor:
    """Return (row, column) of every source token, integers [S, 2]."""
    if config.conditioning == "full":  # source scale k lies where target scale k does, shifted
        offset = SOURCE_OFFSET if config.rotary == "paper" else torch.tensor(config.table_grids[-1])
        scales = [scale_positions(config, k) + offset for k in range(len(config.grids))]
        return torch.cat(scales)
    if config.rotary == "paper":
        return _cells(config.finest) + SOURCE_OFFSET
    return _released_table(config.table_grids)[: config.lengths[-1]]


def scale_positions(config: TransformerConfig, scale: int) -> Tensor:
    """Return (row, column) of every token of a target scale, integers [L, 2]; 0 is the coarsest.

    The paper's layout is Eq. 9-10; the released one reads on in the table behind the source and
    the scales before, which the module's docstring explains.
    """
    grid = config.grids[scale]
    if config.rotary == "paper":
        steps = [finest // own for finest, own in zip(config.finest, grid, strict=True)]
        return _cells(grid) * torch.tensor(steps)  # a cell is placed at its top left corner
    start = config.lengths[-1] + sum(config.lengths[:scale])
    return _released_table(config.table_grids)[start : start + config.lengths[scale]]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _released_table(grids: tuple[Grid, ...]) -> Tensor:
    """Return the positions of the 1-megapixel sequence: the shifted source, then all scales.

    A scale's (row, column) is (round(row·h_K/h_k), round(column·w_K/w_k)), halves to even.
    """
    finest = torch.tensor(grids[-1])
    scales = [(_cells(grid) * finest / torch.tensor(grid)).round().long() for grid in grids]
    return torch.cat([_cells(grids[-1]) + finest, *scales])


def _cells(grid: Grid) -> Tensor:
    """Return (row, column) of a grid's cells, row-major, [rows·columns, 2]."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack((rows.flatten(), columns.flatten()), dim=1)


def _angles(points: Tensor, head_width: int) -> Tensor:
    """Return angles [S, D/2] of positions [S, 2]: D/4 by the row, then D/4 by the column."""
    exponents = torch.arange(head_width // 4, dtype=torch.float64) * 2 / (head_width / 2)
    frequencies = BASE**-exponents
    return (points.double()[:, :, None] * frequencies).flatten(1)

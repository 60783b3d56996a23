"""Two-dimensional rotary position embedding, in the released and in the paper's layout."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varedit_reference.config import Grid, TransformerConfig

SOURCE_OFFSET = 64
BASE = 10000.0


@dataclass(frozen=True)
class Rotation:
    """Turns the frequency pairs of a run of tokens: cos and sin [S, D/2], fp32."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_RHSD: Tensor) -> Tensor:
        """Rotate the interleaved pairs (2p, 2p+1) of [R, H, S, D]."""
        even, odd = x_RHSD.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = (even * self.cos - odd * self.sin, even * self.sin + odd * self.cos)
        return torch.stack(rotated, dim=-1).flatten(-2)


def source_rotation(config: TransformerConfig, device: torch.device) -> Rotation:
    """The rotation of the source's tokens."""
    return _rotation(config, (None,), device)


def scale_rotation(config: TransformerConfig, scale: int, device: torch.device) -> Rotation:
    """The rotation of a target scale's tokens."""
    return _rotation(config, (scale,), device)


def full_rotation(config: TransformerConfig, device: torch.device) -> Rotation:
    """The rotation of [source | scale 1 .. scale K]."""
    return _rotation(config, (None, *range(len(config.grids))), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached inference tensor could not take part in training
def _rotation(
    config: TransformerConfig, parts: tuple[int | None, ...], device: torch.device
) -> Rotation:
    points = [source_positions(config) if k is None else scale_positions(config, k) for k in parts]
    angles = _angles(torch.cat(points), config.head_width)
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def source_positions(config: TransformerConfig) -> Tensor:
    """(row, column) of every source token, [S, 2]."""
    if config.conditioning == "full":
        offset = torch.tensor(_source_offset(config))
        scales = [scale_positions(config, k) + offset for k in range(len(config.grids))]
        return torch.cat(scales)
    if config.rotary == "paper":
        return _cells(config.finest) + SOURCE_OFFSET
    return _released_table(config.table_grids)[: config.lengths[-1]]


def scale_positions(config: TransformerConfig, scale: int) -> Tensor:
    """(row, column) of every token of a target scale, [L, 2].

    Paper (Eq. 9-10): (row·floor(h/h_k), column·floor(w/w_k)). Released: the table made for the
    1-megapixel schedule, read by offset whatever the model's resolution: an accident, it seems,
    but the one the weights were trained with.
    """
    grid = config.grids[scale]
    if config.rotary == "paper":
        steps = [finest // own for finest, own in zip(config.finest, grid, strict=True)]
        return _cells(grid) * torch.tensor(steps)
    start = config.lengths[-1] + sum(config.lengths[:scale])
    return _released_table(config.table_grids)[start : start + config.lengths[scale]]


def _source_offset(config: TransformerConfig) -> Grid:
    return (SOURCE_OFFSET, SOURCE_OFFSET) if config.rotary == "paper" else config.table_grids[-1]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _released_table(grids: tuple[Grid, ...]) -> Tensor:
    """Positions of the 1-megapixel sequence: source at an offset, then all scales spread out."""
    finest = torch.tensor(grids[-1])
    scales = [(_cells(grid) * finest / torch.tensor(grid)).round().long() for grid in grids]
    return torch.cat([_cells(grids[-1]) + finest, *scales])


def _cells(grid: Grid) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack((rows.flatten(), columns.flatten()), dim=1)


def _angles(points: Tensor, head_width: int) -> Tensor:
    """[S, D/2]: D/4 pairs turn with the row, then D/4 with the column; 10000^(-2i/(D/2))."""
    exponents = torch.arange(head_width // 4, dtype=torch.float64) * 2 / (head_width / 2)
    frequencies = BASE**-exponents
    return (points.double()[:, :, None] * frequencies).flatten(1)

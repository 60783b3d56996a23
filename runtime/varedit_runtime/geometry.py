"""The geometry of scales: token counts, positions and resizing matrices.

An edit reads the tokens of the source (the finest grid), then predicts the scales, coarse to fine.
In this order, [source | scale 0 | scale 1 | ..], lie the rows of the position table and of every
cache of keys and values. Under full conditioning the source has the tokens of all scales, coarse
to fine, in one row (`source_grid`). With grids of 1x1, 2x2 and 4x4 tokens:

    tokens        source 0 .. 15   scale 0: 16   scale 1: 17 .. 20   scale 2: 21 .. 36
    `past`                     0             16              17                  21

So one number, `past`, is the count of keys before a scale, the row of its first position, and the
row at which its new keys are written. Block 0 of models with SAR differs: its cache has no source,
and `past_0` tokens are before a scale; it sees the source averaged to the scale's grid instead,
`reference` tokens.

The exporter makes its graphs from these numbers, the backends their memory, and the checks what
they compare: all take them from here. The prefill is the scale None: it reads the source as tokens
with nothing before them. Grids are (height, width) in tokens, coarse to fine. What the last scale
would hand on, and what the prefill would predict, is given for a grid of 1x1, which nothing reads.
"""

from collections.abc import Sequence

import numpy as np

from varedit_runtime.grids import Conditioning, Grid

Sizes = dict[str, int]
# The symbolic lengths of graphs: of a scale's tokens and of those whose bits are predicted, of the
# next grid, and of keys and values.
LENGTHS = ("h", "w", "kept_h", "kept_w", "next_h", "next_w", "reference", "past_0", "past")


def source_grid(grids: Sequence[Grid], conditioning: Conditioning) -> Grid:
    """Return the (height, width) in which the source's tokens are laid out."""
    return (1, sum(map(_area, grids))) if conditioning == "full" else grids[-1]


def scale_sizes(grids: Sequence[Grid], scale: int | None, conditioning: Conditioning) -> Sizes:
    """Return what each of `LENGTHS` is at a scale or, for None, at the prefill."""
    kept, following = _grids(grids, scale)
    source = source_grid(grids, conditioning)
    own = source if scale is None else kept
    sizes: Sizes = dict(zip(LENGTHS, (*own, *kept, *following, 0, 0, 0), strict=True))
    if scale is not None:
        before = sum(map(_area, grids[:scale]))
        sizes |= {"reference": _area(own), "past_0": before, "past": _area(source) + before}
    return sizes


def scale_inputs(
    grids: Sequence[Grid], scale: int | None, patch: int, conditioning: Conditioning
) -> dict[str, np.ndarray]:
    """Return the inputs that tell the symbolic graph `scale` which scale it is.

    patch: the tokenizer's positions along a token's side.
    """
    sizes = scale_sizes(grids, scale, conditioning)
    levels = np.array([len(grids) - 1 if scale is None else scale], np.int64)
    if conditioning == "full":  # each token has its own
        own = source_levels(grids) if scale is None else levels
        levels = np.broadcast_to(own, (sizes["h"], sizes["w"])).copy()
    return {
        "level": levels,
        "first_position": np.array([sizes["past"]], np.int64),
        "is_first": np.array([scale == 0]),
        **resizing_matrices(grids, scale, patch),
    }


def source_levels(grids: Sequence[Grid]) -> np.ndarray:
    """Return the scale of every token of the source under full conditioning, int64 [S]."""
    return np.repeat(np.arange(len(grids)), [*map(_area, grids)])


def resizing_matrices(
    grids: Sequence[Grid], scale: int | None, patch: int
) -> dict[str, np.ndarray]:
    """Return the matrices that resize a scale's map to the finest grid, and that to the next one.

    up_rows, up_columns [finest positions, tokens, patch]; down_rows, down_columns [tokens, patch,
    finest positions]; float32.
    """
    matrices: dict[str, np.ndarray] = {}
    for name, own, following, finest in zip(
        ("rows", "columns"), *_grids(grids, scale), grids[-1], strict=True
    ):
        up = bilinear_matrix(finest * patch, own * patch)
        down = bilinear_matrix(following * patch, finest * patch)
        matrices[f"up_{name}"] = up.reshape(-1, own, patch)
        matrices[f"down_{name}"] = down.reshape(following, patch, -1)
    return matrices


def bilinear_matrix(size: int, size_in: int) -> np.ndarray:
    """Return the matrix [size, size_in], float32, of bilinear resizing along one axis.

    Half-pixel centres, no antialias. rows @ map @ columns.T resizes a map with the matrices of its
    two axes.
    """
    scale = np.float32(size_in / size)
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    distances = np.abs(centres.clip(0, size_in - 1)[:, None] - np.arange(size_in, dtype=np.float32))
    return (1 - distances).clip(0)


def area_matrix(size: int, size_in: int) -> np.ndarray:
    """Return the matrix [size, size_in], float32, of adaptive average pooling along one axis."""
    cells, places = np.arange(size)[:, None], np.arange(size_in)
    start = cells * size_in // size
    end = -(-(cells + 1) * size_in // size)
    inside = ((places >= start) & (places < end)).astype(np.float32)
    return inside / (end - start).astype(np.float32)


def _grids(grids: Sequence[Grid], scale: int | None) -> tuple[Grid, Grid]:
    """Return the grids whose tokens a scale predicts, and hands on."""
    if scale is None:
        return (1, 1), (1, 1)
    return grids[scale], (*grids[scale + 1 :], (1, 1))[0]


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]

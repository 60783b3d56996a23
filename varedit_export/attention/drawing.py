"""Draw attention maps as pictures, with matplotlib.

A scale is drawn as wide as its grid's longer side, so that coarse scales, which have few tokens,
can be seen. Colours tell how much more attention a token gets than if all that are seen got alike.
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from varedit_export.attention.maps import AttentionMaps
from varedit_runtime.errors import needs_extra
from varedit_runtime.files import atomic_file
from varedit_runtime.grids import Grid
from varedit_runtime.pictures import canvas_size
from varedit_runtime.text import END_TOKEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS, UNSEEN, LINES = "magma", "#d9d9d9", "#ffffff"
LEAST, MOST = 0.05, 50.0  # attention over an even one, at the ends of the colours
PIXELS = 900  # along the longer side of a map
DPI = 110
PANELS_IN_A_ROW = 5


def draw_self_attention(maps: AttentionMaps, path: Path) -> None:
    """Draw what every layer's target scales attend to, token by token and as shares of scales."""
    count = len(maps.layers)
    figure = _figure(13.5, 5.0 * count)
    axes = figure.subplots(count, 2, squeeze=False, width_ratios=(1.55, 1))
    drawn = [_draw_tokens(axis, maps, n) for n, axis in zip(maps.layers, axes[:, 0], strict=True)]
    for number, axis in zip(maps.layers, axes[:, 1], strict=True):
        _draw_shares(axis, maps, number)
    shrink = min(0.8, 1.6 / count)
    bar = figure.colorbar(
        drawn[0], ax=axes[:, 0], location="left", format="{x:g}", shrink=shrink, aspect=30
    )
    bar.set_label("attention, times that of an even look")
    _save(figure, path)


def draw_words(maps: AttentionMaps, path: Path) -> None:
    """Draw over the first picture which words each region of the finest scale looked at.

    It is the mean over the maps' layers.
    """
    rows, columns = maps.grids[-1]
    finest = np.mean([one.words[-rows * columns :] for one in maps.layers.values()], axis=0)
    panels = len(maps.words) + 1
    width = min(panels, PANELS_IN_A_ROW)
    height = ceil(panels / width)
    figure = _figure(3.1 * width + 0.6, 3.3 * height)
    axes = figure.subplots(height, width, squeeze=False)
    first, *rest = axes.flat
    first.imshow(maps.result)
    first.set_title("result")
    most = float(finest.max())
    drawn = [
        _draw_word(axis, maps, word, share.reshape(rows, columns), most)
        for axis, word, share in zip(rest, maps.words, finest.T, strict=False)
    ]
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(drawn[0], ax=axes, shrink=0.8, format="{x:.0%}")
    bar.set_label(_layers(maps))
    _save(figure, path)


def _draw_word(
    axes: "Axes", maps: AttentionMaps, word: str, share: np.ndarray, most: float
) -> "AxesImage":
    """Draw a word's share of the attention of every token [h, w] over the grey source."""
    grey = maps.source.convert("L").convert("RGB")
    width, height = canvas_size(grey.size, maps.grids[-1])  # what the model sees is padded
    axes.imshow(grey)
    image = axes.imshow(
        share,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        cmap=COLOURS,
        vmin=0,
        vmax=most,
        alpha=0.65,
        interpolation="bilinear",
    )
    axes.set_xlim(-0.5, grey.width - 0.5)
    axes.set_ylim(grey.height - 0.5, -0.5)
    axes.set_title(f"{_shown(word)}  {share.mean():.0%}")
    return image


def _draw_tokens(axes: "Axes", maps: AttentionMaps, number: int) -> "AxesImage":
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    layer = maps.layers[number]
    keys = (*layer.source, *maps.grids)
    rows, columns = _edges(maps.grids), _edges(keys)
    even = layer.weights * np.sum(~np.isnan(layer.weights), axis=1, keepdims=True)
    image = axes.imshow(
        _resampled(even, rows, columns),
        extent=(0, columns[-1], rows[-1], 0),
        cmap=colormaps[COLOURS].with_extremes(bad=UNSEEN),
        norm=LogNorm(LEAST, MOST, clip=True),
        interpolation="nearest",
        aspect="auto",
    )
    inner, outer = _bounds(keys), _bounds(maps.grids)
    for bound in inner[1:-1]:
        axes.axvline(bound, color=LINES, linewidth=0.6, alpha=0.7)
    for bound in outer[1:-1]:
        axes.axhline(bound, color=LINES, linewidth=0.6, alpha=0.7)
    axes.axvline(inner[len(layer.source)], color=LINES, linewidth=3)
    _name_scales(axes.set_xticks, keys, rotation=90)
    _name_scales(axes.set_yticks, maps.grids)
    axes.set_ylabel("scale that looks")
    axes.set_xlabel(f"{_source_name(maps, number)}   |   target scales")
    axes.set_title(f"Layer {number}", loc="left", fontweight="bold")
    return image


def _draw_shares(axes: "Axes", maps: AttentionMaps, number: int) -> None:
    shares, layer = maps.shares(number), maps.layers[number]
    axes.imshow(np.ma.masked_invalid(shares), cmap="Purples", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            colour = "white" if share > 0.55 else "black"
            text = f"{share:.0%}".removesuffix("%")
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    keys = (*layer.source, *maps.grids)
    axes.axvline(len(layer.source) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(keys)), [_name(grid) for grid in keys], rotation=90)
    axes.set_yticks(range(len(maps.grids)), [_name(grid) for grid in maps.grids])
    seen = maps.distances(number)[-1]
    axes.set_title(
        f"percent per scale; the finest looks {seen:.2f} times as far as an even look",
        loc="left",
        fontsize=9,
    )


def _source_name(maps: AttentionMaps, number: int) -> str:
    layer = maps.layers[number]
    if len(layer.source) == 1:
        return "source, finest grid"
    aligned = np.isnan(layer.weights[0, 1])  # scale 1 sees its own reference alone
    return "source, the reference of each scale" if aligned else "source, all scales"


def _shown(word: str) -> str:
    return "(end)" if word == END_TOKEN else word.replace("$", r"\$")  # no mathematics


def _layers(maps: AttentionMaps) -> str:
    numbers = ", ".join(map(str, maps.layers))
    return f"share in layer{'s' if len(maps.layers) > 1 else ''} {numbers}"


def _name_scales(set_ticks: Any, grids: Sequence[Grid], **style: Any) -> None:
    bounds = _bounds(grids)
    set_ticks((bounds[:-1] + bounds[1:]) / 2, [_name(grid) for grid in grids], fontsize=7, **style)


def _name(grid: Grid) -> str:
    return f"{grid[0]}" if grid[0] == grid[1] else f"{grid[0]}×{grid[1]}"


def _bounds(grids: Sequence[Grid]) -> np.ndarray:
    """Return where scales begin and end along an axis."""
    return np.cumsum([0.0, *(max(max(grid), 2) for grid in grids)])


def _edges(grids: Sequence[Grid]) -> np.ndarray:
    """Return where tokens begin and end along an axis."""
    bounds = _bounds(grids)
    inside = [
        np.linspace(start, end, rows * columns, endpoint=False)
        for (rows, columns), start, end in zip(grids, bounds[:-1], bounds[1:], strict=True)
    ]
    return np.concatenate([*inside, bounds[-1:]])


def _resampled(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Average values [tokens, tokens] over pixels; NaN where most of a pixel is not seen."""
    known = ~np.isnan(values)
    across, down = _areas(columns), _areas(rows)
    total = down @ np.where(known, values, 0) @ across.T
    seen = down @ known.astype(np.float32) @ across.T
    return np.where(seen > 0.5, total / np.maximum(seen, 1e-9), np.nan)


def _areas(edges: np.ndarray) -> np.ndarray:
    """Return how much of each pixel each token covers, [pixels, tokens]."""
    pixels = np.linspace(0, edges[-1], PIXELS + 1)
    ends = np.minimum(pixels[1:, None], edges[1:])
    starts = np.maximum(pixels[:-1, None], edges[:-1])
    return ((ends - starts).clip(0) / (pixels[1] - pixels[0])).astype(np.float32)


def _figure(width: float, height: float) -> "Figure":
    with needs_extra("plot"):
        from matplotlib.figure import Figure
    return Figure((width, height), dpi=DPI, layout="constrained")  # no display is needed


def _save(figure: "Figure", path: Path) -> None:
    with atomic_file(path) as whole:
        figure.savefig(whole)

"""Draw a sheet of sample edits: `python -m varedit_nano.scenes OUT.png`."""

from pathlib import Path
from textwrap import fill

import click
from PIL import Image, ImageDraw

from varedit_nano.scenes.samples import KINDS, EditSample, draw_edit

COLUMNS, CAPTION, GAP = 3, 30, 8


def draw_sample_sheet(samples: list[EditSample]) -> Image.Image:
    """Draw source and target side by side below their instruction, three pairs to a row."""
    size = len(samples[0].source)
    width, height = 2 * size + GAP, size + CAPTION + GAP
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, sample in enumerate(samples):
        x, y = GAP + index % COLUMNS * (width + GAP), index // COLUMNS * height
        pen.text((x, y + 2), fill(sample.instruction, size // 3), fill="black")
        sheet.paste(Image.fromarray(sample.source), (x, y + CAPTION))
        sheet.paste(Image.fromarray(sample.target), (x + size + 4, y + CAPTION))
    return sheet


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of the first edit.")
@click.option("--rows", default=6, show_default=True, help="Rows of three edits.")
@click.option("--size", default=128, show_default=True, help="Side of a picture in pixels.")
@click.option("--kind", type=click.Choice(KINDS), help="Only edits of this kind.")
def main(out: Path, seed: int, rows: int, size: int, kind: str | None) -> None:
    """Draw a sheet of sample edits to OUT."""
    seeds = range(seed, seed + COLUMNS * rows)
    draw_sample_sheet([draw_edit(one, size, kind) for one in seeds]).save(out)


if __name__ == "__main__":
    main()

"""The `varedit-run` command."""

from pathlib import Path

import click

from varedit_runtime.command import CommandGroup, debug_option
from varedit_runtime.grids import (
    ASPECT_RATIOS,
    RESOLUTIONS,
    is_trained,
    picture_size,
    scale_grids,
)


@click.group(cls=CommandGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Run exported VAREdit models.

    Editing a picture is NOT in this version yet. What works today: seeing a picture exactly as a
    model will see it, and listing the sizes that models come in.
    """


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The file to write; .png, .bmp and .tiff keep every pixel.",
)
@click.option("--res", default=512, show_default=True, help="256, 512 or 1024.")
@click.option("--aspect", default="1:1", show_default=True, help="height:width, see `grids`.")
def prepare(image: Path, output: Path, res: int, aspect: str) -> None:
    """Write IMAGE as a model will see it: upright, sRGB, padded with white, resized."""
    from varedit_runtime.pictures import open_picture, pad_and_resize, save_picture

    size = picture_size(res, aspect)
    source = open_picture(image)
    save_picture(pad_and_resize(source, size), output)
    height, width = size
    click.echo(f"{output}: {width} x {height}, from {source.width} x {source.height}")


@main.command()
def grids() -> None:
    """List resolutions and aspect ratios, and the token grid of every scale.

    All are height first. No model was trained on the ones called untrained.
    """
    for resolution in RESOLUTIONS:
        for aspect in ASPECT_RATIOS:
            height, width = picture_size(resolution, aspect)
            trained = "trained" if is_trained(aspect) else "untrained"
            scales = " ".join(f"{h}x{w}" for h, w in scale_grids(resolution, aspect))
            pixels = f"{height}x{width}"
            click.echo(f"{resolution:<5} {aspect:<4} {pixels:<10} {trained:<10} {scales}")

"""Show what a model sees: `varedit-run prepare`, `grids`."""

from pathlib import Path

import click

from varedit_runtime.grids import ASPECT_RATIOS, RESOLUTIONS, is_trained, picture_size, scale_grids
from varedit_runtime.terminal.command import PATH, debug_option


@click.command()
@click.argument("image", type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="The file to write; .png, .bmp and .tiff keep every pixel.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--res", default=512, show_default=True, help="256, 512 or 1024 px.")
@click.option("--aspect", default="1:1", show_default=True, help="Height:width; see `grids`.")
@debug_option
def prepare(image: Path, output: Path, overwrite: bool, res: int, aspect: str) -> None:
    """Write IMAGE as a model sees it: upright, sRGB, padded with white, resized.

    \b
    varedit-run prepare photo.jpg -o square.png --res 256
    """
    from varedit_runtime.commands.results import check_free, check_targets, write_new
    from varedit_runtime.pictures import open_picture, pad_and_resize

    check_targets(image, [output])
    if not overwrite:
        check_free([output])
    size = picture_size(res, aspect)
    source = open_picture(image)
    write_new(pad_and_resize(source, size), output, overwrite)
    height, width = size
    click.echo(f"{output}: {width} x {height}, from {source.width} x {source.height}")


@click.command()
def grids() -> None:
    """List resolutions and aspect ratios, and the token grid of every scale.

    Height comes first. No published model was trained on those marked untrained.

    \b
    varedit-run grids | grep 3:2
    """
    for resolution in RESOLUTIONS:
        for aspect in ASPECT_RATIOS:
            height, width = picture_size(resolution, aspect)
            trained = "trained" if is_trained(aspect) else "untrained"
            scales = " ".join(f"{h}x{w}" for h, w in scale_grids(resolution, aspect))
            pixels = f"{height}x{width}"
            click.echo(f"{resolution:<5} {aspect:<4} {pixels:<10} {trained:<10} {scales}")

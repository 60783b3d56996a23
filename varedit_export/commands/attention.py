"""Show what a model attends to: `varedit-export attention`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, needs_extra, shown
from varedit_runtime.files import unwritable
from varedit_runtime.terminal.command import BUNDLE, PATH, TEXT_PATH, variant_option

_DIGITS = 10  # more than any layer's number has


class _Layers(click.ParamType):
    """Numbers with commas between them."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        numbers = value.split(",")
        if not all(number.strip().isdecimal() and len(number) < _DIGITS for number in numbers):
            told = f"{shown(value)} are no layers; write numbers from 0, such as 0,1,16"
            self.fail(told, param, ctx)
        return tuple(map(int, numbers))


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("images", metavar="IMAGE...", type=TEXT_PATH, nargs=-1, required=True)
@click.argument("instruction")
@click.option("-o", "--output", type=PATH, required=True, help="The heat maps, a PNG.")
@click.option(
    "--layers",
    type=_Layers(),
    metavar="0,1,16,31",
    help="Layers to show, from 0; by default the first, the last and two between.",
)
@click.option(
    "--words", type=PATH, help="Draw here, over the first IMAGE, which words its regions look at."
)
@click.option("--arrays", type=PATH, help="Write the maps here as arrays of NumPy, an .npz.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the edits.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@variant_option
def attention(
    bundle: Path,
    images: tuple[str, ...],
    instruction: str,
    output: Path,
    layers: tuple[int, ...] | None,
    words: Path | None,
    arrays: Path | None,
    seed: int,
    overwrite: bool,
    variant: str | None,
) -> None:
    """Draw what BUNDLE's model attends to while it edits IMAGE by INSTRUCTION.

    Every target scale's self-attention over source and target, averaged over heads and, if there
    are several, over pictures. The PyTorch reference computes it in fp32 with the bundle's own
    weights. Needs the extra `plot`.

    \b
    varedit-export attention nano photo.png "add a hat" -o heat.png --words words.png
    varedit-export attention bundles/2b-512 a.png b.png "make it night" -o heat.png --layers 0,1,31
    """
    for suffix, path in ((".png", output), (".png", words), (".npz", arrays)):
        if path is not None:
            _check(path, suffix, overwrite)
    with needs_extra("export"), needs_extra("plot"):
        from varedit_export.attention.drawing import draw_self_attention, draw_words
        from varedit_export.attention.maps import attention_maps

    opened = Bundle.open(bundle)
    maps = attention_maps(opened, images, instruction, layers=layers, seed=seed, variant=variant)
    with _written(output):
        draw_self_attention(maps, output)
    if words is not None:
        with _written(words):
            draw_words(maps, words)
    if arrays is not None:
        with _written(arrays):
            maps.write(arrays)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Name a file once it is written. Raises ConfigError if that fails, such as on a full disk."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    click.echo(path)


def _check(path: Path, suffix: str, overwrite: bool) -> None:
    """Raise ConfigError, before work is spent, if a file cannot be written there."""
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{path}: its name must end in {suffix}")
    if (why := unwritable(path)) is not None:
        raise ConfigError(f"{path} cannot be written: {why}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: choose another name, or replace it with --overwrite")

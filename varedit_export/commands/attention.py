"""Show what a model attends to: `varedit-export attention`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from varedit_export.check_options import check_build
from varedit_export.commands.shared_options import (
    BundleOr,
    checkpoint_option,
    prefer_ema_option,
    text_encoder_option,
    together,
    tokenizer_option,
    yes_option,
)
from varedit_export.console import accept
from varedit_export.options import BuildOptions
from varedit_reference.config import PRESETS
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, needs_extra, shown
from varedit_runtime.files import unwritable, writing
from varedit_runtime.grids import Conditioning
from varedit_runtime.terminal.command import PATH, TEXT_PATH, variant_option

if TYPE_CHECKING:
    from varedit_export.attention.maps import AttentionMaps
    from varedit_export.weights.download import Download

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


_weights_options = together(
    click.option("--res", "resolutions", type=int, multiple=True, help="Of a SIZE: 256, 512, 1024"),
    click.option("--conditioning", type=click.Choice(get_args(Conditioning)), help="As `build`."),
    checkpoint_option,
    prefer_ema_option,
    tokenizer_option,
    text_encoder_option,
    click.option("--random-weights", type=int, help="Seed of random weights."),
)


@click.command()
@click.argument("model", metavar="BUNDLE|SIZE", type=BundleOr("bundle|size", lambda: PRESETS))
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
@_weights_options
@yes_option
def attention(
    model: str | Path,
    images: tuple[str, ...],
    instruction: str,
    output: Path,
    layers: tuple[int, ...] | None,
    words: Path | None,
    arrays: Path | None,
    seed: int,
    overwrite: bool,
    variant: str | None,
    yes: bool,
    **weights: Any,
) -> None:
    """Draw what a model attends to while it edits IMAGE by INSTRUCTION.

    The model is BUNDLE's, or one of a SIZE that `build` knows, with weights as `build` takes them.
    Every target scale's self-attention over source and target, averaged over heads and, if there
    are several, over pictures. The PyTorch reference computes it in fp32. Needs the extra `plot`.

    \b
    varedit-export attention nano photo.png "add a hat" -o heat.png --words words.png
    varedit-export attention bundles/2b-512 a.png b.png "make it night" -o heat.png --layers 0,1,31
    varedit-export attention 2b --res 512 --checkpoint tuned.pth photo.png "add a hat" -o heat.png
    """
    for suffix, path in ((".png", output), (".png", words), (".npz", arrays)):
        if path is not None:
            _check(path, suffix, overwrite)
    with needs_extra("export"), needs_extra("plot"):
        from varedit_export.attention.drawing import draw_self_attention, draw_words

        looked = _looking(model, variant, weights, partial(accept, yes))
    maps = looked(images, instruction, layers=layers, seed=seed)
    with _written(output):
        draw_self_attention(maps, output)
    if words is not None:
        with _written(words):
            draw_words(maps, words)
    if arrays is not None:
        with _written(arrays):
            maps.write(arrays)


def _looking(
    model: str | Path,
    variant: str | None,
    weights: Mapping[str, Any],
    accept: Callable[["Download"], None],
) -> Callable[..., "AttentionMaps"]:
    """Return what computes the maps of a bundle, or of a size with its weights.

    Raises ConfigError on options of the other one.
    """
    from varedit_export.attention.maps import attention_maps, bundle_maps

    given = {n: v for n, v in weights.items() if v not in (None, ()) and v is not False}
    if isinstance(model, Path):
        if given:
            flag = next(iter(given)).replace("resolutions", "res").replace("_", "-")
            raise ConfigError(f"--{flag} is for a SIZE: a bundle has weights of its own")
        return partial(bundle_maps, Bundle.open(model), variant=variant)
    if variant is not None:
        raise ConfigError("--variant is for a bundle: give a SIZE its --res")
    from varedit_export.resolve_options import plan_of

    options = BuildOptions(size=model, precision="fp32", **given)
    check_build(options)
    plan = plan_of(options, accept)
    return partial(attention_maps, plan.request.config, plan.sources)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Name a file once it is written. Raises ConfigError if that fails, such as on a full disk."""
    with writing(path):
        yield
    click.echo(path)


def _check(path: Path, suffix: str, overwrite: bool) -> None:
    """Raise ConfigError, before work is spent, if a file cannot be written there."""
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{path}: its name must end in {suffix}")
    if (why := unwritable(path)) is not None:
        raise ConfigError(f"{path} cannot be written: {why}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: choose another name, or replace it with --overwrite")

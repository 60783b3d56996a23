"""The `varedit-run` command."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.errors import ConfigError, PictureError, shown
from varedit_runtime.files import IN_BUNDLE, lies_in, same_file, unwritable
from varedit_runtime.grids import ASPECT_RATIOS, RESOLUTIONS, is_trained, picture_size, scale_grids
from varedit_runtime.terminal.command import (
    PATH,
    BackendCommand,
    CommandGroup,
    backend_option,
    debug_option,
)

if TYPE_CHECKING:
    from varedit_runtime.editor import Editor, EditResult, OnScale, Progress
    from varedit_runtime.locate import Found
    from varedit_runtime.values import PerScale

_backend = backend_option("What runs the graphs; engines must have been compiled.")
_EDIT = "edit"


class EditGroup(CommandGroup):
    """A group that edits a picture where the first argument names no other command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for option in self.get_params(ctx) for name in option.opts}
        first = next((i for i, arg in enumerate(args) if arg not in own), None)
        if first is not None and args[first] not in self.commands:
            args = [*args[:first], _EDIT, *args[first:]]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "IMAGE INSTRUCTION [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        edit = self.commands[_EDIT]
        rows = {row: None for command in (edit, self) for row in _option_rows(command, ctx)}
        with formatter.section("Options"):
            formatter.write_dl(list(rows))
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        options = self.commands[_EDIT].shell_complete(ctx, incomplete)
        return [
            *super().shell_complete(ctx, incomplete),
            *options,
            CompletionItem(incomplete, type="file"),
        ]


class _Unnamed(click.Context):
    """The context of a command whose name nobody has to type: messages leave it out."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent else super().command_path


class EditCommand(BackendCommand):
    """The command that edits a picture."""

    context_class = _Unnamed


def _option_rows(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in command.get_params(ctx):
        row = parameter.get_help_record(ctx)
        if isinstance(parameter, click.Option) and row is not None:
            yield row


@click.group(cls=EditGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Edit a picture as instructed, with an exported VAREdit model.

    \b
    varedit-run photo.png "add a hat"
    varedit-run photo.jpg "make it night" -o night.jpg --seed 7
    varedit-run photo.png "add a hat" --bundle bundles/2b-512 --compare both.png
    varedit-run photo.png "add a hat" --mask head.png
    varedit-run photo.png "add a hat" --guidance-scale 4 --temperature 1,1,1,.5,.5,.5,.5
    varedit-run bench bundles/2b-512 --repeat 5

    The result goes beside the picture, as photo-edited.png. The bundle is the one named by
    --bundle or the environment variable VAREDIT_BUNDLE, else the last one built, else nano, a small
    model for drawn scenes that comes with this program. X is a number or one per scale, coarse to
    fine, separated by commas; by default the bundle's own. For a picture named like a command,
    write ./bench.
    """


def _numbers(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> float | Sequence[float] | None:
    """Read an option's number, or several with commas between them."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{parameter.opts[0]} is {shown(text)}; give a number, or one per scale with commas "
            "between them"
        ) from error
    return numbers if len(numbers) > 1 else numbers[0]


def _per_scale(name: str, help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, metavar="X", callback=_numbers, help=help)


@main.command(_EDIT, hidden=True, cls=EditCommand)
@click.argument("image", type=PATH)
@click.argument("instruction")
@click.option(
    "-o", "--output", type=PATH, help="Where to write; by default IMAGE's name with -edited."
)
@click.option("--bundle", type=PATH, help="The folder of the model's bundle.")
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
@click.option("--seed", type=int, help="The same seed gives the same picture; random if left out.")
@_per_scale("--guidance-scale", "How much the instruction counts.")
@_per_scale("--temperature", "Sampling temperature (> 0); higher is more varied.")
@click.option("--negative-prompt", metavar="TEXT", help="What the picture should not be like.")
@click.option(
    "--mask",
    type=PATH,
    help="A picture of IMAGE's size: only what is white, or transparent, in it may change.",
)
@click.option("--compare", type=PATH, help="Write source and result side by side here.")
@click.option("--previews", type=PATH, help="Write the picture after every scale to this folder.")
@_backend
@click.option("--json", "as_json", is_flag=True, help="Print what was done, as JSON.")
@debug_option
def edit(
    image: Path,
    instruction: str,
    output: Path | None,
    bundle: Path | None,
    variant: str | None,
    seed: int | None,
    guidance_scale: "PerScale | None",
    temperature: "PerScale | None",
    negative_prompt: str | None,
    mask: Path | None,
    compare: Path | None,
    previews: Path | None,
    backend: ChosenBackend,
    as_json: bool,
) -> None:
    """Edit IMAGE as INSTRUCTION says.

    X is a number, or one per scale with commas between; by default the bundle's own.

    \b
    varedit-run photo.png "add a hat" --seed 7
    """
    from varedit_runtime.editor import Editor
    from varedit_runtime.masks import fitted
    from varedit_runtime.pictures import open_mask, open_picture, save_picture, side_by_side

    output = _output(image, output)
    _check_targets(image, output, compare, previews, mask)
    source, found = open_picture(image), _find_bundle(bundle, output, compare, previews)
    marked = mask and fitted(open_mask(mask), source)
    with (
        nullcontext() if previews is None else _folder(previews),
        Editor.open(found.path, backend=backend, variant=variant) as editor,
        _watching(editor, previews) as on_scale,
    ):
        result = editor.edit(
            source,
            instruction,
            negative_prompt=negative_prompt,
            mask=marked,
            guidance_scale=guidance_scale,
            temperature=temperature,
            seed=seed,
            on_scale=on_scale,
        )
    save_picture(result.image, output)
    if compare is not None:
        save_picture(side_by_side(source, result.image), compare)
    click.echo(_as_json(output, result, editor, found) if as_json else _as_line(output, result))


def _output(image: Path, output: Path | None) -> Path:
    """Return where the result goes: by default beside the picture."""
    if not image.name:
        raise PictureError(f"{image} is no picture: name a file")
    return output or image.with_name(f"{image.stem}-edited.png")


def _as_line(output: Path, result: "EditResult") -> str:
    seconds, (width, height) = sum(result.timings.values()), result.image.size
    return f"{output}: {width} x {height}, seed {result.seed}, {seconds:.1f} s"


def _as_json(output: Path, result: "EditResult", editor: "Editor", found: "Found") -> str:
    """Return what an edit did, for `--json`."""
    told = {
        "image": str(output),
        "width": result.image.width,
        "height": result.image.height,
        "seed": result.seed,
        "bundle": str(found.path),
        "bundle_chosen": found.why,
        "digest": editor.bundle.digest,
        "variant": editor.variant.name,
        "provider": editor.provider,
        "timings": result.timings,
    }
    return json.dumps(told, indent=1)


@main.command(cls=BackendCommand)
@click.argument("bundle", type=PATH)
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
@click.option("--repeat", default=5, show_default=True, help="Number of timed edits.")
@_backend
@click.option("--json", "json_file", type=PATH, help="Write all numbers here, as JSON.")
@debug_option
def bench(
    bundle: Path, variant: str | None, repeat: int, backend: ChosenBackend, json_file: Path | None
) -> None:
    """Measure BUNDLE: every stage and scale, start-up, memory.

    \b
    varedit-run bench bundles/2b-512 --repeat 10 --threads 2 --json bench.json
    """
    from varedit_runtime.bench import check_report, measure_bundle, report_table, write_report

    if json_file is not None:
        check_report(json_file, bundle)
    report = measure_bundle(bundle, repeat, backend, variant)
    try:
        click.echo(report_table(report))
    finally:  # also where the output cannot be written
        if json_file is not None:
            write_report(asdict(report), json_file)


@main.command()
@click.argument("image", type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="The file to write; .png, .bmp and .tiff keep every pixel.",
)
@click.option("--res", default=512, show_default=True, help="256, 512 or 1024 px.")
@click.option("--aspect", default="1:1", show_default=True, help="Height:width; see `grids`.")
@debug_option
def prepare(image: Path, output: Path, res: int, aspect: str) -> None:
    """Write IMAGE as a model sees it: upright, sRGB, padded with white, resized.

    \b
    varedit-run prepare photo.jpg -o square.png --res 256
    """
    from varedit_runtime.pictures import open_picture, pad_and_resize, save_picture

    _check_targets(image, output)
    size = picture_size(res, aspect)
    source = open_picture(image)
    save_picture(pad_and_resize(source, size), output)
    height, width = size
    click.echo(f"{output}: {width} x {height}, from {source.width} x {source.height}")


@main.command()
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


def _find_bundle(named: Path | None, *targets: Path | None) -> "Found":
    """Find the bundle to use, and tell on stderr which it is and why.

    targets: where results go. Raises ConfigError if one of them lies in the bundle.
    """
    from varedit_runtime.locate import find_bundle

    found = find_bundle(named)
    click.echo(f"bundle: {found.path} ({found.why})", err=True)
    _check_outside(found.path, *targets)
    return found


def _check_targets(
    image: Path,
    output: Path,
    compare: Path | None = None,
    previews: Path | None = None,
    mask: Path | None = None,
) -> None:
    """Refuse what could not be written, or would overwrite what is read, before work is spent."""
    from varedit_runtime.pictures import check_target

    targets = [output] if compare is None else [output, compare]
    for target in targets:
        check_target(target)
        if same_file(target, image):
            raise ConfigError(f"{target} is the source picture: choose another file to write")
        if mask is not None and same_file(target, mask):
            raise ConfigError(f"{target} is the mask: choose another file to write")
    if compare is not None and same_file(compare, output):
        raise ConfigError(f"{compare} is where the result goes: choose another file for --compare")
    for path in filter(None, (image, mask, *targets)):
        if previews and same_file(path.parent, previews) and path.match(_preview("*")):
            raise ConfigError(f"{path} could be overwritten by a preview: choose another folder")


def _check_outside(bundle: Path, *targets: Path | None) -> None:
    """Refuse to write into the bundle in use, before work is spent.

    Of a folder that is no bundle, opening it says so.
    """
    from varedit_runtime.manifest import MANIFEST

    for target in filter(None, targets):
        if lies_in(target, bundle) and os.path.exists(bundle / MANIFEST):
            raise ConfigError(f"{target} cannot be written: {IN_BUNDLE}")


def _preview(scale: str) -> str:
    return f"scale-{scale}.png"


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder for previews; delete it at the end if nothing was written to it."""
    made = not os.path.lexists(path)
    try:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} cannot be made a folder: {error.strerror}") from error
        if why := unwritable(path / _preview("*")):
            raise ConfigError(f"previews cannot be written: {why}")
        yield
    finally:
        if made:
            with suppress(OSError):  # previews are in it
                path.rmdir()


@contextmanager
def _watching(editor: "Editor", previews: Path | None) -> Iterator["OnScale | None"]:
    """Previews into a folder and, on a terminal, a bar over the scales, by their tokens.

    None where nobody watches: an edit may then be run in one piece.
    """
    from varedit_runtime.pictures import save_picture

    tokens = [height * width for height, width in editor.variant.grids]
    with ExitStack() as stack:
        bar = None
        if sys.stderr.isatty():
            bar = click.progressbar(
                length=sum(tokens), label="editing", file=sys.stderr, show_eta=False
            )
            stack.enter_context(bar)

        def on_scale(progress: "Progress") -> None:
            if previews is not None:
                (preview,) = progress.preview()
                save_picture(preview, previews / _preview(f"{progress.scale:02}"))
            if bar is not None:
                bar.update(tokens[progress.scale])

        yield None if previews is None and bar is None else on_scale

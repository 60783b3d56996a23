"""Edit a picture: `varedit-run IMAGE INSTRUCTION`."""

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.errors import ConfigError, EditWarning, PictureError, shown
from varedit_runtime.files import IN_BUNDLE, lies_in, same_file, unwritable
from varedit_runtime.terminal.command import (
    BUNDLE,
    PATH,
    BackendCommand,
    backend_option,
    debug_option,
)

if TYPE_CHECKING:
    from PIL import Image

    from varedit_runtime.editing.arguments import OutputSize
    from varedit_runtime.editing.editor import Editor, EditResult, OnScale, Progress
    from varedit_runtime.locate import Found

_backend = backend_option("What runs the bundle; auto: the best that can here.")
EDIT = "edit"


class _Unnamed(click.Context):
    """The context of a command whose name nobody has to type: messages leave it out."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent else super().command_path


class EditCommand(BackendCommand):
    """The command that edits a picture; its warnings are lines on stderr."""

    context_class = _Unnamed

    def invoke(self, ctx: click.Context) -> Any:
        show = warnings.showwarning

        def show_in_one_line(message: Warning | str, category: type[Warning], *of: Any) -> None:
            if issubclass(category, EditWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                show(message, category, *of)

        with warnings.catch_warnings():
            warnings.simplefilter("always", EditWarning)
            warnings.showwarning = show_in_one_line
            return super().invoke(ctx)


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


def _longest_side(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> "OutputSize":
    """Read an option's number of pixels, or the word for the model's own."""
    if text is None:
        return "source"
    if text == "model":
        return text
    if re.fullmatch("[1-9][0-9]{0,8}", text):
        return int(text)
    told = shown(text)
    raise ConfigError(f"{parameter.opts[0]} is {told}; give a number of pixels, or model")


def _per_scale(name: str, help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, metavar="X", callback=_numbers, help=help)


@click.command(EDIT, hidden=True, cls=EditCommand)
@click.argument("image", type=PATH)
@click.argument("instruction")
@click.option(
    "-o", "--output", type=PATH, help="Where to write; by default IMAGE's name with -edited."
)
@click.option("--bundle", type=BUNDLE, help="The model's bundle; see `bundles`.")
@click.option("--variant", metavar="NAME", help="The bundle's variant; by default its first.")
@click.option("--seed", type=int, help="The same seed gives the same picture; random if left out.")
@_per_scale("--guidance-scale", "How much the instruction counts.")
@_per_scale("--temperature", "Sampling temperature (> 0); higher is more varied.")
@click.option(
    "--fast", is_flag=True, help="No guidance at the last two scales: faster, less accurate."
)
@click.option("--negative-prompt", metavar="TEXT", help="What the picture should not be like.")
@click.option(
    "--mask",
    type=PATH,
    help="A picture of IMAGE's size: only what is white, or transparent, in it may change.",
)
@click.option(
    "--max-side",
    "output_size",
    metavar="PIXELS",
    callback=_longest_side,
    help="The result's longest side, at most IMAGE's own; or model, for the model's own pixels.",
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
    mask: Path | None,
    compare: Path | None,
    previews: Path | None,
    backend: ChosenBackend | AutoBackend,
    as_json: bool,
    **settings: Any,
) -> None:
    """Edit IMAGE as INSTRUCTION says.

    X is a number, or one per scale with commas between; by default the bundle's own.

    \b
    varedit-run photo.png "add a hat" --seed 7
    """
    from varedit_runtime.editing.editor import Editor
    from varedit_runtime.editing.masks import fitted
    from varedit_runtime.pictures import open_mask, open_picture

    output = _output(image, output)
    check_targets(image, output, compare, previews, mask)
    source, found = open_picture(image), _find_bundle(bundle, output, compare, previews)
    marked = mask and fitted(open_mask(mask), source)
    with (
        nullcontext() if previews is None else _folder(previews),
        Editor.open(found.path, backend=backend, variant=variant) as editor,
        _watching(editor, previews) as on_scale,
    ):
        result = editor.edit(source, instruction, mask=marked, on_scale=on_scale, **settings)
    _save(output, compare, source, result)
    click.echo(_as_json(output, result, editor, found) if as_json else _as_line(output, result))


def _output(image: Path, output: Path | None) -> Path:
    """Return where the result goes: by default beside the picture."""
    if not image.name:
        raise PictureError(f"{image} is no picture: name a file")
    return output or image.with_name(f"{image.stem}-edited.png")


def _save(output: Path, compare: Path | None, source: "Image.Image", result: "EditResult") -> None:
    from varedit_runtime.pictures import save_picture, side_by_side

    save_picture(result.image, output)
    if compare is not None:
        save_picture(side_by_side(source, result.image), compare)


def _as_line(output: Path, result: "EditResult") -> str:
    seconds, (width, height) = sum(result.timings.values()), result.image.size
    return f"{output}: {width} x {height}, seed {result.seed}, {seconds:.1f} s"


def _as_json(output: Path, result: "EditResult", editor: "Editor", found: "Found") -> str:
    """Return what an edit did, for `--json`."""
    assert editor.chosen
    told = {
        "image": str(output),
        "width": result.image.width,
        "height": result.image.height,
        "seed": result.seed,
        "bundle": str(found.path),
        "bundle_chosen": found.why,
        "digest": editor.bundle.digest,
        "variant": editor.variant.name,
        "backend": editor.chosen.spec.name,
        "backend_chosen": editor.chosen.why,
        "provider": editor.provider,
        "timings": result.timings,
        "warnings": result.warnings,
    }
    return json.dumps(told, indent=1)


def _find_bundle(named: Path | None, *targets: Path | None) -> "Found":
    """Find the bundle to use, and tell on stderr which it is and why.

    targets: where results go. Raises ConfigError if one of them lies in the bundle, BundleError if
    that takes no instructions.
    """
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.locate import find_bundle

    found = find_bundle(named)
    click.echo(f"bundle: {found.path} ({found.why})", err=True)
    _check_outside(found.path, *targets)
    Bundle.open(found.path).check_text()  # before minutes are spent on loading
    return found


def check_targets(
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

"""Edit pictures: `varedit-run IMAGE... INSTRUCTION`."""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.errors import ConfigError, EditWarning, shown
from varedit_runtime.files import same_file
from varedit_runtime.terminal.command import (
    BUNDLE,
    PATH,
    TEXT_PATH,
    BackendCommand,
    backend_option,
    debug_option,
    say,
    tell_errors_as_json,
    variant_option,
)
from varedit_runtime.terminal.streams import STREAM

if TYPE_CHECKING:
    from varedit_runtime.commands.job import Job
    from varedit_runtime.commands.orders import Orders
    from varedit_runtime.editing.arguments import OutputSize

EDIT = "edit"


class _Unnamed(click.Context):
    """The context of a command whose name nobody has to type: messages leave it out."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent else super().command_path


class EditCommand(BackendCommand):
    """The command that edits pictures.

    Its warnings are lines on stderr, each once. With `--json`, errors are JSON on stdout too.
    """

    context_class = _Unnamed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--json" in args:
            tell_errors_as_json(ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        show, told = warnings.showwarning, set[str]()

        def show_in_one_line(message: Warning | str, category: type[Warning], *of: Any) -> None:
            if not issubclass(category, EditWarning):
                show(message, category, *of)
            elif str(message) not in told:  # that of another picture
                told.add(str(message))
                say(f"Warning: {message}")

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
@click.argument("images", nargs=-1, type=TEXT_PATH, metavar="IMAGE...")
@click.argument("instruction", required=False, metavar="INSTRUCTION")
@click.option("--then", multiple=True, metavar="INSTRUCTION", help="Edit the result; repeatable.")
@click.option(
    "--list",
    "listed",
    type=PATH,
    metavar="FILE",
    help="Edit what a .csv or .jsonl file lists: image, instruction and, if wanted, seed, "
    "negative_prompt, mask.",
)
@click.option(
    "-o",
    "--output",
    type=TEXT_PATH,
    metavar="FILE|FOLDER",
    help="Where to write; by default beside IMAGE, with -edited in the name.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist, finished results too.")
@click.option(
    "--bundle", type=BUNDLE, metavar="NAME|PATH", help="The model's bundle; see `bundles`."
)
@click.option("--digest", help="Use no bundle but that of this digest, and hash all its files.")
@variant_option
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
@click.option("--keep-steps", is_flag=True, help="With --then: write the pictures between too.")
@backend_option()
@click.option(
    "--ray", "on_ray", is_flag=True, help="Edit on the Ray cluster of RAY_ADDRESS, or a new one."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each picture.")
@debug_option
@click.pass_context
def edit(
    ctx: click.Context,
    images: tuple[str, ...],
    instruction: str | None,
    listed: Path | None,
    output: str | None,
    seed: int | None,
    negative_prompt: str | None,
    mask: Path | None,
    compare: Path | None,
    previews: Path | None,
    then: tuple[str, ...],
    bundle: Path | None,
    digest: str | None,
    variant: str | None,
    backend: ChosenBackend | AutoBackend,
    keep_steps: bool,
    overwrite: bool,
    on_ray: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Edit IMAGE, a picture or a folder of pictures, as INSTRUCTION says.

    X is a number, or one per scale with commas between; by default the bundle's own.

    \b
    varedit-run photo.png "add a hat" --seed 7
    varedit-run photos "add a hat" -o edited
    """
    _check_words(ctx, images, instruction, listed)
    from varedit_runtime.commands.job import Job
    from varedit_runtime.commands.one import edit_one
    from varedit_runtime.commands.orders import Order, Orders

    job = Job(then, settings, bundle, digest, variant, backend, keep_steps, overwrite, as_json)
    usual = Order(Path(*images[:1]), instruction or "", negative_prompt, mask, seed)
    orders = Orders(usual, list(map(Path, images)), listed)
    folder = _folder(images, listed, output, on_ray)
    job.check()
    count = orders.checked()
    if folder is None:
        edit_one(usual, images[0] == STREAM, output, compare, previews, job)
    elif compare or previews:
        raise ConfigError("--compare and --previews are of one picture: name a file with -o")
    else:
        ctx.exit(min(_edit_several(orders, count, folder, job, on_ray), 1))


def _edit_several(orders: "Orders", count: int, folder: Path, job: "Job", on_ray: bool) -> int:
    """Edit into a folder, here or on a Ray cluster; see `edit_several`."""
    from varedit_runtime.commands.one import made_folder
    from varedit_runtime.commands.record import RECORD
    from varedit_runtime.commands.several import edit_several
    from varedit_runtime.terminal.ray_cluster import cluster, threads_of

    with made_folder(folder, RECORD):
        if not on_ray:
            return edit_several(orders, count, folder, job)
        with cluster(least=threads_of(job.backend) + 1):  # one reads
            from varedit_runtime.commands.on_ray import edit_on_ray

            return edit_on_ray(orders, count, folder, job)


def _check_words(
    ctx: click.Context, images: Sequence[str], instruction: str | None, listed: Path | None
) -> None:
    """Raise UsageError unless there are pictures and an instruction, or else a list of both."""
    if listed is not None:
        if instruction is not None:
            raise click.UsageError(
                "--list names pictures and instructions: leave out IMAGE and INSTRUCTION", ctx
            )
        return
    if not images:
        if instruction is not None and not os.path.lexists(instruction):
            _check_command(ctx, instruction)
        missing = "images" if instruction is None else "instruction"
        (param,) = (param for param in ctx.command.params if param.name == missing)
        raise click.MissingParameter(ctx=ctx, param=param)
    from varedit_runtime.pictures import READ_SUFFIXES

    name = instruction or ""
    if name.lower().endswith(READ_SUFFIXES) and os.path.isfile(name):
        raise click.UsageError(f"{name} is a picture: the instruction comes last", ctx)


def _check_command(ctx: click.Context, word: str) -> None:
    """Raise UsageError if the only word that was typed is nearly the name of a command."""
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    commands = [name for name, command in group.commands.items() if not command.hidden]
    if close := get_close_matches(word, commands, n=1):
        raise click.UsageError(f"no command {shown(word)}; did you mean {close[0]}?", ctx)


def _folder(
    images: Sequence[str], listed: Path | None, output: str | None, on_ray: bool
) -> Path | None:
    """Return the folder of the results, None if there is one result that goes to a file or stream.

    Several pictures need a folder. For one, a folder is what exists as one or ends in a slash.
    """
    from varedit_runtime.pictures import WRITE_FORMATS

    named = (output not in (None, STREAM) and output) or ""
    is_folder = named.endswith("/") or os.path.isdir(named)
    several = listed is not None or len(images) > 1 or os.path.isdir(images[0])
    if not several and not is_folder:
        if on_ray:
            raise ConfigError("--ray is for several pictures: name a folder for results with -o")
        return None
    missing = next((image for image in images if not os.path.lexists(image)), STREAM)
    if several and missing != STREAM:
        raise ConfigError(
            f"there is no picture {shown(missing)}; an instruction after the first is given with "
            "--then"
        )
    if STREAM in images:
        raise ConfigError(
            "standard input must be the only picture: save it as a file, to edit it with others"
            if several
            else f"standard input has no name for a result in {named}: give -o FILE, or -o {STREAM}"
        )
    if output == STREAM:
        raise ConfigError("standard output takes one picture: name a folder with -o")
    if not named:
        raise ConfigError("several results need a folder: name it with -o")
    if not is_folder and Path(named).suffix.lower() in WRITE_FORMATS:
        raise ConfigError(f"{named} is no folder, and several results need one: name it with -o")
    for image in images:
        if os.path.isdir(image) and same_file(Path(image), Path(named)):
            raise ConfigError(
                f"{named} has the pictures, and results in it would be edited next time: choose "
                "another folder"
            )
    return Path(named)

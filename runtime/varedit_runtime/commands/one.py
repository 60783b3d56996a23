"""Edit one picture into a file or to standard output, with previews and a bar over the scales."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import click

from varedit_runtime.commands.job import Job
from varedit_runtime.commands.orders import Order
from varedit_runtime.commands.results import (
    check_free,
    check_targets,
    edited_names,
    preview_name,
    step_names,
    write_new,
    write_steps,
    write_to_stdout,
)
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.masks import fitted
from varedit_runtime.editing.results import OnScale, Progress
from varedit_runtime.errors import ConfigError, PictureError
from varedit_runtime.files import bundle_around, unwritable
from varedit_runtime.pictures import open_mask, open_picture, side_by_side
from varedit_runtime.terminal.command import say
from varedit_runtime.terminal.streams import STREAM


def edit_one(
    order: Order,
    from_stdin: bool,
    output: str | None,
    compare: Path | None,
    previews: Path | None,
    job: Job,
) -> None:
    """Edit a picture, write what is wanted, and tell of it.

    output: a file's name, STREAM for standard output, None for a new name beside the picture.
    """
    if from_stdin and output is None:
        raise ConfigError(f"name the result of standard input: -o FILE, or -o {STREAM}")
    image = None if from_stdin else order.image
    _check_there(image, order.mask)
    target = _target(order, output, job)
    outputs = [] if target is None else [*step_names(target, job.kept), target]
    check_targets(image, outputs, compare, previews, order.mask)
    if not job.overwrite:
        check_free(outputs, compare, previews)
    if previews is not None and job.then:
        raise ConfigError("--previews are of one edit: leave out --then")
    source = open_picture(image or _stdin())
    mask = order.mask and fitted(open_mask(order.mask), source)
    with (
        nullcontext() if previews is None else made_folder(previews, preview_name("*")),
        job.opened() as opened,
        _watching(opened.editor, previews, job) as on_scale,
    ):
        (turns,) = opened.edit([order], [source], [mask], on_scale)
    images = [turn.image for turn in turns]
    if target is None:
        write_to_stdout(images[-1])
    else:
        names = [target] if output else edited_names(order.image.parent, order.image.stem)
        target = write_steps(names, images[-job.kept :], job.overwrite)
    if compare is not None:
        write_new(side_by_side(source, images[-1]), compare, job.overwrite)
    show = say if target is None else click.echo
    show(opened.tell(order, target or STREAM, turns))


def _check_there(*paths: Path | None) -> None:
    """Raise PictureError if a file is missing, before the name of the result is judged."""
    for path in filter(None, paths):
        try:
            path.stat()
        except OSError as error:
            raise PictureError(f"{path} cannot be read: {error.strerror}") from error


def _target(order: Order, output: str | None, job: Job) -> Path | None:
    """Return where the result goes, as far as it is known now: None for standard output."""
    if output is None:
        names = edited_names(order.image.parent, order.image.stem)
        return next(
            name
            for name in names
            if job.overwrite or not any(map(os.path.lexists, (*step_names(name, job.kept), name)))
        )
    if output != STREAM:
        if not Path(output).suffix:
            raise ConfigError(
                f"{output} is neither a folder that exists nor a picture's name: end it in .png "
                "for a picture, or in / for a new folder"
            )
        return Path(output)
    if sys.stdout.isatty():
        raise ConfigError("a terminal shows no picture: send standard output into a file or a pipe")
    if job.as_json:
        raise ConfigError(f"-o {STREAM} and --json would both write to standard output: choose one")
    if job.keep_steps:
        raise ConfigError(f"--keep-steps needs names: give -o a file instead of {STREAM}")
    return None


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("standard input is no picture: pipe a file into the command, or name one")
    return sys.stdin.buffer


@contextmanager
def made_folder(path: Path, file: str) -> Iterator[None]:
    """Make a folder; delete it at the end if nothing was written to it. file: such as goes in."""
    made = not os.path.lexists(path)
    if bundle_around(path):  # not even made and deleted there
        raise ConfigError(f"{path} cannot be written to: {unwritable(path)}")
    try:
        if made:
            try:
                path.mkdir(exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{path} cannot be made a folder: {error.strerror}") from error
        elif not path.is_dir():
            raise ConfigError(f"{path} cannot be made a folder: there is a file of that name")
        if why := unwritable(path / file):
            raise ConfigError(f"{path} cannot be written to: {why}")
        yield
    finally:
        if made:
            with suppress(OSError):  # something is in it
                path.rmdir()


@contextmanager
def _watching(editor: Editor, previews: Path | None, job: Job) -> Iterator[OnScale | None]:
    """Previews into a folder and, on a terminal, a bar over the scales, by their tokens.

    None where nobody watches: an edit may then be run in one piece.
    """
    tokens = [height * width for height, width in editor.variant.grids]
    with ExitStack() as stack:
        bar = None
        if sys.stderr.isatty():
            bar = click.progressbar(
                length=sum(tokens) * (1 + len(job.then)),
                label="editing",
                file=sys.stderr,
                show_eta=False,
            )
            stack.enter_context(bar)

        def on_scale(progress: Progress) -> None:
            if previews is not None:
                (preview,) = progress.preview()
                write_new(preview, previews / preview_name(f"{progress.scale:02}"), job.overwrite)
            if bar is not None:
                bar.update(tokens[progress.scale])

        yield None if previews is None and bar is None else on_scale

"""Where results go: names that are free, files that appear whole, standard output.

Nothing that exists is replaced unless the user says so. A name is taken by making the file, which
fails where there is one: two commands at once never get the same.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from PIL import Image

from varedit_runtime.errors import ConfigError
from varedit_runtime.files import same_file
from varedit_runtime.pictures import check_target, encode_picture, write_encoded


def edited_names(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the names of a picture's results: photo-edited.png, photo-edited-2.png, ..."""
    yield folder / f"{stem}-edited.png"
    for number in count(2):
        yield folder / f"{stem}-edited-{number}.png"


def step_names(result: Path, instructions: int) -> list[Path]:
    """Return the names of the pictures before a result: photo-edited-step-1.png, ..."""
    return [
        result.with_name(f"{result.stem}-step-{number}{result.suffix}")
        for number in range(1, instructions)
    ]


def preview_name(scale: str) -> str:
    """Return the name of the picture after a scale."""
    return f"scale-{scale}.png"


def check_targets(
    image: Path | None,
    outputs: Sequence[Path],
    compare: Path | None = None,
    previews: Path | None = None,
    mask: Path | None = None,
) -> None:
    """Refuse what could not be written, or would overwrite what is read, before work is spent.

    outputs: where the result goes, and the pictures before it.
    """
    targets = [*outputs, *filter(None, [compare])]
    for target in targets:
        check_target(target)
        if image is not None and same_file(target, image):
            raise ConfigError(f"{target} is the source picture: choose another file to write")
        if mask is not None and same_file(target, mask):
            raise ConfigError(f"{target} is the mask: choose another file to write")
    if compare is not None and any(same_file(compare, output) for output in outputs):
        raise ConfigError(f"{compare} is where the result goes: choose another file for --compare")
    for path in filter(None, (image, mask, *targets)):
        if previews and same_file(path.parent, previews) and path.match(preview_name("*")):
            raise ConfigError(f"{path} could be overwritten by a preview: choose another folder")


def check_free(
    outputs: Sequence[Path], compare: Path | None = None, previews: Path | None = None
) -> None:
    """Refuse to replace files that exist, before work is spent."""
    shown = sorted(previews.glob(preview_name("*"))) if previews is not None else []
    for path in filter(None, (*outputs, *shown, compare)):
        if os.path.lexists(path):
            raise exists(path)


def write_steps(
    names: Iterable[Path],
    steps: Sequence[Image.Image | bytes],
    overwrite: bool,
    before: Callable[[Path, bytes], object] = lambda path, content: None,
) -> Path:
    """Write a result, and the pictures before it, under the first name that is free for all.

    names: of the result. steps: the result is the last; bytes are a file's. before: called before
    the result is there. Returns the result's name. Raises ConfigError if no name is free, and
    PictureError.
    """
    encoded: list[bytes] = []
    taken = Path()
    for name in names:
        paths = [*step_names(name, len(steps)), name]
        taken = next(filter(os.path.lexists, paths), name)
        if overwrite or not os.path.lexists(taken):
            written_as = check_target(name)
            encoded = encoded or [
                one if isinstance(one, bytes) else encode_picture(one, written_as, target=name)
                for one in steps
            ]
            with suppress(FileExistsError):  # another process was faster
                _write_together(paths, encoded, overwrite, before)
                return name
    raise exists(taken)


def exists(path: Path) -> ConfigError:
    """Return the error about a file that would be replaced."""
    return ConfigError(f"{path} exists: choose another name, or replace it with --overwrite")


def write_new(image: Image.Image, path: Path, overwrite: bool) -> None:
    """Write a picture. Raises ConfigError if the file exists and is not to be overwritten."""
    try:
        content = encode_picture(image, check_target(path), target=path)
        write_encoded(content, path, overwrite)
    except FileExistsError as error:
        raise exists(path) from error


def write_to_stdout(image: Image.Image) -> None:
    """Write a picture to standard output, as PNG. Raises OutputError if it cannot be written."""
    sys.stdout.buffer.write(encode_picture(image, target="standard output"))
    sys.stdout.buffer.flush()


def _write_together(
    paths: Sequence[Path],
    contents: Sequence[bytes],
    overwrite: bool,
    before: Callable[[Path, bytes], object],
) -> None:
    """Write files, the last one last; if that fails, delete those that were new."""
    written: list[Path] = []
    try:
        for path, content in zip(paths, contents, strict=True):
            if path == paths[-1]:
                before(path, content)
            write_encoded(content, path, overwrite)
            written.append(path)
    except BaseException:
        for path in written if not overwrite else ():
            path.unlink(missing_ok=True)
        raise

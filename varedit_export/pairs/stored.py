"""Find and read pictures in a data set's folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from varedit_export.errors import DatasetError
from varedit_export.evaluation.rows import inside
from varedit_export.pairs.pair import Root, Stored
from varedit_runtime.errors import shown


def check_name(row: str, name: str) -> None:
    """Raise DatasetError if a name cannot be that of a file in the data set's folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise DatasetError(f"{row}: {shown(name)} is not in the data set's folder")


def locate(row: str, root: Root, name: str, folders: Sequence[str] = ("",)) -> Stored:
    """Find the file that a row names in the first of some folders that has it.

    Raises DatasetError if none has.
    """
    names = [f"{folder}{name}" for folder in folders]
    own = next((one for one in names if (root.folder / one).exists()), names[0])
    path = inside(row, root.folder, own)
    status = path.stat()
    return Stored(own, f"{own} {status.st_size} {status.st_mtime_ns}", partial(_path, path))


def _path(path: Path) -> Path:
    return path

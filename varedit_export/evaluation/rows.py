"""Read rows of data sets, none of which is trusted."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from PIL import Image

from varedit_export.errors import DatasetError
from varedit_export.evaluation.case import OVERALL, Case, Load
from varedit_runtime.errors import MissingExtraError, printable, reason, shown
from varedit_runtime.files import read_regular
from varedit_runtime.pictures import Source, open_mask, open_picture

LARGEST = 2**28  # bytes of a file of rows
Kind = TypeVar("Kind")


@contextmanager
def row_errors(row: str) -> Iterator[None]:
    """Say in an error which row it is about; all become DatasetErrors."""
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:  # libraries raise errors of every kind on damaged files
        raise DatasetError(f"{row}: {reason(error)}") from error


def read_rows(path: Path) -> bytes:
    """Return the content of a file of rows. Raises DatasetError."""
    try:
        return read_regular(path, LARGEST)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file of a type. Raises DatasetError, which says where it differs."""
    with row_errors(str(path)):
        return msgspec.json.decode(read_rows(path), type=kind)


def as_row(row: str, line: bytes, kind: type[Kind]) -> Kind:
    """Read a row of JSON as a type. Raises DatasetError, which says in what it differs."""
    with row_errors(row):
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError as error:
            raise DatasetError(f"it must be one whole JSON object: {reason(error)}") from error


def inside(row: str, folder: Path, name: str) -> Path:
    """Return the path of a file that a row names. Raises DatasetError if it leaves the folder.

    The hub's cache has links in the folder: to blobs/, beside the snapshots/ that the folder is in.
    """
    with row_errors(row):
        path = Path(os.path.realpath(folder / name))
        blobs = [p.with_name("blobs") for p in folder.absolute().parents if p.name == "snapshots"]
        allowed = any(path.is_relative_to(os.path.realpath(root)) for root in (folder, *blobs))
        if Path(name).is_absolute() or ".." in Path(name).parts or not allowed:
            raise DatasetError(f"{shown(name)} is not in the data set's folder")
        if not path.is_file():
            raise DatasetError(f"there is no file {shown(name)}")
        return path


def picture(row: str, source: Callable[[], Source]) -> Load:
    """Return what loads a row's picture. source: returns its path or bytes."""

    def load() -> Image.Image:
        with row_errors(row):
            return open_picture(source())

    return load


def mask(row: str, source: Callable[[], Source]) -> Callable[[], np.ndarray]:
    """Return what loads a row's mask: which pixels are white or transparent, bool [H, W]."""

    def load() -> np.ndarray:
        with row_errors(row):
            return np.asarray(open_mask(source())) > 0

    return load


def text(value: str | None) -> str | None:
    """Return a caption; None for one that is missing or blank."""
    return value if value and value.strip() else None


def checked_cases(cases: Sequence[Case]) -> list[Case]:
    """Return cases after checking what all have: ids that differ, and instructions.

    Raises DatasetError.
    """
    seen = set[str]()
    for case in cases:
        if case.id in seen:
            raise DatasetError(f"two rows have the id {shown(case.id)}: each needs its own")
        seen.add(case.id)
        if not case.instruction.strip():
            raise DatasetError(f"row {printable(case.id)}: the instruction is empty")
        if OVERALL in case.groups:
            raise DatasetError(f"row {printable(case.id)}: a type cannot be called {OVERALL}")
        if case.after is not None and case.after not in seen:
            raise DatasetError(
                f"row {printable(case.id)} follows {case.after!r}, which is not before it"
            )
    if not cases:
        raise DatasetError("the data set has no rows")
    return list(cases)

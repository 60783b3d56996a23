"""Read rows of data sets, none of which is trusted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from varedit_export.errors import DatasetError
from varedit_runtime.errors import MissingExtraError, reason, shown
from varedit_runtime.files import read_regular

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

"""Find and read pictures in a data set's folder: files, members of tar files, cells of tables."""

import os
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from varedit_export.datasets.rows import inside, row_errors
from varedit_export.datasets.tables import Table
from varedit_export.errors import DatasetError
from varedit_runtime.decoding.limits import MAX_MEMORY
from varedit_runtime.errors import readable_size, shown
from varedit_runtime.pictures import Source

TAR, PARQUET = ".tar", ".parquet"

_LARGEST_HEADER = 2**20  # bytes of a member's header in a tar file, with its long name
_TARS, _TABLES = 8, 2  # whose contents are known at a time


@dataclass(frozen=True)
class Stored:
    """A picture's file, wherever it is.

    name: its path in the data set's folder, in which a tar or Parquet file counts as a folder.
    identity: changes when the content does. read: returns its path or bytes, None for an empty cell
    of a table; raises DatasetError.
    """

    name: str
    identity: str
    read: Callable[[], Source | None]


@dataclass(frozen=True)
class Root:
    """The folder of a data set, which its names do not leave.

    place: its address on the hub, with the commit; "" for a folder of this machine.
    """

    folder: Path
    place: str = ""

    def locate(self, row: str, name: str, folders: Sequence[str] = ("",)) -> Stored:
        """Find the file that a row names in the first of some folders that has it.

        Raises DatasetError if none has.
        """
        check_name(row, name)
        names = [f"{folder}{name}" for folder in folders]
        own = next((one for one in names if _exists(self.folder / one)), names[0])
        parts = PurePosixPath(own).parts
        for count, part in enumerate(parts[:-1], 1):
            path = self.folder.joinpath(*parts[:count])
            if part.endswith((TAR, PARQUET)) and not path.is_dir():
                inside(row, self.folder, "/".join(parts[:count]))
                with row_errors(row):
                    return self._within(path, parts[count:])
        path = inside(row, self.folder, own)
        return Stored(own, self._identity(own, path), partial(_path, path))

    def _within(self, path: Path, parts: Sequence[str]) -> Stored:
        """Return what a tar file has under a path, or a table under COLUMN/ROW."""
        if path.suffix == TAR:
            members = members_of(path)
            if (found := members.places.get(name := "/".join(parts))) is None:
                raise DatasetError(f"{path.name} has no {shown(name)}")
            return self.member(members, found)
        if len(parts) != 2 or not parts[1].isdecimal():
            raise DatasetError(f"give a cell of {path.name} as {path.name}/COLUMN/ROW")
        return self.cell(table_of(path), parts[0], int(parts[1]))

    def member(self, members: "Members", place: int) -> Stored:
        """Return a member of a tar file in this folder."""
        name = f"{self._name(members.path)}/{members.names[place]}"
        identity = self._identity(name, members.path)
        return Stored(name, identity, partial(members.read, place))

    def cell(self, table: Table, column: str, place: int) -> Stored:
        """Return a cell of a table in this folder."""
        name = f"{self._name(table.path)}/{column}/{place}"
        identity = self._identity(name, table.path)
        return Stored(name, identity, partial(_cell, table.path, column, place))

    def _identity(self, name: str, path: Path) -> str:
        return f"{self._resolved}/{name} {_version(path)}"

    @cached_property
    def _resolved(self) -> Path:
        """The folder by its only name: files of two folders may have the same name and version."""
        return self.folder.resolve()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


class Members:
    """The files in a tar file, which are read where they lie and never unpacked to a disk."""

    def __init__(self, path: Path) -> None:
        """Read all headers. Raises DatasetError if the file is damaged, or no plain tar file."""
        self.path, self.names, self._spans = path, list[str](), array("q")
        with row_errors(str(path)):
            for name, offset, size in _headers(path):
                self.names.append(name)
                self._spans.extend((offset, size))

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each member by its name."""
        return {name: place for place, name in enumerate(self.names)}

    def read(self, place: int) -> bytes:
        """Return a member's content. Raises DatasetError."""
        offset, size = self._spans[2 * place : 2 * place + 2]
        if size > MAX_MEMORY:
            raise DatasetError(f"{shown(self.names[place])} has {readable_size(size)}")
        return read_part(self.path, offset, size)


class _Headers:
    """A tar file of which headers alone are read: a long one could fill the memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise DatasetError("the header of a member is too large")
        return self._file.read(size)


def _headers(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each file in a tar file, and the offset and size of its content."""
    whole = regular(path).st_size
    with (
        path.open("rb") as file,
        tarfile.open(fileobj=_Headers(file), mode="r:", errors="strict") as tar,  # pyright: ignore
    ):
        end = 0
        while (member := tar.next()) is not None:
            tar.members = []  # it would keep them all
            if member.size < 0 or member.offset < end or member.issparse():
                raise DatasetError(f"the member {shown(member.name)} is none that can be read")
            end = member.offset_data + member.size
            if end > whole:
                raise DatasetError(f"it ends in the middle of {shown(member.name)}")
            if member.isreg():
                check_name(str(path), member.name)
                yield str(PurePosixPath(member.name)), member.offset_data, member.size
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # the library takes it for the end
            raise DatasetError(f"it is damaged at byte {tar.offset}")


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return some bytes of a file. Raises DatasetError if it has fewer."""
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise DatasetError(f"{path} is shorter than it was")
    return content


def regular(path: Path) -> os.stat_result:
    """Return the status of a file. Raises DatasetError if there is none, or a pipe or device."""
    if not path.is_file():  # a pipe could be waited for without end
        raise DatasetError(f"there is no file {path}")
    return path.stat()


def check_name(row: str, name: str) -> None:
    """Raise DatasetError if a name cannot be that of a file in the data set's folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DatasetError(f"{row}: {shown(name)} is not in the data set's folder")


def members_of(path: Path) -> Members:
    """Return the members of a tar file; those of the last few files are kept."""
    return _members(path, _version(path))


def table_of(path: Path) -> Table:
    """Return a table; the last few are kept, with the group of rows that each read last."""
    return _table(path, _version(path))


@lru_cache(_TARS)
def _members(path: Path, version: str) -> Members:
    return Members(path)


@lru_cache(_TABLES)
def _table(path: Path, version: str) -> Table:
    return Table(path)


def _version(path: Path) -> str:
    status = regular(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _exists(path: Path) -> bool:
    return "\0" not in str(path) and os.path.lexists(path)


def _cell(path: Path, column: str, place: int) -> bytes | None:
    table = table_of(path)  # which may not be kept with all that it has read
    return None if table.empty(column, place) else table.picture(column, place)()


def _path(path: Path) -> Path:
    return path

"""The edits that a command is asked for: pictures and an instruction, a folder, or a list.

A list is a CSV or JSONL file, maybe from a stranger. It is read line by line, twice: once to check
and count all of it before any work is spent, once to edit.
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from varedit_runtime.editing.arguments import check_seed
from varedit_runtime.errors import ConfigError, PictureError, VareditError, one_line, shown
from varedit_runtime.pictures import READ_SUFFIXES
from varedit_runtime.text import check_instruction

LONGEST_LINE = 2**16  # bytes of a line of a list

_SEPARATORS = ";\t"  # of columns, where the first line has one; else it is a comma


@dataclass(frozen=True)
class Order:
    """An edit that was asked for. seed: None for a random one."""

    image: Path
    instruction: str
    negative_prompt: str | None = None
    mask: Path | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise ConfigError or TextError on values that no bundle can take."""
        check_instruction(self.instruction)
        if self.seed is not None:
            check_seed(self.seed)

    def check_files(self) -> None:
        """Raise PictureError if image or mask is a folder, a device or a pipe."""
        for path in filter(None, (self.image, self.mask)):
            if os.path.exists(path) and not os.path.isfile(path):
                raise PictureError(f"{path} cannot be read: it is no file")


@dataclass(frozen=True)
class Orders:
    """The edits of a command.

    images: files and folders of pictures, or else `listed`: a list of edits. usual: an order with
    what is not said for each picture.
    """

    usual: Order
    images: Sequence[Path] = ()
    listed: Path | None = None

    def __iter__(self) -> Iterator[Order]:
        if self.listed is not None:
            yield from _listed(self.listed, self.usual)
        for path in self.images:
            if path.is_dir():
                for picture in _pictures(path):
                    yield replace(self.usual, image=picture)
            else:
                yield replace(self.usual, image=path)

    def checked(self) -> int:
        """Check all of them, as far as this needs no bundle and no picture; return how many."""
        if self.listed is None:
            self.usual.check()
        amount = sum(1 for _ in self)
        if self.listed is not None and not amount:
            raise ConfigError(f"{self.listed} lists no edits: give a line for each")
        return amount


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a list."""

    image: str
    instruction: str
    seed: int | None = None
    negative_prompt: str | None = None
    mask: str | None = None


_COLUMNS = _Row.__struct_fields__


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures right in a folder, by name; hidden files are none."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from error
    pictures = [
        path
        for path in found
        if path.suffix.lower() in READ_SUFFIXES and path.name[0] != "." and not path.is_dir()
    ]
    if not pictures:
        raise ConfigError(f"{folder} has no pictures: name a folder of {', '.join(READ_SUFFIXES)}")
    return pictures


def _listed(path: Path, usual: Order) -> Iterator[Order]:
    """Yield the orders of a list. Raises ConfigError, which names the line, on all else."""
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix.lower())
    if rows is None:
        raise ConfigError(f"{path} is no list of edits: its name must end in .csv or .jsonl")
    for place, row in rows(path):
        with _naming(place):
            order = replace(
                usual,
                image=_beside(path, row.image),
                instruction=row.instruction,
                negative_prompt=row.negative_prompt or usual.negative_prompt,
                mask=_beside(path, row.mask) if row.mask else usual.mask,
                seed=usual.seed if row.seed is None else row.seed,
            )
            order.check()
        yield order


def _beside(listed: Path, name: str) -> Path:
    """Return the path that a list means. Raises ValueError if it is not in the list's folder."""
    path = listed.parent / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(listed.parent)):
        raise ValueError(
            f"{shown(name)} is not in the list's folder, or is a link to somewhere else: a list "
            "names files beside and below itself"
        )
    return path


def _csv_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    columns: list[str] = []
    separator = ","
    for place, line in _lines(path):
        if not columns:
            separator = next((mark for mark in _SEPARATORS if mark in line), ",")
        with _naming(place):
            (cells,) = csv.reader([line], strict=True, delimiter=separator)
            if not columns:
                columns = _checked_columns([cell.strip() for cell in cells])
                continue
            if len(cells) > len(columns):
                raise ValueError(f"it has {len(cells)} cells for {len(columns)} columns")
            filled: dict[str, Any] = {
                name: cell for name, cell in zip(columns, cells, strict=False) if cell
            }
            if "seed" in filled:
                filled["seed"] = _whole_number(filled["seed"])
            row = msgspec.convert(filled, _Row)
        yield place, row


def _whole_number(text: str) -> int:
    """Return a seed. Raises ValueError on all but decimal digits; int() takes more."""
    if not re.fullmatch(r"\s*-?[0-9]{1,20}\s*", text):
        raise ValueError(f"the seed is {shown(text)}, not a whole number")
    return int(text)


def _checked_columns(names: list[str]) -> list[str]:
    """Return the columns that a list's first line names. Raises ValueError on others, or twice."""
    if unknown := [name for name in names if name not in _COLUMNS]:
        raise ValueError(f"the column {shown(unknown[0])} is not one of {', '.join(_COLUMNS)}")
    if len(set(names)) < len(names):
        raise ValueError("a column is named twice")
    return names


def _jsonl_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    for place, line in _lines(path):
        with _naming(place):
            row = msgspec.json.decode(line, type=_Row)
        yield place, row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line that is not empty stands, and its text."""
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                place = f"{path}, line {number}"
                with _naming(place):
                    if len(line) > LONGEST_LINE:
                        raise ValueError(f"it has over {LONGEST_LINE} bytes")
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield place, text
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Turn any error about a line into a ConfigError that says where it stands."""
    try:
        yield
    except (ValueError, VareditError, csv.Error, msgspec.MsgspecError) as error:
        raise ConfigError(f"{place}: {one_line(error)}") from error

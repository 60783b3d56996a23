"""Pairs whose files belong together by their names: webdataset shards, and folders.

    0001.source.png  0001.target.png  0001.txt        in a tar file or a folder, also 0001.json:
    source/0001.png  target/0001.png  0001.txt        {"instruction": "add a hat", "weight": 2}

`names.py` has what else they may be called. Files that are no part of a pair are passed over.
"""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from varedit_export.datasets.rows import row_errors
from varedit_export.errors import DatasetError
from varedit_export.pairs.names import INSTRUCTION, JSON, MASK, SOURCE, TARGET, called, split
from varedit_export.pairs.pair import Pair, Weight, check_instruction
from varedit_export.pairs.stored import Root, Stored, members_of
from varedit_runtime.errors import readable_size
from varedit_runtime.files import read_regular

PARTS = (SOURCE, TARGET, MASK, INSTRUCTION, JSON)
LARGEST_TEXT = 2**20  # bytes of an instruction's file

_NONE = -1


class Shard:
    """The members of a tar file."""

    def __init__(self, path: Path, root: Root) -> None:
        self.path, self._root, self._members = path, root, members_of(path)
        self.names = self._members.names

    def stored(self, place: int) -> Stored:
        return self._root.member(self._members, place)


class Folder:
    """The files in a folder and below. Links to folders are not followed."""

    def __init__(self, path: Path, root: Root) -> None:
        self.path, self._root = path, root
        found = (Path(at, name) for at, _, names in os.walk(path) for name in names)
        self.names = sorted(file.relative_to(root.folder).as_posix() for file in found)

    def stored(self, place: int) -> Stored:
        return self._root.locate(str(self.path), self.names[place])


class Groups(Sequence[Pair]):
    """Pairs of the files of a folder or a tar file."""

    def __init__(self, files: Shard | Folder, root: Root) -> None:
        """Check that each pair is whole. Raises DatasetError, which names it."""
        self._files, self._root = files, root
        self._keys, self._places = _group(files)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: int) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        row, count = f"{self._files.path}, {self._keys[place]}", len(PARTS)
        places = self._places[count * place : count * (place + 1)]
        with row_errors(row):
            found = {
                part: self._files.stored(at)
                for part, at in zip(PARTS, places, strict=True)
                if at != _NONE
            }
            told, text = found.pop(JSON, None), found.pop(INSTRUCTION, None)
            instruction, weight = (None, 1.0) if told is None else _told(_text(told))
            if text is not None:
                instruction = _text(text).decode()
        check_instruction(row, instruction := (instruction or "").strip())
        return Pair(row, instruction, found, self._root, weight)


def _group(files: Shard | Folder) -> tuple[list[str], Sequence[int]]:
    """Return what the pairs are called, and the places of their PARTS in the names, or _NONE."""
    found = dict[str, dict[str, int]]()
    for place, name in enumerate(files.names):
        if (own := split(name)) is None:
            continue
        key, part = own
        if found.setdefault(key, {}).setdefault(part, place) != place:
            raise DatasetError(f"{files.path}, {key}: there are two files for its {part}")
    pairs = {key: parts for key, parts in found.items() if parts.keys() & {SOURCE, TARGET, MASK}}
    for key, parts in pairs.items():
        if missing := [part for part in (SOURCE, TARGET) if part not in parts]:
            raise DatasetError(f"{files.path}, {key}: there is no {missing[0]}")
        if not parts.keys() & {INSTRUCTION, JSON}:
            raise DatasetError(f"{files.path}, {key}: there is no instruction, such as {key}.txt")
    places = (parts.get(part, _NONE) for parts in pairs.values() for part in PARTS)
    return list(pairs), array("q", places)


def _told(content: bytes) -> tuple[str | None, float]:
    """Return the instruction and the weight that a JSON file has."""
    row = msgspec.json.decode(content, type=dict[str, Any])
    name = called(INSTRUCTION, row)
    instruction = None if name is None else msgspec.convert(row[name], str)
    return instruction, msgspec.convert(row.get("weight", 1.0), Weight)


def _text(stored: Stored) -> bytes:
    content = stored.read()
    if isinstance(content, Path):
        return read_regular(content, LARGEST_TEXT)
    if not isinstance(content, bytes) or len(content) > LARGEST_TEXT:
        raise DatasetError(f"its text has over {readable_size(LARGEST_TEXT)}")
    return content

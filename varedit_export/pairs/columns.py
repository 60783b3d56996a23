"""Pairs in Parquet files.

With pictures in them: columns that `names.py` knows, as MagicBrush's source_img, mask_img,
instruction and target_img. A mask may be missing in some rows.

ImgEdit (arXiv 2505.20275; PKU-YuanGroup/ImgEdit, README.md, "ImgEdit Dataset Format"): Parquet/ has
input_images, output_images and prompt, or in edits of several turns `data`, a list of them. Names
are those in the tar files of Singleturn/ and Multiturn/, whose parts were joined by `cat`, or of
the files that were unpacked there.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from varedit_export.datasets.tables import Table
from varedit_export.errors import DatasetError
from varedit_export.pairs.names import INSTRUCTION, MASK, NAMES, SOURCE, TARGET, WEIGHT, called
from varedit_export.pairs.pair import Pair, Weight, check_instruction
from varedit_export.pairs.stored import TAR, Root, Stored, check_name, members_of, table_of

FOLDERS = ("", "Singleturn/", "Multiturn/")  # of ImgEdit's pictures

_TURNS = "data"
_OneName = Annotated[list[str], Meta(min_length=1, max_length=1)]


class Columns(Sequence[Pair]):
    """Pairs of a table with pictures."""

    def __init__(self, path: Path, root: Root) -> None:
        """Check the instructions of all rows. Raises DatasetError, which names the row."""
        self._path, self._root, table = path, root, table_of(path)
        found = {part: called(part, table.names) for part in NAMES}
        self._columns = {part: name for part, name in found.items() if name is not None}
        if missing := {SOURCE, TARGET, INSTRUCTION} - self._columns.keys():
            told = ", ".join(table.names)
            raise DatasetError(f"{path}: no column is a pair's {sorted(missing)[0]}; it has {told}")
        texts = {INSTRUCTION: str, WEIGHT: Weight}
        self._row = msgspec.defstruct(
            "_Row",
            [(part, kind) for part, kind in texts.items() if part in self._columns],
            rename=self._columns.get,
        )
        for place, row in enumerate(rows := _rows(table, self._row)):
            check_instruction(table.name(place), row.instruction)
        self._count = len(rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        table = table_of(self._path)
        row = _rows(table, self._row)[place]
        files = {
            part: self._root.cell(table, column, place)
            for part, column in self._columns.items()
            if part in (SOURCE, TARGET, MASK)
        }
        weight = getattr(row, WEIGHT, 1.0)
        return Pair(table.name(place), row.instruction, files, self._root, weight)


class _Edit(msgspec.Struct):
    """An edit of ImgEdit: of one picture into one."""

    input_images: _OneName
    output_images: _OneName
    prompt: str


class _Turns(msgspec.Struct):
    data: list[_Edit]


class ImgEdit(Sequence[Pair]):
    """The edits that a file of ImgEdit names."""

    def __init__(self, path: Path, root: Root) -> None:
        """Check all rows; pictures are looked for when a pair is asked for."""
        self._path, self._root, table = path, root, table_of(path)
        self._kind = _Turns if _TURNS in table.names else _Edit
        self._places = array("q")  # of each pair: its row and turn
        for place, row in enumerate(_rows(table, self._kind)):
            for turn, edit in enumerate(row.data if isinstance(row, _Turns) else [row]):
                check_instruction(name := self._name(place, turn), edit.prompt)
                check_name(name, edit.input_images[0])
                check_name(name, edit.output_images[0])
                self._places.extend((place, turn))

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, place: int) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        number, turn = self._places[2 * place : 2 * place + 2]
        row, name = _rows(table_of(self._path), self._kind)[number], self._name(number, turn)
        edit = row.data[turn] if isinstance(row, _Turns) else row
        names = {SOURCE: edit.input_images[0], TARGET: edit.output_images[0]}
        files = {part: self._find(name, one) for part, one in names.items()}
        return Pair(name, edit.prompt, files, self._root)

    def _name(self, row: int, turn: int) -> str:
        name = table_of(self._path).name(row)
        return f"{name}, turn {turn + 1}" if self._kind is _Turns else name

    def _find(self, row: str, name: str) -> Stored:
        """Return a picture: a file, or a member of a tar file."""
        if not any((self._root.folder / folder / name).is_file() for folder in FOLDERS):
            for tar in _tars(self._root.folder).get(name.split("/")[0], ()):
                members = members_of(tar)
                if name in members.places:
                    return self._root.member(members, members.places[name])
        return self._root.locate(row, name, FOLDERS)


def is_imgedit(path: Path) -> bool:
    """Return whether a table names pictures as ImgEdit does. Raises DatasetError."""
    return bool({_TURNS, "input_images"} & {*table_of(path).names})


@lru_cache(2)
def _rows(table: Table, kind: type[Any]) -> list[Any]:
    """Return the rows of a table without pictures; those of the last few tables are kept."""
    return table.rows(kind, nested=kind in (_Edit, _Turns))


@lru_cache(1)
def _tars(folder: Path) -> dict[str, list[Path]]:
    """Return the tar files of ImgEdit by the folders in them."""
    found = dict[str, list[Path]]()
    for tar in sorted(tar for part in FOLDERS for tar in (folder / part).glob(f"*{TAR}")):
        for top in {name.split("/")[0] for name in members_of(tar).names}:
            found.setdefault(top, []).append(tar)
    return found

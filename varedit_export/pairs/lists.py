"""Lists of pairs: JSON lines, one's own or SEED-Data-Edit's.

One's own:

    {"source": "girl.png", "target": "hat.png", "instruction": "add a hat", "mask": "head.png"}

source, target and instruction are needed. A mask is white, or transparent, where the edit may
change the picture; weight is the pair's share of the loss, 1 by default. `varedit-export filter`
adds whether a pair was kept and why: one that was not is passed over. `data` is the place on the
hub that a row's files are at; such rows are its, too.

SEED-Data-Edit (arXiv 2405.04007; huggingface.co/datasets/AILab-CVC/SEED-Data-Edit-Part2-3, loader
in AILab-CVC/SEED-X, src/data/sft_clm.py): annotations/*.jsonl with source_image, target_image and
instruction; edits in turns (Part 3) have instruction_1, edit_image_1, instruction_2, ... up to 6.
Pictures lie in images/ beside annotations/, unpacked as its card says.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from varedit_export.datasets.rows import as_row, row_errors
from varedit_export.errors import DatasetError
from varedit_export.pairs.names import MASK, SOURCE, TARGET
from varedit_export.pairs.pair import Pair, Weight, check_instruction
from varedit_export.pairs.stored import Root, check_name, read_part, regular
from varedit_export.weights.hub import SCHEME
from varedit_runtime.errors import readable_size, shown

LARGEST_LINE = 2**20  # bytes
MOST_PLACES = 100  # on the hub that a list names
TURNS, EDIT, INSTRUCTION = 6, "edit_image_", "instruction_"


class _Own(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    target: str
    instruction: str
    mask: str | None = None
    weight: Weight = 1.0
    kept: bool = True
    scores: dict[str, float] | None = None
    data: str | None = None


class _Seed(msgspec.Struct):
    source_image: str
    target_image: str
    instruction: str


@dataclass(frozen=True)
class _Edit:
    """An edit of a row: names of files by what they are, and what it is called in errors."""

    row: str
    files: Mapping[str, str]
    instruction: str
    weight: float = 1.0
    data: str | None = None


class PairList(Sequence[Pair]):
    """A file of JSON lines, of which the places of the pairs are kept in memory."""

    def __init__(
        self, path: Path, root: Root, folders: Sequence[str], remote: Callable[[str], Root]
    ) -> None:
        """Check all lines; pictures are looked for when a pair is asked for.

        folders: of the root, in which files are looked for in turn. remote: brings the data of a
        place on the hub. Raises DatasetError, which names the line.
        """
        regular(path)
        self._path, self._folders = path, folders
        self._roots: dict[str | None, Root] = {None: root}  # by the rows' `data`
        self._places = array("q")  # of each pair: its line's number, offset and size, and its turn
        for number, offset, line in _lines(path):
            for turn, edit in enumerate(self._edits(number, line)):
                _check(edit)
                if edit.data not in self._roots:
                    self._roots[edit.data] = _remote(edit, remote, len(self._roots))
                self._places.extend((number, offset, len(line), turn))

    def __len__(self) -> int:
        return len(self._places) // 4

    def __getitem__(self, place: int) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        number, offset, size, turn = self._places[4 * place : 4 * place + 4]
        edit = self._edits(number, read_part(self._path, offset, size))[turn]
        root = self._roots[edit.data]
        files = {k: root.locate(edit.row, name, self._folders) for k, name in edit.files.items()}
        return Pair(edit.row, edit.instruction, files, root, edit.weight)

    def _edits(self, number: int, line: bytes) -> list[_Edit]:
        row = f"{self._path}, line {number}"
        found = as_row(row, line, dict[str, Any])
        if found.get("kept") is False:
            return []
        if f"{EDIT}1" in found:
            return _turns(row, found)
        if "source_image" in found:
            with row_errors(row):
                seed = msgspec.convert(found, _Seed)
            files = {SOURCE: seed.source_image, TARGET: seed.target_image}
            return [_Edit(row, files, seed.instruction)]
        with row_errors(row):
            own = msgspec.convert(found, _Own)
        files = {SOURCE: own.source, TARGET: own.target}
        files |= {} if own.mask is None else {MASK: own.mask}
        return [_Edit(row, files, own.instruction, own.weight, own.data)]


def _turns(row: str, found: Mapping[str, Any]) -> list[_Edit]:
    """Return the edits of a row of several turns: each edits the result of the one before."""
    edits, before = list[_Edit](), found.get("source_image")
    for turn in range(1, TURNS + 1):
        instruction, after = found.get(f"{INSTRUCTION}{turn}"), found.get(f"{EDIT}{turn}")
        if not instruction and not after:  # rows have fewer turns than the longest one
            break
        own = f"{row}, turn {turn}"
        with row_errors(own):
            names = msgspec.convert([before, after, instruction], tuple[str, str, str])
        edits.append(_Edit(own, {SOURCE: names[0], TARGET: names[1]}, names[2]))
        before = after
    return edits


def _check(edit: _Edit) -> None:
    check_instruction(edit.row, edit.instruction)
    for name in edit.files.values():
        check_name(edit.row, name)


def _remote(edit: _Edit, remote: Callable[[str], Root], count: int) -> Root:
    """Bring the data of the place on the hub that a row names."""
    if not (edit.data or "").startswith(SCHEME):
        raise DatasetError(f"{edit.row}: data is {shown(edit.data)}: give hf://datasets/...")
    if count > MOST_PLACES:
        raise DatasetError(f"{edit.row}: there are over {MOST_PLACES} places on the hub")
    return remote(edit.data or "")


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, offset and content of each line that is not blank."""
    with path.open("rb") as file:
        offset, number = 0, 0
        while line := file.readline(LARGEST_LINE + 1):
            number += 1
            if len(line) > LARGEST_LINE:
                size = readable_size(LARGEST_LINE)
                raise DatasetError(f"{path}, line {number}: it has over {size}")
            if line.strip():
                yield number, offset, line
            offset += len(line)

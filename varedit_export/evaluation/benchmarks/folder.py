"""One's own edits: a folder with `edits.jsonl`, whose lines name pictures beside it.

    {"id": "hat", "image": "girl.png", "instruction": "add a hat", "type": "add",
     "target": "hat.png", "mask": "head.png", "before": "a girl", "caption": "a girl with a hat"}

image and instruction are needed. id is the line's number by default. A mask is white, or
transparent, where the edit may change the picture; before and caption say what the source and the
right result show.
"""

import os
from pathlib import Path

import msgspec

from varedit_export.datasets.rows import as_row, inside, read_rows
from varedit_export.errors import DatasetError
from varedit_export.evaluation.benchmarks.cases import checked_cases, mask, picture, text
from varedit_export.evaluation.case import Benchmark, Case

LIST = "edits.jsonl"


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    image: str
    instruction: str
    id: str | None = None
    type: str | None = None
    target: str | None = None
    mask: str | None = None
    before: str | None = None
    caption: str | None = None


def read(folder: Path) -> list[Case]:
    """Read a folder's list. Raises DatasetError, which names the line."""
    if not os.path.lexists(folder / LIST):
        raise DatasetError(
            f"{folder} has no {LIST}, whose every line is an edit with image and instruction: "
            "write one as docs/evaluation.md shows, or name another folder with --data"
        )
    lines = read_rows(folder / LIST).splitlines()
    return checked_cases(
        [_case(folder, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    )


def _case(folder: Path, number: int, line: bytes) -> Case:
    row = f"{folder / LIST}, line {number}"
    found = as_row(row, line, _Row)
    image = inside(row, folder, found.image)
    target = None if found.target is None else inside(row, folder, found.target)
    marked = None if found.mask is None else inside(row, folder, found.mask)
    return Case(
        id=found.id or str(number),
        groups=(found.type,) if found.type else (),
        instruction=found.instruction,
        source=picture(row, lambda: image),
        target=None if target is None else picture(row, lambda: target),
        mask=None if marked is None else mask(row, lambda: marked),
        before=text(found.before),
        caption=text(found.caption),
    )


FOLDER = Benchmark("one's own edits", read, ("pixels",), files=((LIST, "*"),))

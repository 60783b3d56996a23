"""ImgEdit-Bench: basic edits of nine types, understanding-grounding-editing, and several turns.

Format: its repository, PKU-YuanGroup/ImgEdit (Benchmark/Basic, UGE and Multiturn, with their
readmes): a folder with basic_edit.json, UGE_edit.json, or JSON files of edits in turns, one for
each type; pictures lie in the folder, or in original_images/. Its scores are a judge's, but
people's for edits in turns, which are judged as basic ones here; what is kept of the source is
measured too.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from varedit_export.datasets.rows import inside, read_json
from varedit_export.evaluation.benchmarks.cases import checked_cases, picture
from varedit_export.evaluation.case import Benchmark, Case, Load
from varedit_runtime.errors import printable

PICTURES = "original_images"


class _Row(msgspec.Struct):
    id: str
    prompt: str
    edit_type: str | None = None


class _Turns(msgspec.Struct):
    id: str
    turn1: str
    turn2: str
    turn3: str | None = None


def read(folder: Path, name: str) -> list[Case]:
    """Read a list of edits. Raises DatasetError, which names the row."""
    rows = read_json(folder / name, dict[str, _Row])
    return checked_cases(
        [
            Case(
                id=key,
                groups=(row.edit_type,) if row.edit_type else (),
                instruction=row.prompt,
                source=_picture(folder, f"{name}, row {key}", row.id),
            )
            for key, row in rows.items()
        ]
    )


def read_turns(folder: Path) -> list[Case]:
    """Read all lists of edits in turns; each turn edits the result of the one before."""
    lists = sorted(folder.glob("*.json"))
    return checked_cases([case for path in lists for case in _turns(folder, path)])


def _turns(folder: Path, path: Path) -> Iterator[Case]:
    for key, row in read_json(path, dict[str, _Turns]).items():
        source, before = _picture(folder, f"{path.name}, row {key}", row.id), None
        for turn, instruction in enumerate((row.turn1, row.turn2, row.turn3), 1):
            if instruction is not None:
                own = f"{path.stem} {key} turn {turn}"
                yield Case(own, (path.stem, f"turn {turn}"), instruction, source, after=before)
                before = own


def _picture(folder: Path, row: str, name: str) -> Load:
    """Return what loads a row's picture, which is beside the list or in a folder of its own."""
    root = folder / PICTURES if (folder / PICTURES).is_dir() else folder
    path = inside(printable(row), root, name)
    return picture(printable(row), lambda: path)


_PICTURES = tuple(
    prefix + "*/" * depth + "*.jpg" for prefix in ("", PICTURES + "/") for depth in (0, 1)
)
_JUDGE = "judge-imgedit"
_WEIGHTS = {"clip": "hf://openai/clip-vit-base-patch32"}


def _benchmark(title: str, name: str, judge: str) -> Benchmark:
    files = ((name, *_PICTURES),)
    return Benchmark(title, partial(read, name=name), ("clip", "dino"), files, _WEIGHTS, judge)


BASIC = _benchmark("ImgEdit-Bench, basic edits", "basic_edit.json", _JUDGE)
UGE = _benchmark("ImgEdit-Bench, UGE", "UGE_edit.json", "judge-uge")
TURNS = Benchmark(
    "ImgEdit-Bench, several turns",
    read_turns,
    ("clip", "dino"),
    (("*.json", *_PICTURES),),
    _WEIGHTS,
    _JUDGE,
)

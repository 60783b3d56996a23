"""MagicBrush's dev set: 528 edits with right results and masks.

Format: huggingface.co/datasets/osunlp/MagicBrush (Parquet files data/dev-*: img_id, turn_index,
source_img, mask_img, instruction, target_img). Scores: its repository, OSU-NLP-Group/MagicBrush
(evaluation/image_eval.py). Every turn edits the right result of the turn before, as "all turns"
there. A mask's region is white, or transparent; one of another
size than its picture is resized.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from varedit_export.datasets.tables import Table, tables
from varedit_export.evaluation.benchmarks.cases import checked_cases, mask, picture
from varedit_export.evaluation.case import Benchmark, Case, Load


class _Row(msgspec.Struct):
    img_id: str
    turn_index: int
    instruction: str


def read(folder: Path) -> list[Case]:
    """Read the dev split. Raises DatasetError, which names the row."""
    found = tables(folder, ["dev-*.parquet"])
    return checked_cases([case for table in found for case in _cases(table)])


def _cases(table: Table) -> list[Case]:
    return [_case(table, place, row) for place, row in enumerate(table.rows(_Row))]


def _case(table: Table, place: int, row: _Row) -> Case:
    name = table.name(place)
    source = picture(name, table.picture("source_img", place))
    return Case(
        id=f"{row.img_id}-{row.turn_index}",
        groups=(f"turn {row.turn_index}",),
        instruction=row.instruction,
        source=source,
        target=picture(name, table.picture("target_img", place)),
        mask=_resized(mask(name, table.picture("mask_img", place)), source),
    )


def _resized(marked: Callable[[], np.ndarray], source: Load) -> Callable[[], np.ndarray]:
    """Return what loads a mask at its picture's size."""
    return lambda: np.asarray(
        Image.fromarray(marked()).resize(source().size, Image.Resampling.NEAREST)
    )


MAGICBRUSH = Benchmark(
    "MagicBrush dev set",
    read,
    ("pixels", "clip", "dino"),
    files=(("data/dev-*.parquet",),),
    place="hf://datasets/osunlp/MagicBrush",
    weights={"clip": "hf://openai/clip-vit-base-patch32"},
)

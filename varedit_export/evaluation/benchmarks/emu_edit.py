"""EMU-Edit's test set: 3,589 edits of eight tasks, with captions of both pictures.

Format: the data set's card, huggingface.co/datasets/facebook/emu_edit_test_set (Parquet files
data/test-*: instruction, image, task, split, idx, hash, input_caption, output_caption). Scores: the
paper of EMU-Edit (arXiv 2311.10089) and of VAREdit. Its captions are known to be wrong at times: a
blank one is missing, and two equal ones give no direction.
"""

from pathlib import Path

import msgspec

from varedit_export.datasets.tables import Table, tables
from varedit_export.evaluation.benchmarks.cases import checked_cases, picture, text
from varedit_export.evaluation.case import Benchmark, Case


class _Row(msgspec.Struct):
    instruction: str
    task: str
    idx: int
    input_caption: str | None
    output_caption: str | None


def read(folder: Path) -> list[Case]:
    """Read the test split. Raises DatasetError, which names the row."""
    found = tables(folder, ["test-*.parquet", "*.parquet"])
    return checked_cases([case for table in found for case in _cases(table)])


def _cases(table: Table) -> list[Case]:
    return [
        Case(
            id=str(row.idx),
            groups=(row.task,),
            instruction=row.instruction,
            source=picture(table.name(place), table.picture("image", place)),
            before=text(row.input_caption),
            caption=text(row.output_caption),
        )
        for place, row in enumerate(table.rows(_Row))
    ]


EMU_EDIT = Benchmark(
    "EMU-Edit test set",
    read,
    ("clip", "dino", "pixels"),
    files=(("data/test-*.parquet",),),
    place="hf://datasets/facebook/emu_edit_test_set",
    weights={"clip": "hf://openai/clip-vit-base-patch32"},
)

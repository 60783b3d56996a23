"""GEdit-Bench: edits of eleven types that people asked for, in English and in Chinese.

Format: its repository, stepfun-ai/Step1X-Edit (GEdit-Bench/generate_image_example.py), and
huggingface.co/datasets/stepfun-ai/GEdit-Bench, which has Arrow files (task_type, key, instruction,
instruction_language, input_image, input_image_raw, Intersection_exist); Parquet files are read too.
Its intersection set has the edits that all models compared there answered. Its scores are a
judge's; what is kept of the source is measured too.
"""

from functools import partial
from pathlib import Path

import msgspec

from varedit_export.datasets.tables import Table, tables
from varedit_export.evaluation.benchmarks.cases import checked_cases, picture
from varedit_export.evaluation.case import Benchmark, Case


class _Row(msgspec.Struct):
    task_type: str
    key: str
    instruction: str
    instruction_language: str
    intersection: bool = msgspec.field(name="Intersection_exist")


def read(folder: Path, language: str) -> list[Case]:
    """Read the edits in a language. Raises DatasetError, which names the row."""
    found = tables(folder, ["data-*.arrow", "*.arrow", "*.parquet"])
    return checked_cases([case for table in found for case in _cases(table, language)])


def _cases(table: Table, language: str) -> list[Case]:
    raw = "input_image_raw" if "input_image_raw" in table.names else "input_image"
    return [
        Case(
            id=row.key,
            groups=(row.task_type, *(("intersection",) if row.intersection else ())),
            instruction=row.instruction,
            source=picture(table.name(place), table.picture(raw, place)),
        )
        for place, row in enumerate(table.rows(_Row))
        if row.instruction_language == language
    ]


def _benchmark(title: str, language: str) -> Benchmark:
    return Benchmark(
        f"GEdit-Bench, {title}",
        partial(read, language=language),
        ("clip", "dino"),
        files=(("*.arrow",), ("data/*.arrow",), ("data/*.parquet",)),
        weights={"clip": "hf://openai/clip-vit-base-patch32"},
        judge="judge-gedit",
        place="hf://datasets/stepfun-ai/GEdit-Bench",
    )


ENGLISH, CHINESE = _benchmark("English", "en"), _benchmark("Chinese", "cn")

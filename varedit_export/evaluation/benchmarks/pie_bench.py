"""PIE-Bench: 700 edits of ten types, with captions and masks.

Format and scores: its repository, cure-lab/PnPInversion (README; evaluation/evaluate.py): a folder
with mapping_file.json and annotation_images/. A mask is a list of starts and lengths in a picture
of 512 x 512 px, row by row, whose border counts as edited too. Brackets in captions mark what
differs and are taken out.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from varedit_export.datasets.rows import inside, read_json, row_errors
from varedit_export.errors import DatasetError
from varedit_export.evaluation.benchmarks.cases import checked_cases, picture, text
from varedit_export.evaluation.case import Benchmark, Case

SIDE = 512
TYPES = (
    *("random", "change object", "add object", "delete object", "change content", "change pose"),
    *("change color", "change material", "change background", "change style"),
)
PICTURES = "annotation_images"


class _Row(msgspec.Struct):
    image_path: str
    original_prompt: str
    editing_prompt: str
    editing_instruction: str
    editing_type_id: Annotated[str, Meta(pattern=r"\A[0-9]\Z")]
    mask: list[int]


def read(folder: Path) -> list[Case]:
    """Read the mapping file. Raises DatasetError, which names the row."""
    rows = read_json(folder / "mapping_file.json", dict[str, msgspec.Raw])
    return checked_cases([_case(folder, key, raw) for key, raw in rows.items()])


def _case(folder: Path, key: str, raw: msgspec.Raw) -> Case:
    name = f"mapping_file.json, row {key}"
    with row_errors(name):
        row = msgspec.json.decode(raw, type=_Row)
        decode_mask(row.mask)
    path = inside(name, folder / PICTURES, row.image_path)
    return Case(
        id=key,
        groups=(TYPES[int(row.editing_type_id)],),
        instruction=row.editing_instruction,
        source=picture(name, lambda: path),
        mask=partial(decode_mask, row.mask),
        before=_plain(row.original_prompt),
        caption=_plain(row.editing_prompt),
    )


def decode_mask(runs: list[int]) -> np.ndarray:
    """Return a mask, bool [512, 512]. Raises DatasetError on runs that leave the picture.

    The last run may be too long, as in published rows; it is cut.
    """
    mask = np.zeros(SIDE * SIDE, bool)
    if len(runs) > mask.size:
        raise DatasetError("mask: there are more runs than pixels")
    if len(runs) % 2 or not all(0 <= start < mask.size for start in runs[::2]):
        raise DatasetError("mask: give pairs of a start in the picture and a length")
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if length < 0:
            raise DatasetError("mask: a length is below 0")
        mask[start : start + length] = True
    mask = mask.reshape(SIDE, SIDE)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def _plain(caption: str) -> str | None:
    return text(caption.replace("[", "").replace("]", ""))


PIE_BENCH = Benchmark(
    "PIE-Bench",
    read,
    ("clip", "structure", "pixels", "lpips"),
    files=(("mapping_file.json", *(PICTURES + "/*" * depth for depth in range(1, 6))),),
    weights={"clip": "hf://openai/clip-vit-large-patch14"},
)

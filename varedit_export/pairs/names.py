"""What data sets call the parts of a pair: in columns of tables, and in names of files.

Beside ours: MagicBrush (huggingface.co/datasets/osunlp/MagicBrush), InstructPix2Pix
(huggingface.co/datasets/timbrooks/instructpix2pix-clip-filtered; in the shards that
huggingface/diffusers trains on, members are KEY.original_image.jpg, KEY.edited_image.jpg and
KEY.edit_prompt.txt), SEED-Data-Edit.
"""

from collections.abc import Collection
from pathlib import PurePosixPath

from varedit_runtime.pictures import READ_SUFFIXES

SOURCE, TARGET, MASK, INSTRUCTION, WEIGHT = "source", "target", "mask", "instruction", "weight"
TEXTS, JSON = ".txt", ".json"
NAMES = {
    SOURCE: (SOURCE, "source_img", "original_image", "source_image"),
    TARGET: (TARGET, "target_img", "edited_image", "target_image"),
    MASK: (MASK, "mask_img"),
    INSTRUCTION: (INSTRUCTION, "edit_prompt"),
    WEIGHT: (WEIGHT,),
}
PARTS = {name: part for part, names in NAMES.items() for name in names}


def called(part: str, among: Collection[str]) -> str | None:
    """Return what a part of a pair is called among some names; None if it is not there."""
    return next((name for name in NAMES[part] if name in among), None)


def split(path: str) -> tuple[str, str] | None:
    """Return the pair that a file belongs to, and its part of it; None if it is of none.

    The part is said by the end of the name (`KEY.source.png`), or by the folder
    (`source/KEY.png`). KEY.txt is the instruction, and KEY.json has it and the weight.
    """
    file = PurePosixPath(path)
    suffix = file.suffix.lower()
    head, _, last = file.stem.rpartition(".")
    if last in PARTS:
        key, part = str(file.parent / head), PARTS[last]
    elif file.parent.name in PARTS:
        key, part = str(file.parent.parent / file.stem), PARTS[file.parent.name]
    else:
        key, part = str(file.with_suffix("")), JSON if suffix == JSON else INSTRUCTION
    kinds = {INSTRUCTION: (TEXTS,), JSON: (JSON,)}.get(part, READ_SUFFIXES)
    return (key, part) if suffix in kinds else None

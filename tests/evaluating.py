"""Small evaluations: a folder of drawn pictures, and edits that no model makes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varedit_export.evaluation.case import Case, Edited, Made, Wanted
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.report import Report
from varedit_export.options import EvaluateOptions

SIDE = 16


def drawn(seed: int, side: int = SIDE, mode: str = "RGB") -> Image.Image:
    """Draw a picture of noise."""
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode)


def write_lines(folder: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Write the list of a data set of one's own."""
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "edits.jsonl").write_text("\n".join(texts), "utf-8")
    return folder


def own_data(folder: Path, count: int = 4) -> Path:
    """Write a data set of one's own, of two types in turn."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        drawn(number).save(folder / f"{number}.png")
        drawn(100 + number).save(folder / f"target-{number}.png")
        marked = np.zeros((SIDE, SIDE), np.uint8)
        marked[: SIDE // 2] = 255
        Image.fromarray(marked).save(folder / f"mask-{number}.png")
        names = {"target": f"target-{number}.png", "mask": f"mask-{number}.png"}
        row = {"image": f"{number}.png", "instruction": f"change {number}", **names}
        rows.append({**row, "type": "odd" if number % 2 else "even"})
    return write_lines(folder, rows)


class Shifted:
    """Edits that add a number to every level, and noise that depends on the seed."""

    name = "shifted"

    def __init__(self, shift: int = 10, refused: str = "") -> None:
        self.identity = {"shift": shift}
        self.shift, self.refused, self.made = shift, refused, list[int]()

    def edit(self, wanted: Iterable[Wanted]) -> Made:
        for one in wanted:
            self.made.append(one.place)
            if one.instruction == self.refused:
                yield one, "not understood"
            else:
                levels = np.asarray(one.source) // 2 + np.uint8(self.shift + one.seed)
                yield one, Image.fromarray(levels)


def evaluated(
    data: Path, output: Path, edits: Any = None, other: Any = None, **more: Any
) -> Report:
    """Evaluate on a data set of one's own."""
    options = EvaluateOptions(benchmark="folder", data=data, output=output, **more)
    return evaluate(edits or Shifted(), options, other)


def edited(
    source: Image.Image, result: Image.Image, target: Image.Image | None = None, **more: Any
) -> Edited:
    """Return an edit that was made."""
    case = Case("0", (), "change it", lambda: source, target=target and (lambda: target), **more)
    return Edited(case, source, result)

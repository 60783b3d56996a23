"""A pair, and data sets of them."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, overload

import numpy as np
from msgspec import Meta
from PIL import Image

from varedit_export.datasets.rows import row_errors
from varedit_export.errors import DatasetError
from varedit_export.pairs.names import MASK, SOURCE, TARGET
from varedit_export.pairs.stored import Root, Stored
from varedit_runtime.pictures import open_mask, open_picture

Weight = Annotated[float, Meta(gt=0, le=1000)]


@dataclass(frozen=True)
class Pair:
    """A pair to learn from.

    id: its file and row, as errors name them. files: the stored source and target, and mask if
    there is one. weight: its share of the loss, beside 1 of others. root: of the files' names.
    """

    id: str
    instruction: str
    files: Mapping[str, Stored]
    root: Root
    weight: float = 1.0

    def source(self) -> Image.Image:
        """Open the picture to edit. Raises DatasetError, which names the row."""
        return self._picture(SOURCE)

    def target(self) -> Image.Image:
        """Open the right result. Raises DatasetError, which names the row."""
        return self._picture(TARGET)

    def mask(self) -> np.ndarray | None:
        """Return which pixels of the source the edit may change, bool [H, W]; None if unknown.

        Raises DatasetError, which names the row.
        """
        with row_errors(self.id):
            content = self.files[MASK].read() if MASK in self.files else None
            return None if content is None else np.asarray(open_mask(content)) > 0

    @property
    def key(self) -> str:
        """The sha256 of what the pair consists of: other pictures or words have another."""
        told = [self.instruction, sorted((k, f.identity) for k, f in self.files.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _picture(self, name: str) -> Image.Image:
        with row_errors(self.id):
            if (content := self.files[name].read()) is None:
                raise DatasetError(f"there is no {name}")
            return open_picture(content)


def check_instruction(row: str, instruction: str) -> None:
    """Raise DatasetError, which names the row, on a blank instruction."""
    if not instruction.strip():
        raise DatasetError(f"{row}: the instruction is empty")


class Pairs(Sequence[Pair]):
    """Pairs of one or several files, each read when it is asked for."""

    def __init__(self, parts: Sequence[Sequence[Pair]]) -> None:
        """Join parts, one after the other. Raises DatasetError if they have no pairs."""
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))
        if not len(self):
            raise DatasetError(
                "the data has no pairs: give a list in JSON lines, its folder, shards, or tables"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Pair]: ...
    def __getitem__(self, place: int | slice) -> Any:
        """Return a pair. Raises DatasetError, which names the file and row."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"there is no pair {place} of {len(self)}")
        place %= len(self)
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]

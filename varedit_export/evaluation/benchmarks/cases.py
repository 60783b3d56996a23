"""Make cases of the rows of a data set."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from varedit_export.datasets.rows import row_errors
from varedit_export.errors import DatasetError
from varedit_export.evaluation.case import OVERALL, Case, Load
from varedit_runtime.errors import printable, shown
from varedit_runtime.pictures import Source, open_mask, open_picture


def picture(row: str, source: Callable[[], Source]) -> Load:
    """Return what loads a row's picture. source: returns its path or bytes."""

    def load() -> Image.Image:
        with row_errors(row):
            return open_picture(source())

    return load


def mask(row: str, source: Callable[[], Source]) -> Callable[[], np.ndarray]:
    """Return what loads a row's mask: which pixels are white or transparent, bool [H, W]."""

    def load() -> np.ndarray:
        with row_errors(row):
            return np.asarray(open_mask(source())) > 0

    return load


def text(value: str | None) -> str | None:
    """Return a caption; None for one that is missing or blank."""
    return value if value and value.strip() else None


def checked_cases(cases: Sequence[Case]) -> list[Case]:
    """Return cases after checking what all have: ids that differ, and instructions.

    Raises DatasetError.
    """
    seen = set[str]()
    for case in cases:
        if case.id in seen:
            raise DatasetError(f"two rows have the id {shown(case.id)}: each needs its own")
        seen.add(case.id)
        if not case.instruction.strip():
            raise DatasetError(f"row {printable(case.id)}: the instruction is empty")
        if OVERALL in case.groups:
            raise DatasetError(f"row {printable(case.id)}: a type cannot be called {OVERALL}")
        if case.after is not None and case.after not in seen:
            raise DatasetError(
                f"row {printable(case.id)} follows {case.after!r}, which is not before it"
            )
    if not cases:
        raise DatasetError("the data set has no rows")
    return list(cases)

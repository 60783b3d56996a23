"""How far two runs of an edit may differ: the measures, their tolerances, and the gate.

Every measure is a ParityLine: a stage, what was measured, its value and its tolerance. Values are
largest absolute errors where arithmetic in another order is all that may differ. Bits are another
matter: a bit is drawn as u < p, so where u, or the nucleus's cut, lies within rounding of p, either
bit is right. Such a tie is not counted; any other bit that differs fails the gate. Where products
are rounded there are more of them than ties, and a share of the bits may differ. What a precision
allows is said by its `Gates`.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from varedit_export.errors import ParityError
from varedit_reference.sampling import TIE, tie_margin
from varedit_runtime.backends.wiring import DECODER
from varedit_runtime.manifest import ParityLine
from varedit_runtime.precision import Gates

# fp32 arithmetic in another order; a wrong formula differs by far more.
FEATURES, LOGITS, SUMS = 1e-3, 1e-3, 1e-4
# Source tokens, where a GPU's products are rounded to 16 bits.
ROUNDED_TOKENS = 0.1


def line(
    stage: str, measure: str, actual: np.ndarray, expected: np.ndarray, tolerance: float = LOGITS
) -> ParityLine:
    """Measure the largest absolute error; it is infinite where a number is not finite."""
    error = np.abs(actual.astype(np.float64) - expected)
    value = float(error.max()) if np.isfinite(error).all() else float("inf")
    return ParityLine(stage, measure, value, tolerance)


def share_of_error_line(
    stage: str, measure: str, actual: np.ndarray, expected: np.ndarray, tolerance: float
) -> ParityLine:
    """Measure the root mean square error, as a share of the root mean square of `expected`.

    The largest error would grow with how many numbers are compared. NaN never passes the gate.
    """
    error = np.square(actual.astype(np.float64) - expected).mean()
    value = np.sqrt(error / np.square(expected, dtype=np.float64).mean())
    return ParityLine(stage, measure, float(value), tolerance)


def ties_line(
    stage: str,
    measure: str,
    differs: np.ndarray,
    logits: np.ndarray,
    noise: np.ndarray,
) -> ParityLine:
    """Count the bits that differ and are no ties.

    differs: bool [..., c]. logits [..., c, 2], noise [..., c]: what the expected bits were drawn
    from.
    """
    margin = tie_margin(torch.tensor(logits), torch.tensor(noise)).numpy()
    return ParityLine(stage, measure, float((differs & (margin > TIE)).sum()), 0.0)


def share_line(stage: str, measure: str, differs: np.ndarray, gates: Gates) -> ParityLine:
    """Measure the share of bits [B, ..] that differ. gates: say how many may, because of rounding.

    A batch repeats one picture, so what is allowed to one picture is allowed to each.
    """
    tolerance = max(gates.bits, gates.few / differs[:1].size)
    return ParityLine(stage, measure, float(differs.mean()), tolerance)


def picture_lines(
    pictures: np.ndarray, expected: np.ndarray, against: str = ""
) -> Iterator[ParityLine]:
    """Measure how 8-bit pictures of the same shape differ."""
    difference = np.abs(pictures.astype(np.int16) - expected.astype(np.int16))
    stage = "image_decoder"
    yield ParityLine(stage, f"picture{against}, levels", float(difference.max()), 1.0)
    share = float((difference > 0).mean())
    yield ParityLine(stage, f"picture{against}, share of values differing", share, 0.01)


def check_output(stage: str, name: str, array: np.ndarray) -> None:
    """Raise ParityError on numbers that are not finite, or all the same.

    Pictures [B, 3, H, W] must not consist of one colour each: without weights, a decoder puts out
    its last bias everywhere.
    """
    if array.dtype == np.bool_ or name == "text_bias":  # which is infinite where it masks
        return
    if not np.isfinite(array).all():
        raise ParityError(f"{stage}: {name} is not finite")
    spread = np.ptp(array, (-2, -1)).any(-1) if stage == DECODER else np.ptp(array)
    if array.size > 1 and not np.all(spread):
        raise ParityError(f"{stage}: {name} is constant")


def gate(lines: Iterable[ParityLine]) -> list[ParityLine]:
    """Return all lines. Raises ParityError naming those over their tolerance; NaN is."""
    lines_ = list(lines)
    failed = [line for line in lines_ if not line.value <= line.tolerance]
    if failed:
        named = "; ".join(
            f"{line.stage}: {line.measure} {line.value:.3g} over {line.tolerance:.3g}"
            for line in failed[:3]
        )
        raise ParityError(f"{len(failed)} of {len(lines_)} measures failed: {named}")
    return lines_

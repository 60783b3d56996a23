"""Means of scores with bootstrap confidence intervals, the same in every run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 2000  # of the bootstrap
FEWEST = 10  # edits that an interval, and a verdict, is given for
_AT_ONCE = 100  # samples that are drawn at a time, to bound memory


@dataclass(frozen=True)
class Mean:
    """A mean over edits, and the interval that holds it with 95 % confidence: None of too few."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def beside(self, edits: int, digits: int) -> str:
        """Return the interval, and the number of edits behind the mean if the row has another."""
        told = []
        if self.low is not None:
            told.append(f"{self.low:.{digits}f} to {self.high:.{digits}f}")
        if self.count != edits:
            told.append("1 edit" if self.count == 1 else f"{self.count} edits")
        return ", ".join(told)


def mean_of(values: Sequence[float]) -> Mean | None:
    """Return the mean of values and its interval by the percentile bootstrap; None if empty.

    The edits are drawn again, with replacement. Random numbers depend on how many values there are
    and on nothing else. Fewer than 10 edits have no interval: drawing them again knows no others,
    and would be certain of a mean of two edits that are alike.
    """
    if not values:
        return None
    array, random = np.asarray(values, np.float64), np.random.default_rng(0)
    if len(array) < FEWEST:
        return Mean(float(array.mean()), None, None, len(array))
    draws = [
        array[random.integers(0, len(array), (_AT_ONCE, len(array)))].mean(1)
        for _ in range(SAMPLES // _AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(draws), (0.025, 0.975))
    mean = float(array.mean())
    return Mean(mean, min(mean, float(low)), max(mean, float(high)), len(array))


@dataclass(frozen=True)
class Comparison:
    """How a score differs from that of other edits of the same cases, and what that says.

    difference: of the mean, over cases that both have a score for; above 0 is better.
    """

    difference: Mean
    verdict: str

    def beside(self, other: str) -> str:
        """Return the verdict with the name of what is compared with."""
        if self.verdict == "equal":
            return f"equal to {other}"
        if " by " not in self.verdict:
            return self.verdict
        return self.verdict.replace(" by ", f" than {other} by ", 1)


def compare(
    ours: Sequence[float | None], theirs: Sequence[float | None], better: int, digits: int
) -> Comparison | None:
    """Compare scores case by case; None where no case has both. better, digits: see `Score`."""
    pairs = zip(ours, theirs, strict=True)
    gains = [better * (a - b) for a, b in pairs if a is not None and b is not None]
    gain = mean_of(gains)
    if gain is None:
        return None
    if gain.low is None or gain.high is None:
        return Comparison(gain, "too few edits to tell")
    if not any(gains):
        return Comparison(gain, "equal")
    if gain.high < 0:
        verdict = f"worse by {-gain.high:.{digits}f} to {-gain.low:.{digits}f}"
    elif gain.low > 0:
        verdict = f"better by {gain.low:.{digits}f} to {gain.high:.{digits}f}"
    else:
        verdict = f"no worse by more than {abs(gain.low):.{digits}f}"
    return Comparison(gain, verdict)

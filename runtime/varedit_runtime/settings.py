"""An edit's numbers per scale, as the reference and the runtime both read them."""

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from numbers import Real

from varedit_runtime.errors import ConfigError

PerScale = float | Sequence[float]

# What single precision, which the models compute in, neither overflows on nor rounds to 0.
LARGEST, SMALLEST = 2.0**127, 2.0**-126


def per_scale(value: PerScale, scales: int, name: str) -> tuple[float, ...]:
    """A number, or one per scale, as one per scale.

    Raises ConfigError on another count, and on what is not a finite number.
    """
    given = tuple(value) if isinstance(value, Iterable) else (value,) * scales
    for entry in given:
        if not isinstance(entry, Real):
            raise ConfigError(
                f"{name} is {entry!r}; give a number, or one for each of {scales} scales"
            )
    values = tuple(map(_float, given))
    if len(values) != scales:
        raise ConfigError(f"{name} has {len(values)} values; give one, or one for each of {scales}")
    for number in values:
        if not isfinite(number) or abs(number) > LARGEST:
            raise ConfigError(f"{name} is {number}; it must be finite")
    return values


def temperature_per_scale(value: PerScale, scales: int) -> tuple[float, ...]:
    """A temperature as `per_scale` reads it. Raises ConfigError also unless it is over 0."""
    values = per_scale(value, scales, "temperature")
    if min(values) < SMALLEST:
        raise ConfigError(f"temperature is {value}; it must be over 0")
    return values


def _float(number: float) -> float:
    """What is too large for one as infinity, whatever its sign."""
    try:
        return float(number)
    except OverflowError:
        return inf

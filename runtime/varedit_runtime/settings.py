"""An edit's settings per scale, checked alike for the reference and the runtime."""

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from numbers import Real

from varedit_runtime.errors import ConfigError, shown

PerScale = float | Sequence[float]

# Models compute in fp32: larger values overflow, smaller ones are not normal numbers.
LARGEST, SMALLEST = 2.0**127, 2.0**-126


def per_scale(value: PerScale, scales: int, name: str) -> tuple[float, ...]:
    """Spread a number over all scales, or check that there is one per scale.

    Raises ConfigError, naming the setting, on another count or a value that is no finite number.
    """
    given = tuple(value) if isinstance(value, Iterable) else (value,) * scales
    for entry in given:
        if not isinstance(entry, Real):
            raise ConfigError(
                f"{name} is {shown(entry)}; give a number, or one for each of {scales} scales"
            )
    values = tuple(map(_float, given))
    if len(values) != scales:
        raise ConfigError(f"{name} has {len(values)} values; give one, or one for each of {scales}")
    for number in values:
        if not isfinite(number) or abs(number) > LARGEST:
            raise ConfigError(f"{name} is {number}; it must be finite")
    return values


def temperature_per_scale(value: PerScale, scales: int) -> tuple[float, ...]:
    """Spread or check a temperature like `per_scale`. Raises ConfigError also if it is <= 0."""
    values = per_scale(value, scales, "temperature")
    if min(values) < SMALLEST:
        raise ConfigError(f"temperature is {value}; it must be over 0")
    return values


def _float(number: float) -> float:
    """Convert to a float; integers too large for one give infinity, whatever their sign."""
    try:
        return float(number)
    except OverflowError:
        return inf

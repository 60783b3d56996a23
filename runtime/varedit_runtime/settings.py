"""An edit's numbers per scale, as the reference and the runtime both read them."""

from collections.abc import Iterable, Sequence
from math import isfinite
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
    values = tuple(float(v) for v in given if isinstance(v, Real))
    if len(values) != len(given):
        raise ConfigError(f"{name} is {value!r}; give a number, or one for each of {scales} scales")
    if len(values) != scales:
        raise ConfigError(f"{name} has {len(values)} values; give one, or one for each of {scales}")
    if not all(isfinite(v) and abs(v) <= LARGEST for v in values):
        raise ConfigError(f"{name} is {value}; it must be finite")
    return values


def temperature_per_scale(value: PerScale, scales: int) -> tuple[float, ...]:
    """A temperature as `per_scale` reads it. Raises ConfigError also unless it is over 0."""
    values = per_scale(value, scales, "temperature")
    if min(values) < SMALLEST:
        raise ConfigError(f"temperature is {value}; it must be over 0")
    return values

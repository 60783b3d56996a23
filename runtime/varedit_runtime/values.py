"""Convert what callers give to plain Python values, or refuse it with a ConfigError.

Annotations say what arguments and options take, and `checked` converts by them. A scalar of NumPy,
or an array or tensor without dimensions, is the number that it holds. Lists are measured before
they are walked. Whatever a caller's object raises becomes a ConfigError.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from math import inf, isfinite
from operator import index
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    SupportsFloat,
    SupportsIndex,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from varedit_runtime.errors import ConfigError, shown

AnyPath = str | os.PathLike[str]
PerScale = float | Sequence[float]
PerPicture = PerScale | Sequence[Sequence[float]]

MOST_ENTRIES = 10_000  # of a list
LARGEST_INTEGER = 2**128  # beyond all that an argument may be; much larger ones cannot be printed

# Models compute in fp32: larger values overflow, smaller ones are not normal numbers.
LARGEST, SMALLEST = 2.0**127, 2.0**-126


@dataclass(frozen=True)
class CheckedOptions:
    """The base of options: frozen dataclasses whose fields are converted to their types.

    Raises ConfigError on a value of another type. A subclass's own `__post_init__`, which raises it
    on values out of range, calls this one first.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = checked(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)


def checked(name: str, value: object, hint: Any, wanted: str = "") -> Any:
    """Return a caller's value as an annotation says: bool, int, float, str, a path, a class, ...

    hint: one of these, a Literal, a tuple of any length, a Callable, or a union. Paths become text.
    wanted: what to ask for instead of what the annotation says. Raises ConfigError, naming the
    argument.
    """
    kinds = _kinds(hint)
    cause = None
    for kind in kinds:
        try:
            return _converted(name, value, kind)
        except ConfigError:  # of an entry of a list
            raise
        except Exception as error:
            cause = error
    wanted = wanted or " or ".join(map(_told, kinds))
    raise ConfigError(f"{name} is {shown(value)}; give {wanted}") from cause


def entries(name: str, value: object) -> list[Any] | None:
    """Return a list's entries, None if the value is no list.

    A list is a sequence other than text and bytes, or an array or tensor of one dimension. Raises
    ConfigError if it is longer than MOST_ENTRIES, without walking it.
    """
    return _entries(name, value, is_list)


def per_picture(name: str, value: object) -> list[Any] | None:
    """Return each picture's own setting, None if a setting is the same for all pictures.

    It is a list of lists, or an array or tensor of two dimensions; each of its rows holds one
    number, which is returned alone, or one per scale. Raises ConfigError as `entries` does.
    """
    rows = _entries(name, value, _has_rows)
    if rows is None:
        return None
    listed = [entries(name, row) for row in rows]
    return [
        numbers[0] if numbers is not None and len(numbers) == 1 else row
        for row, numbers in zip(rows, listed, strict=True)
    ]


def _has_rows(value: Any) -> bool:
    return _dimensions(value) == 2 or (is_list(value) and len(value) > 0 and is_list(value[0]))


def _entries(name: str, value: Any, is_kind: Callable[[Any], bool]) -> list[Any] | None:
    cause = None
    try:
        if not is_kind(value):
            return None
        if len(value) <= MOST_ENTRIES:
            return list(islice(value, MOST_ENTRIES))
    except Exception as error:
        cause = error
    told = shown(value)
    raise ConfigError(f"{name} is {told}; give a list of at most {MOST_ENTRIES}") from cause


def is_list(value: object) -> bool:
    """Return whether an argument has one value per entry, rather than one for all of them."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return isinstance(value, Sequence) or _dimensions(value) == 1


def per_scale(value: PerScale, scales: int, name: str) -> tuple[float, ...]:
    """Spread a number over all scales, or check that there is one per scale.

    Raises ConfigError, naming the setting, on another count or a value that is no finite number.
    """
    given = entries(name, value)
    wanted = f"a number, or one for each of {scales} scales"
    numbers = [value] * scales if given is None else given
    values = tuple(checked(name, number, float, wanted) for number in numbers)
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
        raise ConfigError(f"temperature is {shown(value)}; it must be over 0")
    return values


def _kinds(hint: Any) -> list[Any]:
    """Return the types that a hint allows; a path may be given as a string too."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    if any(get_origin(kind) is os.PathLike for kind in kinds):
        kinds.remove(str)
    return kinds


def _converted(name: str, value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is tuple:
        listed = entries(name, value)
        if listed is None:
            raise TypeError
        return tuple(checked(name, entry, get_args(kind)[0]) for entry in listed)
    plain = _plain(value)
    if origin in _CONVERSIONS:
        return _CONVERSIONS[origin](plain)
    if origin is Literal:
        text = _text(plain)
        if text not in get_args(kind):
            raise ValueError
        return text
    if not isinstance(plain, origin):
        raise TypeError
    return plain


def _told(kind: Any) -> str:
    """Return what to ask for."""
    origin = get_origin(kind) or kind
    if origin is tuple:
        return f"a list ({_told(get_args(kind)[0])} each)"
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return _NAMES.get(origin) or origin.__name__


def _dimensions(value: object) -> object:
    """Return how many dimensions an array or tensor has."""
    return getattr(value, "ndim", None)


def _plain(value: Any) -> Any:
    dimensions = _dimensions(value)
    if dimensions:
        raise TypeError
    return value.item() if dimensions == 0 else value


def _integer(value: Any) -> int:
    number = int.__index__(index(value))  # of a subclass the number alone
    if isinstance(value, bool) or abs(number) >= LARGEST_INTEGER:
        raise TypeError
    return number


def _number(value: object) -> float:
    """Convert to a float; integers too large for one give infinity, whatever their sign."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat | SupportsIndex):
        raise TypeError
    try:
        return float(value)
    except OverflowError:
        return inf


def _text(value: str) -> str:
    return str.__str__(value)  # of a subclass the text alone


def _path(value: AnyPath) -> str:
    text = _text(os.fspath(value))
    if not text or b"\0" in os.fsencode(text):
        raise ValueError
    return text  # a Path would change what is no path here, such as hf://OWNER/REPOSITORY


# What types are called, where their own name tells less.
_NAMES: dict[Any, str] = {
    NoneType: "None",
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    os.PathLike: "a path",
    Callable: "a function",
}
# How values are converted to types; those of other types are taken as they are.
_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _number,
    str: _text,
    os.PathLike: _path,
}

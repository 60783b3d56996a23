"""Values that no sensible program would give, and some that only look odd."""

import array
import io
import math
from collections import UserList, UserString, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image


def _fail(*_: object) -> NoReturn:
    raise RuntimeError("not even this")


fail: Any = _fail


class Hostile:
    """An object none of whose own methods work."""

    __repr__ = __str__ = __index__ = __float__ = __fspath__ = __iter__ = __len__ = fail
    __eq__ = __hash__ = __bool__ = __getitem__ = __getattr__ = fail


class Lying:
    """An object that does not tell its type."""

    __repr__ = fail

    @property
    def __class__(self) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("nor this")


class HostileText(str):
    """A string that can only be used as what it is."""

    __str__ = __repr__ = __eq__ = __hash__ = __len__ = __iter__ = fail


class HostileInt(int):
    """An integer that can only be used as what it is."""

    __str__ = __repr__ = __eq__ = __lt__ = __le__ = __int__ = __hash__ = fail


class HostileList(list[Any]):
    """A list of unknown length."""

    __len__ = __iter__ = fail


class HostileNumber:
    """An array of one number that does not give it."""

    ndim, item = 0, fail


class Endless(UserList[Any]):
    """A list that says that it has an entry, and has no end."""

    def __iter__(self) -> Iterator[Any]:
        return count()


class PathInBytes:
    def __fspath__(self) -> bytes:
        return b"x"


class Size(StrEnum):
    NANO = "nano"


class Anything:
    """A function of anything."""

    def __init__(self, *_: object) -> None:
        """Do nothing."""


def recursive() -> list[Any]:
    own: list[Any] = []
    own.append(own)
    return own


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


def _same(*values: Any) -> dict[str, Callable[[], Any]]:
    return {f"{type(v).__name__} {ascii(v)[:40]}": lambda v=v: v for v in values}


NUMBERS: dict[str, Callable[[], Any]] = {
    **_same(0, 1, 2, 3, 89, -1, 2**31, 2**63, 2**70, 0.5, -0.0, 1e-310, 1e300, math.nan, math.inf),
    **_same(True, False, 1j, Decimal(1), Decimal("sNaN"), Fraction(1, 3)),
    **_same(
        np.int8(1), np.uint64(1), np.float16(1), np.longdouble(1), np.bool_(1), np.complex64(1)
    ),
    **_same(np.array(1), np.array(0.5), np.array(True), np.array("x"), np.array(None)),
    **_same(np.datetime64("2020-01-01"), torch.tensor(2), torch.tensor(0.5, dtype=torch.bfloat16)),
    "a long integer": lambda: 10**5000,
    "a hostile integer": lambda: HostileInt(2),
    "a gradient": lambda: torch.tensor(1.0, requires_grad=True),
    "no number": lambda: torch.empty((), device="meta"),
    "a hostile number": HostileNumber,
}
TEXTS: dict[str, Callable[[], Any]] = {
    **_same("", " ", "red", "nano", "cpu", "2b", "l" * 300, "fp16", "tensorrt", "tensorrt-rtx"),
    **_same("onnxruntime", "1:1", "0:0", "sm89", "external", "a\0b", "\ud800", "\udc80", "\x1b[2J"),
    **_same("\ufeff", "\u200b", "▁", "/", ".", "..", "/dev/null", "/proc/self/mem"),
    **_same(np.str_("red"), UserString("red"), Size.NANO, Path("x"), Path("a\0b"), Path("l" * 300)),
    **_same("l" * 300 + "/x.png", "a/" * 3000),
    **_same(b"", b"red", b"\x89PNG", bytearray(b"x"), memoryview(b"red"), PathInBytes()),
    "a hostile text": lambda: HostileText("red"),
    "a long text": lambda: "l" * 10**6,
}
OBJECTS: dict[str, Callable[[], Any]] = {
    **_same(None, Anything, Anything(), Ellipsis, NotImplemented, io, slice(3), object()),
    **_same(range(0), range(4), range(10**9), range(10**30), {0: 1}, {1.0}, [], [1], ["red"], ()),
    **_same(np.zeros((2, 2, 3), np.uint8), np.zeros((1, 1)), np.zeros(0), torch.zeros(3, 2, 2)),
    **_same(np.broadcast_to(np.float32(1), 10**12), array.array("i", [1]), Exception()),
    "a hostile object": Hostile,
    "a lying object": Lying,
    "a recursive list": recursive,
    "a closed file": closed,
    "a text file": lambda: io.StringIO("x"),
    "a binary file": lambda: io.BytesIO(b"x"),
    "a picture": lambda: Image.new("RGB", (2, 2)),
    "an endless generator": count,
    "an empty generator": lambda: iter(()),
    "a hostile list": lambda: HostileList([1]),
    "an endless list": lambda: Endless([1]),
    "a long list": lambda: [0] * 10**6,
}
NAMED = NUMBERS | TEXTS | OBJECTS


def junk(random: Random) -> Any:
    """Return any value, or a list of some."""
    pool = list(random.choice([NUMBERS, TEXTS, NAMED]).values())
    if random.random() < 0.5:
        return random.choice(pool)()
    kind = random.choice([list, tuple, deque, UserList, iter])
    return kind([random.choice(pool)() for _ in range(random.randrange(4))])

"""Messages of errors: one printable line of bounded length, whatever they quote."""

import pickle
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from varedit_runtime.backends.spec import report_line
from varedit_runtime.errors import (
    LONGEST,
    ConfigError,
    VareditError,
    one_line,
    readable_size,
    reason,
    shown,
)
from varedit_runtime.pictures import open_picture


def well_formed(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST


class Hostile:
    """An object none of whose own methods work."""

    def fail(self, *_: object) -> Any:
        raise RuntimeError("not even this")

    __repr__ = __str__ = __index__ = __iter__ = __len__ = __fspath__ = __float__ = fail


def test_a_long_message_keeps_its_start_and_the_advice_at_its_end() -> None:
    told = str(ConfigError(f"image is {'x' * 4_000_000}; give a path"))
    assert well_formed(told) and len(told) > LONGEST / 2
    assert told.startswith("image is xxx") and told.endswith("xxx; give a path")


def test_a_picture_given_as_a_data_url_gives_a_short_error() -> None:
    with pytest.raises(
        VareditError, match=r"^data:image/png;base64,AAA.*A cannot be read: "
    ) as told:
        open_picture("data:image/png;base64," + "A" * 4_000_000)
    assert well_formed(str(told.value))


@pytest.mark.parametrize(
    "text", ["a\x1b[31mb", "a\u202eb", "a\udcffb", "a\0b", "a\u2028b", "a\r\nb"]
)
def test_what_a_terminal_would_obey_is_escaped_in_all_that_an_error_shows(text: str) -> None:
    error = ConfigError(text)
    assert well_formed(str(error)) and well_formed(repr(error))
    assert well_formed(one_line(ValueError(text))) and well_formed(report_line("name", text))


def test_an_error_can_be_sent_to_another_process() -> None:
    error = ConfigError("\x1b" + "x" * 5000 + "\n")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ConfigError and str(copy) == str(error)


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 10**6, "'xxx"),
        (b"x" * 10**6, "b'xxx"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
        (range(10**9), "range(0, 1000000000)"),
        (np.zeros((1000, 1000)), "array([[0., 0."),
        (10**5000, "of type int"),
        (Hostile(), "<Hostile instance at "),
        ([Hostile()], "[<Hostile instance at "),
        (0.5, "0.5"),
        ("square", "'square'"),
    ],
    ids=range(10),
)
def test_a_value_is_shown_in_short(value: object, start: str) -> None:
    assert shown(value).startswith(start) and len(shown(value)) <= 80


def test_an_error_without_a_text_is_named_by_its_type() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert one_line(Silent()) == "Silent" and reason(ValueError()) == "ValueError"


def test_fuzz_any_text_gives_a_well_formed_message(
    cases: Callable[[int], Iterator[Random]],
) -> None:
    pieces = ["\n", "\x1b]0;x\a", "\u200b", "\udc80", "\U000e0001", "\x85", "é", "'", "\\", " "]
    for random in cases(300):
        text = "".join(random.choices(pieces, k=random.choice([0, 1, 30, LONGEST, 10_000])))
        told = str(VareditError(text))
        assert well_formed(told) and well_formed(shown(text))
        assert str(VareditError(told)) == told


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (15_100, "15.1 kB"),
        (450 * 10**6, "450 MB"),
        (16_940_000_000, "16.9 GB"),
        (2**60, "1152921505 GB"),
    ],
)
def test_sizes_of_any_magnitude_can_be_read(count: int, said: str) -> None:
    assert readable_size(count) == said

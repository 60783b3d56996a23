"""Callers' values: of every type that is asked for, and numbers once or per scale."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from varedit_runtime.errors import ConfigError
from varedit_runtime.values import AnyPath, checked, per_scale, temperature_per_scale


def test_a_number_serves_all_scales_and_a_list_must_fit() -> None:
    assert per_scale(2, 3, "guidance_scale") == (2.0, 2.0, 2.0)
    assert per_scale([1, 2.5], 2, "guidance_scale") == (1, 2.5)
    with pytest.raises(ConfigError, match=r"temperature has 2 values.*3"):
        per_scale([1, 2], 3, "temperature")
    with pytest.raises(ConfigError, match=r"guidance_scale is nan; it must be finite"):
        per_scale(float("nan"), 3, "guidance_scale")


@pytest.mark.parametrize("value", [0, -0.5, [0.5, 0.0]])
def test_a_temperature_must_be_over_zero(value: float | list[float]) -> None:
    with pytest.raises(ConfigError, match="over 0"):
        temperature_per_scale(value, 2)
    assert temperature_per_scale([0.1, 2], 2) == (0.1, 2.0)


def test_arrays_are_numbers_too() -> None:
    half, both = np.float32(0.5), np.array([1, 2])
    assert per_scale(half, 2, "temperature") == (0.5, 0.5)  # type: ignore[arg-type]
    assert per_scale(both, 2, "temperature") == (1.0, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["3", None, ["3", 4], [10**5000, "3"], 1j])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"guidance_scale is .*; give a number, or one for each"):
        per_scale(value, 2, "guidance_scale")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [10**400, -(10**400), [1, 10**5000]])
def test_what_is_too_large_for_a_float_is_not_finite(value: int | list[int]) -> None:
    with pytest.raises(ConfigError, match="guidance_scale is inf; it must be finite"):
        per_scale(value, 2, "guidance_scale")
    with pytest.raises(ConfigError, match="temperature is inf; it must be finite"):
        temperature_per_scale(value, 2)


def test_what_single_precision_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be finite"):
        per_scale([1.0, -1e39], 2, "guidance_scale")
    with pytest.raises(ConfigError, match="over 0"):
        temperature_per_scale(1e-46, 2)


@pytest.mark.parametrize(
    ("hint", "value", "plain"),
    [
        (int, np.int64(3), 3),
        (int, np.array(3), 3),
        (int | None, torch.tensor(3), 3),
        (float, np.array(0.5), 0.5),
        (float, torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (float, 2, 2.0),
        (bool, np.True_, True),
        (str | None, np.str_("x"), "x"),
        (str | None, None, None),
        (Literal["a", "b"], "b", "b"),
        (AnyPath, "hf://owner/model", "hf://owner/model"),
        (AnyPath | None, Path("x"), "x"),
        (tuple[int, ...], np.array([1, 2]), (1, 2)),
        (tuple[int, ...], torch.tensor([1, 2]), (1, 2)),
        (tuple[int, ...], range(3), (0, 1, 2)),
        (Callable, print, print),
        (Path | bool, Path("x"), Path("x")),
    ],
    ids=str,
)
def test_a_value_is_converted_as_its_annotation_says(
    hint: object, value: object, plain: object
) -> None:
    found = checked("it", value, hint)
    assert found == plain and type(found) is type(plain)


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int | None, True, "an integer or None"),
        (int, 1.0, "an integer"),
        (int, np.zeros(1), "an integer"),
        (float, "1", "a number"),
        (float, np.complex64(1), "a number"),
        (bool, 1, "True or False"),
        (str, b"x", "a string"),
        (Literal["a", "b"], "c", "one of a, b"),
        (Literal["a", "b"], [], "one of a, b"),
        (AnyPath | None, b"x", "a path or None"),
        (AnyPath, "", "a path"),
        (AnyPath, "a\0b", "a path"),
        (AnyPath, "\ud800", "a path"),
        (tuple[str, ...], "sm89", r"a list \(a string each\)"),
        (tuple[str, ...], ["sm89", 89], "a string"),
        (tuple[int, ...], range(10**9), "a list of at most 10000"),
        (tuple[int, ...], itertools.count(), r"a list \(an integer each\)"),
        (Callable, 3, "a function"),
        (Path, "x", "Path"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused(hint: object, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"^it is .*; give {wanted}$"):
        checked("it", value, hint)

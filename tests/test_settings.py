"""Numbers given once, or once per scale."""

import numpy as np
import pytest

from varedit_runtime.errors import ConfigError
from varedit_runtime.settings import per_scale, temperature_per_scale


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

"""The public functions of `varedit_export`: what a program that imports them gets."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from bundles import small_bundle

import varedit_export
from varedit_engines.publish import Staging
from varedit_export import BuildOptions, EngineOptions, VerifyOptions
from varedit_runtime.errors import BundleError, ConfigError


def test_verifying_is_silent_and_gives_all_measures(capfd: pytest.CaptureFixture[str]) -> None:
    told = []
    lines = varedit_export.verify(small_bundle(), measured=told.append)
    assert lines == told and len(lines) > 4
    assert capfd.readouterr() == ("", "")


def test_options_are_checked_before_anything_is_done() -> None:
    with pytest.raises(ConfigError, match="all are compared"):
        varedit_export.verify("nowhere", VerifyOptions(variant="512-b1"))
    with pytest.raises(ConfigError, match="give both --size and --res"):
        varedit_export.build(BuildOptions())
    with pytest.raises(ConfigError, match="only tensorrt-rtx compiles for named architectures"):
        varedit_export.compile_engines("nowhere", EngineOptions(architectures=("sm89",)))
    with pytest.raises(BundleError, match="nowhere"):
        varedit_export.verify("nowhere")


def test_options_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        BuildOptions().size = "2b"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_door_names_what_it_offers() -> None:
    assert [name for name in varedit_export.__all__ if not hasattr(varedit_export, name)] == []


@pytest.mark.parametrize("name", ("no\nwhere", "no\x1b[31mwhere", "no\udcffwhere"))
def test_an_error_is_one_printable_line(name: str) -> None:
    with pytest.raises(BundleError, match=r"no.*where") as told:
        varedit_export.verify(name)
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 3),
        ("resolutions", 256),
        ("resolutions", (256.0,)),
        ("aspect", ["1:1"]),
        ("precision", None),
        ("batch", "1"),
        ("text_tokens", 4.5),
        ("guided", "no"),
        ("random_weights", True),
        ("output", b"bundle"),
    ],
)
def test_options_of_a_wrong_type_are_named(option: str, value: object) -> None:
    given = {"size": "tiny-2b", "resolutions": (256,), "random_weights": 0, option: value}
    with pytest.raises(ConfigError, match=f"{option} is .*; give "):
        varedit_export.build(BuildOptions(**given))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "flags", ({"optimisation": 6}, {"optimisation": "3"}, {"workspace": 0}, {"workspace": 1.5})
)
def test_a_compilers_numbers_are_checked(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(flags))} is "):
        EngineOptions("tensorrt-rtx", architectures=("sm89",), **flags).compiler()


@pytest.mark.parametrize("path", (None, 3, [], b"x", "a\0b"))
def test_what_is_no_path_is_no_bundle(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"bundle is .*; give Bundle or a path"):
        varedit_export.verify(path)
    with pytest.raises(BundleError, match="cannot be written"):
        Staging("a\0b")


def test_a_folder_that_no_system_can_make_is_refused(tmp_path: Path) -> None:
    asked = {"size": "tiny-2b", "resolutions": (256,), "random_weights": 0}
    with pytest.raises(BundleError, match=r"l cannot be written: File name too long$"):
        varedit_export.build(BuildOptions(**asked, output=tmp_path / ("l" * 300)))

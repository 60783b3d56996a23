"""Which bundle is used, and where bundles are kept."""

import os
from pathlib import Path

import pytest

from varedit_runtime import locate
from varedit_runtime.bundle import set_aside
from varedit_runtime.errors import BundleError
from varedit_runtime.locate import VARIABLE, Found, default_root, find_bundle, remember
from varedit_runtime.manifest import MANIFEST


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Become a user who has never built anything, with an embedded nano."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(locate, "user_data_path", lambda app: tmp_path / "data" / app)
    monkeypatch.setattr(locate, "embedded", lambda: tmp_path / "nano")
    return tmp_path


def bundle(home: Path, name: str = "bundle") -> Path:
    (home / name).mkdir()
    return home / name


def test_bundles_are_kept_with_the_users_data(home: Path):
    assert default_root() == home / "data" / "varedit-export" / "bundles"
    assert not default_root().exists()


def test_each_place_is_asked_before_the_next(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_bundle(None).path == home / "nano"
    remember(bundle(home))
    assert find_bundle(None) == Found(home / "bundle", "the last one built")
    monkeypatch.setenv(VARIABLE, "elsewhere")
    assert find_bundle(None) == Found(
        Path("elsewhere"), f"named by the environment variable {VARIABLE}"
    )
    assert find_bundle(Path("mine")) == Found(Path("mine"), "named by --bundle")
    monkeypatch.setenv(VARIABLE, "")
    assert find_bundle(None).path == home / "bundle"


def test_what_is_named_is_used_even_where_nothing_is(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, str(home / "missing"))
    assert find_bundle(None).path == home / "missing"
    assert find_bundle(home / "gone").path == home / "gone"


def test_falling_back_to_nano_is_explained(home: Path):
    nano = "the embedded nano, a small demonstration model for drawn scenes, as"
    assert find_bundle(None).why == f"{nano} no bundle was named or built"
    remember(bundle(home))
    (home / "bundle").rmdir()
    gone = f"the last one built, {home / 'bundle'}, is gone"
    assert find_bundle(None) == Found(home / "nano", f"{nano} {gone}")


def test_the_last_one_built_is_the_last_one_built(home: Path, monkeypatch: pytest.MonkeyPatch):
    remember(bundle(home, "first"))
    monkeypatch.chdir(bundle(home, "ümläut and\nline"))
    remember(Path("."))
    monkeypatch.chdir(home)
    assert find_bundle(None).path == home / "ümläut and\nline"
    assert [path.name for path in default_root().parent.iterdir()] == ["last-built"]


def test_a_name_that_is_no_text_is_remembered(home: Path):
    name = os.fsdecode(b"\xff")
    remember(bundle(home, name))
    assert find_bundle(None).path == home / name


def test_a_bundle_whose_replacement_was_cut_short_is_not_gone(home: Path):
    remember(bundle(home))
    aside = set_aside(home / "bundle")
    aside.parent.mkdir()
    (home / "bundle").rename(aside)
    (aside / MANIFEST).touch()
    assert find_bundle(None).path == home / "bundle"


@pytest.mark.parametrize("record", [b"", b"\0", b"not/there"])
def test_a_damaged_record_is_no_bundle(home: Path, record: bytes):
    remember(bundle(home))
    (default_root().parent / "last-built").write_bytes(record)
    assert find_bundle(None).path == home / "nano"


def test_a_record_that_cannot_be_written_says_how_else_to_name_the_bundle(home: Path):
    (home / "data").touch()
    with pytest.raises(BundleError, match=rf"Not a directory.*--bundle or {VARIABLE}"):
        remember(bundle(home))
    assert find_bundle(None).path == home / "nano"


def test_an_unfit_bundle_does_not_become_the_default_nor_stays_it(home: Path):
    remember(bundle(home, "real"))
    said = r"random does not become .* default \(its weights are random\): name it with --bundle"
    with pytest.raises(BundleError, match=said):
        remember(bundle(home, "random"), "its weights are random")
    assert find_bundle(None).path == home / "real"
    with pytest.raises(BundleError, match="it has no text encoder"):
        remember(home / "real", "it has no text encoder")
    assert find_bundle(None).path == home / "nano"


def test_the_packages_own_folders_are_used_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert default_root().name == "bundles" and default_root().is_absolute()
    assert locate.cache_folder() != locate.data_folder()

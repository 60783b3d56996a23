"""Which bundle is used, how bundles are named, and where they are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_bundles import publish, publish_random, publish_textless

from varedit_runtime import locate
from varedit_runtime.bundle import set_aside
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.locate import (
    RECORD,
    VARIABLE,
    Found,
    choose_default,
    data_folder,
    default_root,
    embedded,
    find_bundle,
    label,
    named,
    own_bundles,
)

NANO = "the embedded nano, a small demonstration model for drawn scenes, as"


pytestmark = pytest.mark.usefixtures("home")


def own(name: str) -> Path:
    return publish(default_root() / name)


# The default


def test_each_place_is_asked_before_the_next(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_bundle(None) == Found(embedded(), f"{NANO} no other was named or chosen")
    choose_default(publish(home / "bundle"))
    assert find_bundle(None) == Found(home / "bundle", "your default")
    monkeypatch.setenv(VARIABLE, "elsewhere")
    assert find_bundle(None) == Found(
        Path("elsewhere"), f"named by the environment variable {VARIABLE}"
    )
    monkeypatch.setenv(VARIABLE, own("mine").name)
    assert find_bundle(None).path == default_root() / "mine"
    assert find_bundle(Path("gone")) == Found(Path("gone"), "named by --bundle")
    monkeypatch.setenv(VARIABLE, "")
    assert find_bundle(None).path == home / "bundle"


def test_choosing_says_how_to_undo_it(home: Path) -> None:
    told = "varedit-run now uses {} by default; undo: varedit-run bundles {}"
    assert choose_default(own("8b-512")) == told.format("8b-512", "--clear")
    elsewhere = publish(home / "el se")
    assert choose_default(elsewhere) == told.format(elsewhere, "--set 8b-512")
    assert choose_default(None) == told.format("nano", f"--set '{elsewhere}'")
    choose_default(elsewhere)
    choose_default(embedded())  # which may be installed elsewhere tomorrow
    assert not (data_folder() / RECORD).exists()


def test_an_undo_is_said_only_where_it_undoes(home: Path) -> None:
    assert choose_default(None) == "nano is varedit-run's default"
    bundle = own("8b-512")
    choose_default(bundle)
    (home / "link").symlink_to(bundle)
    assert choose_default(bundle) == "8b-512 is varedit-run's default"
    assert choose_default(home / "link") == f"{home / 'link'} is varedit-run's default"
    elsewhere = publish(home / "elsewhere")
    choose_default(elsewhere)
    elsewhere.rename(home / "gone")
    assert choose_default(bundle) == "varedit-run now uses 8b-512 by default"
    publish_random(bundle)  # which could not be chosen again
    assert choose_default(None) == "varedit-run now uses nano by default"


def test_the_default_is_the_folder_that_was_meant(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(publish(home / "ümläut and\nline"))
    choose_default(Path("."))
    monkeypatch.chdir(home)
    assert find_bundle(None).path == home / "ümläut and\nline"
    name = publish(home / os.fsdecode(b"\xff"))
    choose_default(name)
    assert find_bundle(None).path == name
    assert [path.name for path in data_folder().iterdir()] == [RECORD]


def test_what_cannot_edit_does_not_become_the_default_nor_stays_it(home: Path) -> None:
    choose_default(publish(home / "real"))
    for make, why in ((publish_random, "its weights are random"), (publish_textless, "it has no")):
        with pytest.raises(BundleError, match=rf"cannot become varedit-run's default, {why}"):
            choose_default(make(home / make.__name__))
        with pytest.raises(BundleError, match="there is no bundle at"):
            choose_default(home / "missing")
        assert find_bundle(None).path == home / "real"
        make(home / "real")
        with pytest.raises(
            BundleError, match=rf"default bundle, .*real, is unfit .*{why}.*--clear"
        ):
            find_bundle(None)
        publish(home / "real")


def test_a_default_that_is_gone_is_not_replaced_by_another_model(home: Path) -> None:
    choose_default(publish(home / "bundle"))
    aside = set_aside(home / "bundle")
    aside.parent.mkdir(exist_ok=True)
    (home / "bundle").rename(aside)  # as when replacing it was cut short
    assert find_bundle(None).path == home / "bundle"
    aside.rename(home / "elsewhere")
    with pytest.raises(BundleError, match=r"default bundle, .*bundle, is gone: .*bundles --set"):
        find_bundle(None)
    choose_default(None)
    assert find_bundle(None).path == embedded()


@pytest.mark.parametrize("damage", [b"", b"\0", b"/a\0b", b"not/absolute"])
def test_of_a_damaged_record_no_other_model_is_taken(home: Path, damage: bytes) -> None:
    bundle = publish(home / "bundle")
    record = data_folder() / RECORD
    for chosen, name in ((bundle, str(bundle)), (None, "nano")):
        choose_default(bundle)
        record.write_bytes(damage)
        with pytest.raises(BundleError, match=rf"{record}, is damaged: .*--set NAME.*--clear"):
            find_bundle(None)
        assert find_bundle(bundle).path == bundle
        # What it was is not known, so nothing is said to restore it.
        assert choose_default(chosen) == f"varedit-run now uses {name} by default"
        assert find_bundle(None).path == (chosen or embedded())
    record.mkdir()
    with pytest.raises(BundleError, match=rf"cannot be read \(Is a dir.*--bundle or {VARIABLE}"):
        find_bundle(None)


def test_a_record_that_cannot_be_written_says_how_else_to_name_bundles(home: Path) -> None:
    (home / "data").touch()
    with pytest.raises(BundleError, match=rf"Not a directory.*--bundle or {VARIABLE}"):
        choose_default(publish(home / "bundle"))
    assert find_bundle(None).path == embedded()


CHOOSE = """
import sys
from pathlib import Path
from varedit_runtime.locate import choose_default

for _ in range(50):
    choose_default(Path(sys.argv[1]))
"""


def test_two_programs_may_choose_at_once(home: Path) -> None:
    paths = [publish(home / name) for name in ("one", "the other one")]
    choose_default(paths[0])
    chosen = [subprocess.Popen([sys.executable, "-c", CHOOSE, path]) for path in paths]
    seen = set[Path]()
    while any(process.poll() is None for process in chosen):
        seen.add(find_bundle(None).path)
    assert [process.returncode for process in chosen] == [0, 0]
    assert seen <= set(paths)
    assert [path.name for path in data_folder().iterdir()] == [RECORD]


# Names


def test_nano_is_always_the_embedded_one() -> None:
    own("nano")
    publish(Path("nano"))
    assert named("nano") == embedded() and label(embedded()) == "nano"
    assert named("./nano") == Path("nano")
    assert named(label(default_root() / "nano")) == default_root() / "nano"


def test_a_name_is_one_of_the_users_own_bundles_or_else_a_path(home: Path) -> None:
    mine = own("8b-512")
    assert named("8b-512") == mine and label(mine) == "8b-512"
    for path in ("./8b-512", "8b-512/", "..", ".", "missing", str(mine), ".8b-512.partial", "a\0"):
        assert named(path) == Path(path)
    Path("8b-512").mkdir()  # any folder
    assert named("8b-512") == mine
    Path("8b-512").rmdir()
    publish(Path("8b-512"))
    with pytest.raises(ConfigError, match=r"8b-512 is one of your bundles and .* write \./8b-512 "):
        named("8b-512")
    assert named("./8b-512") == Path("8b-512") and named(str(mine)) == mine


def test_in_their_own_folder_names_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = own("8b-512")
    monkeypatch.chdir(default_root())
    assert named("8b-512") == mine


def test_own_bundles_are_those_that_stand() -> None:
    assert own_bundles() == []
    two, one = own("two"), own("one")
    (default_root() / "no bundle").mkdir()
    (default_root() / "file").touch()
    aside = set_aside(two)
    aside.parent.mkdir(exist_ok=True)
    two.rename(aside)
    assert own_bundles() == [one, two]
    assert named("two") == two


# Folders


HOMELESS = """
import os
os.getuid = lambda: 4242  # a user whom the system does not know
from varedit_runtime.locate import cache_folder, data_folder
print(data_folder())
print(cache_folder())
"""


def test_a_user_without_a_home_has_folders_below_the_root(home: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HOME" and not k.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["/.varedit-export/data", "/.varedit-export/cache"]
    assert list((home / "here").iterdir()) == []


def test_nothing_is_made_before_it_is_needed(home: Path) -> None:
    assert default_root() == home / "data" / "varedit-export" / "bundles"
    find_bundle(None)
    own_bundles()
    assert not (home / "data").exists()
    assert locate.cache_folder() != data_folder()

"""Publishing bundles: whole or not at all, whatever happens on the way."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from disks import file_size_limit
from fake_bundles import FILES, content, manifest, publish, write_files
from killing import FORKS, killed_at

from varedit_engines.publish import Staging
from varedit_runtime.bundle import Bundle, work_folder
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import MANIFEST

TESTS = Path(__file__).parent
NAME, OTHER = FILES[1], FILES[2]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "bundles" / "name"


def seed_of(folder: Path) -> int:
    """Return the seed of a bundle, checking all of its bytes."""
    bundle = Bundle.open(folder)
    bundle.verify()
    seed = int(bundle.manifest.model.weights.split()[-1])
    held = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*.*")}
    assert held == {*FILES, MANIFEST, "manifest.sha256"}
    assert all((bundle.path / name).read_bytes() == content(name, seed) for name in FILES)
    return seed


def neighbours(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


# Whole


def test_what_is_published_is_a_bundle_and_nothing_else_stays(target: Path):
    with Staging(target) as staging:
        write_files(staging)
        assert not target.exists() and not Path(staging.path).is_relative_to(target)
        digest = staging.publish(manifest(staging.files))
    assert Bundle.open(target).digest == digest
    assert seed_of(target) == 0
    assert neighbours(target) == {"name", ".name.lock"}


def test_equal_bundles_have_equal_digests(tmp_path: Path):
    assert Bundle.open(publish(tmp_path / "a")) != Bundle.open(publish(tmp_path / "b", seed=1))
    assert Bundle.open(tmp_path / "a").digest == Bundle.open(publish(tmp_path / "c")).digest


def test_a_newer_bundle_takes_the_place_of_the_earlier_one_at_the_end(target: Path):
    publish(target)
    with Staging(target) as staging:
        write_files(staging, seed=1)
        assert seed_of(target) == 0
        staging.publish(manifest(staging.files, seed=1))
    assert seed_of(target) == 1
    assert neighbours(target) == {"name", ".name.lock"}


def test_a_target_behind_a_link_is_replaced_where_it_is(target: Path, tmp_path: Path):
    publish(target)
    (tmp_path / "link").symlink_to(target)
    publish(tmp_path / "link", seed=1)
    assert (tmp_path / "link").is_symlink() and seed_of(target) == 1


@pytest.mark.parametrize("planted", ["", "folder", "previous", "folder/graphs"])
def test_nothing_is_written_or_deleted_through_a_planted_link(
    target: Path, tmp_path: Path, planted: str
):
    mine = tmp_path / "mine"
    (mine / "graphs").mkdir(parents=True)
    (mine / "graphs" / "kept.txt").write_text("mine")
    link = work_folder(target) / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    with pytest.raises(BundleError, match="is a link"):
        publish(target)
    assert [path.name for path in mine.rglob("*")] == ["graphs", "kept.txt"]


def test_everything_is_on_the_disk_before_it_is_renamed(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: set[int] = set()
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def check(path: Path, place: Path) -> Path:
        if place == target:
            whole = [path, *path.rglob("*")]
            assert len(whole) == len(FILES) + 5
            assert {p.stat().st_ino for p in whole} <= flushed
        return rename(path, place)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    publish(target)
    assert target.parent.stat().st_ino in flushed


# Refused


@pytest.mark.parametrize("earlier", [True, False])
def test_without_publishing_there_is_no_bundle(target: Path, earlier: bool):
    if earlier:
        publish(target)
    with Staging(target) as staging:
        write_files(staging, seed=1)
    with pytest.raises(KeyboardInterrupt), Staging(target) as staging:
        write_files(staging, seed=1)
        raise KeyboardInterrupt
    if earlier:
        assert seed_of(target) == 0
    else:
        assert not target.exists()


def test_an_invalid_manifest_is_not_published(target: Path):
    publish(target)
    with Staging(target) as staging:
        write_files(staging, seed=1)
        del staging.files["tokenizer.json"]
        with pytest.raises(ValueError, match=r"tokenizer\.json is not in files"):
            manifest(staging.files)
        staging.record("tokenizer.json")
        damaged = manifest(staging.files)
        damaged.files["../x"] = staging.files["../x"] = staging.files["tokenizer.json"]
        with pytest.raises(BundleError, match=r"'\.\./x' is not the plain, relative path"):
            staging.publish(damaged)
    assert seed_of(target) == 0


def test_a_manifest_must_list_what_was_recorded(target: Path):
    with Staging(target) as staging:
        write_files(staging)
        listed = dict(staging.files)
        staging.file(NAME).write_bytes(b"changed")
        staging.record(NAME)
        with pytest.raises(BundleError, match=f"recorded: {NAME}$"):
            staging.publish(manifest(listed))
        listed = dict(staging.files)
        staging.file("graphs/more.onnx").touch()
        staging.record("graphs/more.onnx")
        with pytest.raises(BundleError, match=r"recorded: graphs/more\.onnx$"):
            staging.publish(manifest(listed))
    assert not target.exists()


def test_a_file_that_changed_after_it_was_recorded_is_not_published(target: Path):
    with Staging(target) as staging:
        write_files(staging)
        staging.file(NAME).write_bytes(b"shorter")
        with pytest.raises(BundleError, match="damaged"):
            staging.publish(manifest(staging.files))
    assert not target.exists()


def test_a_folder_that_is_no_bundle_is_never_replaced(target: Path):
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle, so it is not replaced"):
        publish(target)
    assert neighbours(target) == {"name", ".name.lock"}
    (target / "thesis.txt").unlink()
    with Staging(target) as staging:
        write_files(staging)
        (target / "thesis.txt").write_text("years of work")
        with pytest.raises(BundleError, match="is not a bundle, so it is not replaced"):
            staging.publish(manifest(staging.files))
    assert (target / "thesis.txt").read_text() == "years of work"


def test_files_of_others_in_a_bundle_are_not_deleted_with_it(target: Path):
    publish(target)
    for name in ("edited.png", "graphs/notes.txt"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")
        with pytest.raises(BundleError, match=f"{name} is no file of the bundle"):
            publish(target, seed=1)
        assert (target / name).read_text() == "mine"
        (target / name).unlink()
        assert seed_of(target) == 0
    publish(target, seed=1)
    assert seed_of(target) == 1


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="Not a directory"):
        publish(tmp_path / "file")
    with pytest.raises(BundleError, match="cannot be written"):
        publish(tmp_path / "file" / "name")
    with pytest.raises(BundleError, match="is not a bundle"):
        publish(Path("/"))


# Resuming


def build(target: Path, keys: dict[str, str]) -> list[str]:
    """Start a build of two files and interrupt it; return those that were made."""
    made = []
    with Staging(target) as staging:
        for name, key in keys.items():
            if staging.kept(name, key):
                assert staging.files[name].size == len(content(name))
            else:
                assert not staging.file(name).exists()
                staging.file(name).write_bytes(content(name))
                staging.record(name, key)
                made.append(name)
    return made


def test_finished_files_are_kept_when_they_are_made_from_the_same(target: Path):
    assert build(target, {NAME: "a", OTHER: "b"}) == [NAME, OTHER]
    assert build(target, {NAME: "a", OTHER: "b"}) == []
    assert build(target, {NAME: "a", OTHER: "new"}) == [OTHER]
    assert build(target, {NAME: "a", OTHER: "new"}) == []
    assert build(target, {NAME: "new", OTHER: "new"}) == [NAME]


@pytest.mark.parametrize("damage", [b"", b"x", content(NAME)[:-1] + b"x", content(NAME) + b"x"])
def test_a_damaged_file_is_made_again(target: Path, damage: bytes):
    build(target, {NAME: "a", OTHER: "b"})
    (work_folder(target) / "folder" / NAME).write_bytes(damage)
    assert build(target, {NAME: "a", OTHER: "b"}) == [NAME]


def test_a_missing_or_unfinished_file_is_made_again(target: Path):
    build(target, {NAME: "a"})
    (work_folder(target) / "folder" / NAME).unlink()
    with Staging(target) as staging:
        staging.file(OTHER).write_bytes(content(OTHER))
    assert build(target, {NAME: "a", OTHER: "b"}) == [NAME, OTHER]


def test_a_file_recorded_without_a_key_is_made_again(target: Path):
    with Staging(target) as staging:
        staging.file(NAME).write_bytes(content(NAME))
        staging.record(NAME)
    assert build(target, {NAME: ""}) == [NAME]


@pytest.mark.parametrize("journal", [b"", b"{", b"[]", b"\xff", b'{"graphs/64.scale.onnx":1}'])
def test_a_damaged_journal_costs_time_only(target: Path, journal: bytes):
    build(target, {NAME: "a"})
    (work_folder(target) / "journal.json").write_bytes(journal)
    assert build(target, {NAME: "a"}) == [NAME]


def test_what_an_earlier_attempt_left_is_not_published(target: Path):
    with Staging(target) as staging:
        for name in ("graphs/old.onnx", "graphs/deep/er/x", "old/x", MANIFEST):
            staging.file(name).write_bytes(b"old")
            staging.record(name, "key")
    publish(target)
    assert {path.name for path in target.iterdir() if path.is_dir()} == {"graphs"}
    assert seed_of(target) == 0


# No space


@pytest.mark.parametrize("size", [100, 1000])
def test_a_full_disk_publishes_nothing_and_keeps_what_is_finished(target: Path, size: int):
    """At 100 bytes no file fits, at 1000 all except the manifest."""
    publish(target)
    with (
        file_size_limit(size),
        pytest.raises(BundleError, match="no space is left; free some"),
        Staging(target) as staging,
    ):
        write_files(staging, seed=1)
        staging.publish(manifest(staging.files, seed=1))
    assert seed_of(target) == 0
    publish(target, seed=1)
    assert seed_of(target) == 1


def test_a_disk_that_is_full_for_what_others_write_is_the_same_error(target: Path):
    with pytest.raises(BundleError, match="no space is left"), Staging(target):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(FileNotFoundError), Staging(target):
        (target / "missing").read_bytes()


def test_a_disk_that_fills_up_while_flushing_publishes_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    publish(target)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="no space is left"):
        publish(target, seed=1)
    assert seed_of(target) == 0


def test_a_failing_rename_puts_the_earlier_bundle_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    rename = Path.rename

    def failing(path: Path, place: Path) -> Path:
        if path.name == "folder":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, place)

    publish(target)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError, match="Input/output error"):
        publish(target, seed=1)
    assert target.exists() and seed_of(target) == 0


def test_an_earlier_bundle_that_was_being_deleted_is_not_put_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(path: Path, ignore_errors: bool) -> None:
        (path / NAME).unlink()
        raise KeyboardInterrupt

    publish(target)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", interrupted)
        publish(target, seed=1)
    assert seed_of(target) == 1
    shutil.rmtree(target)
    with Staging(target):
        assert not target.exists()


# Killed


@pytest.mark.usefixtures("no_flushing")
@FORKS
def test_a_first_build_killed_anywhere_leaves_no_bundle_or_a_whole_one(tmp_path: Path):
    outcomes, step, killed = set(), 0, True
    while killed:
        target = tmp_path / str(step) / "name"
        killed = killed_at(step, partial(publish, target))
        outcomes.add(seed_of(target) if target.exists() else None)
        publish(target, seed=1)
        assert seed_of(target) == 1
        assert neighbours(target) == {"name", ".name.lock"}
        step += 5
    assert outcomes == {None, 0}
    assert step > 80


@pytest.mark.usefixtures("no_flushing")
@FORKS
def test_replacing_a_bundle_killed_anywhere_leaves_the_earlier_or_the_newer(target: Path):
    """Every attempt starts from what the previous one left."""
    publish(target, seed=0)
    outcomes, step, killed = set(), 60, True  # until then it writes files, as a first build does
    while killed:
        earlier, newer = seed_of(target), step + 1
        killed = killed_at(step, partial(publish, target, seed=newer))
        found = seed_of(target)
        assert found in (earlier, newer)
        outcomes.add((found == newer, target.exists()))
        step += 1
    assert outcomes == {(False, True), (False, False), (True, True)}
    assert neighbours(target) == {"name", ".name.lock"}


ENDLESSLY = """if True:
    import sys
    from pathlib import Path
    from fake_bundles import publish
    from varedit_runtime.errors import BundleError
    seed = int(sys.argv[2])
    while True:
        try:
            publish(Path(sys.argv[1]), seed)
        except BundleError as error:
            assert "being built by another process" in str(error)
        else:
            print(seed, flush=True)
            seed += 1
    """


def endless_publisher(target: Path, seed: int) -> subprocess.Popen[str]:
    """Start a process that publishes one bundle after the other, and prints the seed of each."""
    command = [sys.executable, "-c", ENDLESSLY, target, str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS)


def test_killed_at_random_times_the_last_bundle_is_whole(target: Path):
    numbers = random.Random(0)
    seed = 0
    for _ in range(5):
        with endless_publisher(target, seed) as publisher:
            assert publisher.stdout
            publisher.stdout.readline()
            time.sleep(numbers.uniform(0, 0.1))
            publisher.kill()
        found = seed_of(target)
        assert found >= seed
        seed = found + 1


# At once


def test_readers_of_a_bundle_being_replaced_always_see_a_whole_one(target: Path):
    seen: list[str] = []
    with endless_publisher(target, 0) as publisher:
        assert publisher.stdout
        publisher.stdout.readline()
        while len(set(seen)) < 15:
            seen.append(Bundle.open(target).manifest.model.weights)
        publisher.kill()
    seeds = [int(weights.split()[-1]) for weights in seen]
    assert seeds == sorted(seeds)


def test_a_second_builder_is_told_of_the_first(target: Path):
    with Staging(target) as first:
        write_files(first)
        with pytest.raises(BundleError, match="being built by another process"):
            publish(target, seed=1)
        first.publish(manifest(first.files))
    publish(target, seed=1)
    assert seed_of(target) == 1


def test_builders_of_other_bundles_do_not_disturb(tmp_path: Path):
    with Staging(tmp_path / "a") as first, Staging(tmp_path / "b") as second:
        write_files(first, seed=1)
        write_files(second, seed=2)
        second.publish(manifest(second.files, seed=2))
        first.publish(manifest(first.files, seed=1))
    assert (seed_of(tmp_path / "a"), seed_of(tmp_path / "b")) == (1, 2)


def test_two_processes_that_publish_at_once_take_turns(target: Path):
    with endless_publisher(target, 1000) as one, endless_publisher(target, 2000) as other:
        for publisher in (one, other):
            assert publisher.stdout
            for _ in range(10):
                assert publisher.stdout.readline()
        assert one.poll() is None and other.poll() is None
        one.kill()
        other.kill()
    assert seed_of(target) in range(1000, 3000)

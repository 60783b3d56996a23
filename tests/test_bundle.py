"""Opening bundles: whole ones, and everything that can be wrong with one."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_bundles import COMPONENTS, FILES, STAGES, content, publish, rewrite_manifest

from varedit_runtime import bundle as bundle_module
from varedit_runtime.bundle import Bundle, set_aside
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import DIGEST, MANIFEST, MAX_MANIFEST_BYTES


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("bundles") / "whole")


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """Copy the bundle, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "bundle"))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as refused:
        action()
    message = str(refused.value)
    assert message.isprintable()
    return message


def read_everything(folder: Path) -> dict[str, bytes]:
    """Read all of a bundle, checking every byte."""
    bundle = Bundle.open(folder)
    bundle.verify()
    files = {f"graphs/64.{stage}.onnx": bundle.graph_bytes("64", stage) for stage in STAGES}
    weights = {
        f"graphs/weights/{component}.safetensors": bundle.weights_path(component).read_bytes()
        for component in bundle.components
    }
    return {"tokenizer.json": bundle.tokenizer_json(), **files, **weights}


# Whole bundles


def test_a_bundle_gives_back_what_was_published(published: Path):
    assert read_everything(published) == {name: content(name) for name in FILES}
    bundle = Bundle.open(published)
    assert bundle.components == COMPONENTS
    assert bundle.weights_path("transformer").is_relative_to(bundle.graphs_folder)


def test_the_digest_is_the_one_that_sha256sum_checks(published: Path):
    digest = hashlib.sha256((published / MANIFEST).read_bytes()).hexdigest()
    assert Bundle.open(published).digest == digest
    assert (published / DIGEST).read_text() == f"{digest}  manifest.json\n"


def test_a_pinned_digest_admits_no_other_bundle(published: Path, tmp_path: Path):
    digest = Bundle.open(published).digest
    assert Bundle.open(published, digest).digest == digest
    other = publish(tmp_path / "other", seed=1)
    for wrong in (digest, "", "0" * 64, digest[:10]):
        assert "not the one asked for" in refusal(lambda wrong=wrong: Bundle.open(other, wrong))


def test_a_bundle_is_opened_by_a_string_and_through_a_link_to_it(published: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(published)
    assert Bundle.open(str(tmp_path / "link")) == Bundle.open(published)


def test_files_beside_the_listed_ones_do_not_matter(folder: Path):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "engines").mkdir()
    assert read_everything(folder) == {name: content(name) for name in FILES}


def test_what_does_not_exist_is_an_error_that_says_so(published: Path):
    bundle = Bundle.open(published)
    assert "it has 64" in refusal(lambda: bundle.graph_bytes("512", "scale"))
    assert "no graph 'scale_99'" in refusal(lambda: bundle.graph_bytes("64", "scale_99"))
    assert "text.safetensors" in refusal(lambda: bundle.weights_path("text"))


# Damage


@pytest.mark.parametrize("name", [*FILES, MANIFEST, DIGEST])
def test_a_flipped_bit_is_found_in_every_file(folder: Path, name: str):
    numbers = random.Random(name)
    path = folder / name
    whole = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
        path.write_bytes(damaged)
        message = refusal(lambda: read_everything(folder))
        assert str(folder) in message and "damaged" in message
    path.write_bytes(whole)
    read_everything(folder)


@pytest.mark.parametrize("name", [*FILES, MANIFEST, DIGEST])
def test_a_truncated_or_longer_file_is_found_when_the_bundle_is_opened(folder: Path, name: str):
    numbers = random.Random(name)
    path = folder / name
    whole = path.read_bytes()
    for wrong in (b"", *(whole[: numbers.randrange(len(whole))] for _ in range(8)), whole + b"\n"):
        path.write_bytes(wrong)
        assert str(folder) in refusal(lambda: Bundle.open(folder))


@pytest.mark.parametrize("name", [*FILES, MANIFEST, DIGEST])
def test_a_missing_file_is_found_when_the_bundle_is_opened(folder: Path, name: str):
    (folder / name).unlink()
    assert name in refusal(lambda: Bundle.open(folder))


@pytest.mark.parametrize("name", [FILES[1], FILES[-1], MANIFEST, DIGEST])
def test_a_folder_or_pipe_is_no_file(folder: Path, name: str):
    path = folder / name
    path.unlink()
    path.mkdir()
    assert "is not a file" in refusal(lambda: Bundle.open(folder))
    path.rmdir()
    os.mkfifo(path)
    assert "is not a file" in refusal(lambda: Bundle.open(folder))


def test_files_exchanged_for_each_other_are_found(folder: Path):
    for first, second in pairwise(FILES):
        os.replace(folder / first, folder / "x")
        os.replace(folder / second, folder / first)
        os.replace(folder / "x", folder / second)
        refusal(lambda: read_everything(folder))


def test_a_file_that_changes_after_opening_is_found_when_it_is_read(folder: Path):
    bundle = Bundle.open(folder)
    for name in FILES:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes(len(data)))
    for action in (
        lambda: bundle.graph_bytes("64", "scale_00"),
        bundle.tokenizer_json,
        bundle.verify,
    ):
        assert "replaced after the bundle was opened" in refusal(action)
    (folder / FILES[1]).unlink()
    assert "No such file" in refusal(lambda: bundle.graph_bytes("64", STAGES[0]))


def test_a_file_that_grows_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = Bundle.open(folder)
    unchanged = Path.open

    def grown(path: Path, mode: str):
        with unchanged(path, "ab") as file:
            file.write(b"more")
        return unchanged(path, mode)

    monkeypatch.setattr(Path, "open", grown)
    assert "too large" in refusal(lambda: bundle.graph_bytes("64", "scale"))


def test_weights_that_grow_after_opening_are_refused(folder: Path):
    bundle = Bundle.open(folder)
    with (folder / FILES[-1]).open("ab") as file:
        file.write(b"more")
    assert f"{FILES[-1]} is damaged" in refusal(bundle.verify)


def test_files_that_are_read_whole_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundle_module, "MAX_READ_BYTES", 199)
    bundle = Bundle.open(folder)
    for action in (lambda: bundle.graph_bytes("64", "scale"), bundle.tokenizer_json):
        assert "too large: at most 199 bytes" in refusal(action)
    bundle.verify()


# Links


@pytest.mark.parametrize("name", [*FILES, MANIFEST, DIGEST])
def test_a_link_is_refused_even_to_the_right_bytes(folder: Path, tmp_path: Path, name: str):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refusal(lambda: Bundle.open(folder))


@pytest.mark.parametrize("name", ["graphs", "graphs/weights"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_linked_folder_is_refused_on_the_way(folder: Path, name: str, relative: bool):
    (folder / name).rename(folder / "elsewhere")
    target = Path(os.path.relpath(folder / "elsewhere", (folder / name).parent))
    (folder / name).symlink_to(target if relative else folder / "elsewhere")
    assert f"{folder / name} is a link" in refusal(lambda: Bundle.open(folder))


def test_a_link_that_appears_after_opening_is_refused(folder: Path):
    bundle = Bundle.open(folder)
    for name in ("graphs/64.scale.onnx", "graphs/weights/transformer.safetensors"):
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to(folder / "elsewhere")
    assert "is a link" in refusal(lambda: bundle.graph_bytes("64", "scale"))
    assert "is a link" in refusal(lambda: bundle.weights_path("transformer"))
    assert not bundle.stands()


def test_a_link_to_nothing_or_itself_is_no_bundle(tmp_path: Path):
    (tmp_path / "nothing").symlink_to(tmp_path / "missing")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    for name in ("nothing", "itself"):
        refusal(lambda name=name: Bundle.open(tmp_path / name))


# What is no bundle


def test_what_is_no_folder_is_no_bundle(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(lambda: Bundle.open(tmp_path / "file"))
    assert "there is no bundle" in refusal(lambda: Bundle.open(tmp_path / "missing"))
    assert "no manifest.json" in refusal(lambda: Bundle.open(tmp_path))
    assert "no manifest.json" in refusal(lambda: Bundle.open("/"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{}", "schema_version"),
        (b'{"manifest_version": 3, "name": "another program"}', "schema_version"),
        (b'{"schema_version": 3, "new": 1}', "upgrade varedit-export"),
        (b'{"schema_version":1,"name":' + b"[" * 5_000_000, "manifest.json"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "too large"),
    ],
    ids=["empty", "foreign", "newer", "deep", "large"],
)
def test_a_manifest_that_is_none_is_refused_whatever_its_digest(
    folder: Path, data: bytes, said: str
):
    rewrite_manifest(folder, data)
    message = refusal(lambda: Bundle.open(folder))
    assert said in message and str(folder / MANIFEST) in message


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "graphs/../../secret", "..\\secret"])
def test_a_manifest_cannot_name_a_file_outside(folder: Path, path: str):
    (folder.parent / "secret").write_text("secret")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][path] = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    manifest["variants"][0]["graphs"]["scale"]["file"] = path
    rewrite_manifest(folder, json.dumps(manifest).encode())
    assert "relative path" in refusal(lambda: Bundle.open(folder))


@pytest.mark.parametrize(
    "line",
    ["", "{}", "{}\n", "{}  manifest.json", "{} *manifest.json\n", "{}  other.json\n", "\xff"],
)
def test_a_digest_file_of_another_form_is_refused(folder: Path, line: str):
    digest = Bundle.open(folder).digest
    (folder / DIGEST).write_text(line.format(digest), "latin-1")
    assert "manifest.sha256" in refusal(lambda: Bundle.open(folder))


def test_a_digest_file_may_have_the_line_ends_of_windows(folder: Path):
    digest = Bundle.open(folder).digest
    (folder / DIGEST).write_bytes(f"{digest}  manifest.json\r\n".encode())
    assert Bundle.open(folder).digest == digest


# While it is replaced


def test_the_earlier_bundle_stands_in_when_replacing_it_was_cut_short(folder: Path):
    aside = set_aside(folder)
    aside.parent.mkdir()
    folder.rename(aside)
    assert read_everything(folder) == {name: content(name) for name in FILES}
    (aside / MANIFEST).unlink()
    assert str(folder) in refusal(lambda: Bundle.open(folder))


@pytest.mark.parametrize("name", [MANIFEST, DIGEST, *FILES[-2:]])
def test_a_bundle_replaced_while_it_is_opened_is_opened_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """It lands just before a file is opened; only the manifests differ, so that all sizes fit."""
    newer = publish(tmp_path / "newer", seed=1, changed=())
    expected = Bundle.open(newer).digest
    unchanged = Path.open

    def replaced(path: Path, mode: str, **other: Any):
        if path == folder / name and newer.exists():
            folder.rename(tmp_path / "older")
            newer.rename(folder)
        return unchanged(path, mode, **other)

    monkeypatch.setattr(Path, "open", replaced)
    bundle = Bundle.open(folder)
    assert bundle.digest == expected
    assert not newer.exists() and bundle.stands()
    bundle.verify()


def test_a_bundle_set_aside_while_it_is_opened_is_opened_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    aside = set_aside(folder)
    aside.parent.mkdir()
    unchanged = Path.open

    def moved(path: Path, mode: str, **other: Any):
        if path == folder / DIGEST:
            folder.rename(aside)
        return unchanged(path, mode, **other)

    monkeypatch.setattr(Path, "open", moved)
    assert Bundle.open(folder).path == aside


def test_a_bundle_that_is_replaced_at_every_attempt_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    unchanged = Path.open

    def replaced(path: Path, mode: str, **other: Any):
        if path == folder / FILES[-1]:
            shutil.copytree(folder, folder.with_name("newer"))
            folder.rename(folder.with_name("older"))
            folder.with_name("newer").rename(folder)
            shutil.rmtree(folder.with_name("older"))
        return unchanged(path, mode, **other)

    monkeypatch.setattr(Path, "open", replaced)
    monkeypatch.setattr(bundle_module, "ATTEMPTS", 3)
    assert "replaced whenever it was opened" in refusal(lambda: Bundle.open(folder))


@pytest.mark.parametrize("how", ["folder", "file"])
def test_weights_are_those_that_were_opened_whatever_takes_their_place(folder: Path, how: str):
    bundle = Bundle.open(folder)
    newer = publish(folder.with_name("newer"), seed=1, changed=FILES[-2:])
    if how == "folder":
        folder.rename(folder.with_name("older"))
        newer.rename(folder)
    else:
        (newer / FILES[-1]).rename(folder / FILES[-1])
    bundle.verify()
    assert bundle.held[FILES[-1]].read(10**6) == content(FILES[-1])
    assert "was replaced while it was used" in refusal(bundle.check_stands)

"""Weights by name: the published ones, those on the hub, and the build that takes them."""

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hub_stand_in import Hub, Repository, serve, use
from released import write_released_tokenizer, write_released_transformer
from small_t5 import write_t5

from varedit_export.cli import main
from varedit_export.console import accept
from varedit_export.weights import published
from varedit_export.weights.download import Download, Further
from varedit_export.weights.names import Published
from varedit_export.weights.published import Places, find_weights
from varedit_reference.config import preset
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import CheckpointError, ConfigError, readable_size

VAREDIT = "HiDream-ai/VAREdit"
T5 = {f"flan-t5-xl/{name}": b"{}" for name in ("config.json", "tokenizer.json", "x.safetensors")}
RECORDING = Path(__file__).parent / "golden" / "tiny2b-256"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("VAREDIT_BUNDLE", raising=False)
    with serve({}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def publish(hub: Hub, *names: str, repository: str = VAREDIT) -> None:
    hub.repositories[repository] = Repository(dict.fromkeys(names, b"weights"))


@pytest.fixture
def tiny(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny-2b be a published size; publish files of its names that hold no weights."""
    publish(hub, "TINY.pth", "vae.pth", *T5)
    table = {"tiny-2b": Published(VAREDIT, {256: "TINY.pth"}, "vae.pth")}
    monkeypatch.setattr(published, "PUBLISHED", table)
    monkeypatch.setattr("varedit_export.resolve_options.PUBLISHED", table)
    monkeypatch.setattr("varedit_export.check_options.PUBLISHED", table)


def run(*arguments: str | Path, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=answer)


def test_the_published_weights_of_8b(hub: Hub) -> None:
    publish(hub, "8B-512.pth", "8B-1024.pth", "infinity_vae_d56_f8_14_patchify.pth", *T5)
    assert find_weights("8b", [1024], Places(), None) == Places(
        f"hf://{VAREDIT}/8B-1024.pth",
        f"hf://{VAREDIT}/infinity_vae_d56_f8_14_patchify.pth",
        f"hf://{VAREDIT}/flan-t5-xl",
    )


def test_what_a_repository_lacks_is_taken_from_others(hub: Hub) -> None:
    publish(hub, "8B-512.pth")
    assert find_weights("8b", [512], Places(), None) == Places(
        f"hf://{VAREDIT}/8B-512.pth",
        "hf://FoundationVision/Infinity/infinity_vae_d56_f8_14_patchify.pth",
        "hf://google/flan-t5-xl",
    )


def test_what_is_given_is_taken(hub: Hub) -> None:
    publish(hub, "8B-512.pth")
    given = Places("mine.pth", None, "t5")
    found = find_weights("8b", [256], given, None)
    assert (found.transformer, found.text_encoder) == ("mine.pth", "t5")
    hub.requests.clear()
    given = Places("mine.pth", "vae.pth", "t5")
    assert find_weights("8b", [256], given, None) == given
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["2B-512.pth", "varedit_2b_512px.safetensors", "2b/res512/model.pth", "V-2B-512.pt"],
)
def test_a_transformer_is_found_by_its_name(hub: Hub, name: str) -> None:
    publish(hub, name, "12B-512.pth", "2B-1512.pth", "8B-512.pth", "2B-512.txt", repository="me/x")
    assert find_weights("2b", [512], Places(), "me/x").transformer == f"hf://me/x/{name}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("8B-512.pth",), r"has no transformer for 2b at 512 px; it has 8B-512\.pth: give --check"),
        (("2B-512.pth", "2b-512-ema.pth"), r"has 2 files for 2b at 512 px; it has 2B-512\.pth, 2b"),
    ],
)
def test_without_one_transformer_of_that_name_the_files_are_listed(
    hub: Hub, names: tuple[str, ...], message: str
) -> None:
    publish(hub, *names)
    with pytest.raises(CheckpointError, match=message):
        find_weights("2b", [512], Places(), None)


def test_a_folder_laid_out_as_the_repository(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    for name in ("2B-512.pth", "infinity_vae_d32reg.pth", *T5):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")
    names = ("2B-512.pth", "infinity_vae_d32reg.pth", "flan-t5-xl")
    expected = Places(*(str(folder / name) for name in names))
    assert find_weights("2b", [512], Places(), str(folder)) == expected
    assert hub.requests == []


def test_a_revision_of_another_repository(hub: Hub) -> None:
    publish(hub, "2B-512.pth", repository="me/x")
    commit = hub.repositories["me/x"].commit
    found = find_weights("2b", [512], Places(), f"hf://me/x@{commit}")
    assert found.transformer == f"hf://me/x/2B-512.pth@{commit}"


def test_each_resolution_has_its_own_transformer(hub: Hub) -> None:
    publish(hub, "8B-512.pth", "8B-1024.pth")
    with pytest.raises(ConfigError, match="build one bundle for each"):
        find_weights("8b", [512, 1024], Places(), None)
    assert find_weights("8b", [512, 1024], Places("mine.pth"), None).transformer == "mine.pth"


def manifest(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "manifest.json").read_text())
    return {name: value for name, value in content.items() if name != "name"}


def test_a_bundle_from_the_hub_is_the_one_from_files(hub: Hub, tmp_path: Path) -> None:
    """Its manifest alone tells more: where the files came from."""
    files = {name: (RECORDING / name).read_bytes() for name in ("var.pth", "vae.pth")}
    hub.repositories["me/x"] = Repository(files)
    common = ("build", "--config", RECORDING / "config.json", "--text-tokens", "20")

    def build(base: str, output: Path, *options: str) -> Result:
        places = ("--checkpoint", f"{base}/var.pth", "--tokenizer", f"{base}/vae.pth")
        return run(*common, *places, "-o", output, *options)

    refused = build("hf://me/x", tmp_path / "hub")
    assert refused.exit_code == 1
    size = readable_size(len(files["var.pth"]))
    assert f"hf://me/x/var.pth: {size}, licence mit" in refused.stderr
    assert "give --yes" in refused.stderr
    assert not any("/blobs/" in request for request in hub.requests)

    assert build(str(RECORDING), tmp_path / "files").exit_code == 0
    assert build("hf://me/x", tmp_path / "hub", "--yes").exit_code == 0
    names = {path.relative_to(tmp_path / "files") for path in (tmp_path / "files").rglob("*.*")}
    for name in names - {Path("manifest.json"), Path("manifest.sha256")}:
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    ours, others = manifest(tmp_path / "hub"), manifest(tmp_path / "files")
    origins = ours["model"].pop("origins")
    assert ours == others
    repository = hub.repositories["me/x"]
    assert [(o["repository"], o["commit"], o["file"]) for o in origins] == [
        ("me/x", repository.commit, "var.pth"),
        ("me/x", repository.commit, "vae.pth"),
    ]
    sums = [sha256(data).hexdigest() for data in files.values()]
    assert [one["sha256"] for one in origins] == sums
    assert f"var.pth of me/x at {repository.commit}" in run("inspect", tmp_path / "hub").output


@pytest.mark.usefixtures("tiny")
def test_size_and_resolution_alone_build_a_bundle(hub: Hub, tmp_path: Path) -> None:
    config = preset("tiny-2b")
    folder = tmp_path / "weights"
    write_released_transformer(config, 1, folder / "TINY.pth", torch.float32, chunks=2)
    write_released_tokenizer(config, 2, folder / "vae.pth", torch.float32)
    write_t5(folder / "flan-t5-xl")
    (folder / "flan-t5-xl" / "tf_model.h5").write_bytes(b"not needed")
    names = {path for path in folder.rglob("*") if path.is_file()}
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
    hub.repositories[VAREDIT] = Repository(files)
    shutil.rmtree(folder)
    built = run("build", "--size", "tiny-2b", "--res", "256", "--yes")
    assert built.exit_code == 0, built.stderr
    bundle = Bundle.open(built.stdout.strip())
    assert bundle.manifest.model.weights == "TINY.pth, vae.pth, flan-t5-xl"
    steps = re.findall(r"^  (\d+) of (\d+): (.+)$", built.stderr, re.M)
    count = len(steps) - 1
    assert [(int(done), int(of)) for done, of, _ in steps] == [(n, count) for n in range(count + 1)]
    (variant,) = bundle.manifest.variants
    graphs = [what.removeprefix("graph ") for *_, what in steps if what.startswith("graph ")]
    assert sorted(graphs) == sorted(variant.graphs)
    assert [what for *_, what in steps[-3:]] == ["parity with the reference", "publishing", "done"]
    assert not any("tf_model" in request for request in hub.requests)


def test_a_mistyped_path_is_not_looked_for_on_the_hub(hub: Hub) -> None:
    files = published.bring_weights(["weights/var.pth"], lambda _: None, ["loras/x.safetensors"])
    assert (files.paths, files.adapters) == (
        [Path("weights/var.pth")],
        [Path("loras/x.safetensors")],
    )
    assert hub.requests == []


def test_every_download_is_asked_about_in_printable_lines(hub: Hub) -> None:
    """Also that of an empty file, and with whatever the repository says of its licence."""
    hub.repositories["me/x"] = Repository(
        {"var.pth": b""}, licence="\x1b[31mfree\nSay yes" + "x" * 5000
    )
    asked: list[str] = []
    published.bring_weights(["hf://me/x/var.pth"], lambda download: asked.append(str(download)))
    [told] = asked
    assert all(line.isprintable() for line in told.splitlines()) and len(told.splitlines()) == 2
    assert len(told) < 1000


@pytest.mark.parametrize(
    ("free", "later", "together", "fits"),
    [
        (4999, None, True, False),
        (5000, None, True, True),
        (5999, 1000, True, False),
        (6000, 1000, True, True),
        (5000, 5000, False, True),
        (5000, 5001, False, False),
    ],
)
def test_a_download_that_does_not_fit_is_refused(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    later: int | None,
    together: bool,
    fits: bool,
) -> None:
    """On one disk there has to be room for the files and for what is made of them."""
    hub.repositories["me/x"] = Repository({"var.pth": b"0" * 5000})
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("varedit_export.weights.download.same_disk", lambda one, other: together)
    further = later and Further(tmp_path / "bundle", later, "much")
    asked: list[str] = []

    class RefusedError(Exception):
        pass

    def accept(download: Download) -> None:
        asked.append(str(download))
        raise RefusedError

    with pytest.raises(RefusedError if fits else CheckpointError) as refused:
        published.bring_weights(["hf://me/x/var.pth"], accept, further=lambda: further or None)
    assert fits or "the disk has no room: 5.0 kB to download" in str(refused.value)
    assert len(asked) == fits
    if later and fits:
        assert f"then much; {readable_size(free)} are free in {tmp_path}" in asked[0]
    assert not any("/blobs/" in request for request in hub.requests)


@pytest.mark.usefixtures("tiny")
def test_what_the_build_needs_is_told_before_the_download(tmp_path: Path) -> None:
    built = run("build", "--size", "tiny-2b", "--res", "256", "-o", tmp_path / "bundle")
    assert re.search(
        r"  then the build needs \S+ MB of disk, \S+ MB of memory, about \d+ min; \S+ GB are free "
        + "in "
        + re.escape(str(tmp_path / "bundle")),
        built.stderr,
    )
    assert built.exit_code == 1 and "give --yes" in built.stderr


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("words", "message"),
    [(("--batch", "0"), "a batch of 1 to"), (("--text-tokens", "600"), "2 to 512 text tokens")],
)
def test_impossible_options_are_refused_before_the_download(
    hub: Hub, words: tuple[str, ...], message: str
) -> None:
    built = run("build", "--size", "tiny-2b", "--res", "256", "--yes", *words)
    assert built.exit_code == 1 and message in built.stderr
    assert not any("/blobs/" in request or "/resolve/" in request for request in hub.requests)


@pytest.mark.usefixtures("tiny")
def test_too_little_memory_is_told_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varedit_export.estimate.available_memory", lambda: 10**8)
    built = run("build", "--size", "tiny-2b", "--res", "256", "--yes")
    assert built.exit_code == 1 and "100 MB of memory are available" in built.stderr
    assert not any("/resolve/" in request for request in hub.requests)


@pytest.mark.parametrize("stdin", (None, io.StringIO()))
def test_without_an_answer_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO | None
) -> None:
    if stdin is not None:  # a terminal, where the input was ended by Ctrl-D
        monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ConfigError, match="download"):
        accept(False, Download(()))

"""Files from the hub, by its real client library, from a stand-in of the hub on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import Hub, Repository, serve, use
from huggingface_hub import constants

from varedit_export.weights.download import Download
from varedit_export.weights.hub import HubAddress, fetch, list_files, look_up, parse
from varedit_runtime.errors import CheckpointError, ConfigError
from varedit_runtime.manifest import HubOrigin

WEIGHTS = bytes(range(256)) * 40
REPOSITORY = "owner/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a repository; the client's cache is a folder of the test's own."""
    files = {
        "8B-512.pth": WEIGHTS,
        "README.md": b"# A model",
        "text/config.json": b"{}",
        "text/tokenizer.json": b"{ }",
        "text/model-00001.safetensors": WEIGHTS[:5000],
        "text/flax_model.msgpack": WEIGHTS[:3000],
        "text/tf_model.h5": WEIGHTS[:2000],
    }
    with serve({REPOSITORY: Repository(files)}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
        yield hub


FILE = HubAddress(REPOSITORY, "8B-512.pth")
FILE_CHOICES = [["8B-512.pth"]]
FOLDER = HubAddress(REPOSITORY, "text")
FOLDER_CHOICES = [
    ["text/*.safetensors", "text/config.json", "text/tokenizer.json"],
    ["text/*.bin", "text/config.json", "text/tokenizer.json"],
]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://o/r/f.pth", HubAddress("o/r", "f.pth")),
        ("hf://o/r/a/f.pth@v1", HubAddress("o/r", "a/f.pth", "v1")),
        ("hf://o/r/f.pth@refs/pr/3", HubAddress("o/r", "f.pth", "refs/pr/3")),
        ("hf://o/r@v1/a/", HubAddress("o/r", "a", "v1")),
        ("hf://o/r", HubAddress("o/r")),
        ("hf://o/r@v1", HubAddress("o/r", "", "v1")),
        ("hf://datasets/o/r/a@v1", HubAddress("o/r", "a", "v1", dataset=True)),
    ],
)
def test_addresses(text: str, address: HubAddress) -> None:
    assert parse(text) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://o",
        "hf://",
        "hf://o/",
        "o/r",
        "hf://o/r@a/f@b",
        "hf://o/r/../f",
        "hf://../r",
        "hf://o/r@",
    ],
)
def test_texts_that_are_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address on the hub"):
        parse(text)


def test_a_file_is_fetched_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = look_up(FILE, FILE_CHOICES)
    assert (wanted.missing, wanted.licence) == (len(WEIGHTS), "mit")
    path, origins = fetch(wanted)
    assert path.read_bytes() == WEIGHTS
    commit = hub.repositories[REPOSITORY].commit
    assert origins == [HubOrigin(REPOSITORY, commit, "8B-512.pth", sha256(WEIGHTS).hexdigest())]
    hub.requests.clear()
    again = look_up(FILE, FILE_CHOICES)
    assert again.missing == 0
    assert fetch(again) == (path, origins)
    assert not [request for request in hub.requests if "/blobs/" in request]
    assert capsys.readouterr() == ("", "")


def test_a_folder_has_the_files_of_its_first_choice_alone(hub: Hub) -> None:
    folder, origins = fetch(look_up(FOLDER, FOLDER_CHOICES))
    names = ["config.json", "model-00001.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [one.file for one in origins] == [f"text/{name}" for name in names]


def test_the_second_choice_is_taken_where_the_first_is_absent(hub: Hub) -> None:
    files = hub.repositories[REPOSITORY].files
    files["text/pytorch_model.bin"] = files.pop("text/model-00001.safetensors")
    folder, _ = fetch(look_up(FOLDER, FOLDER_CHOICES))
    assert (folder / "pytorch_model.bin").is_file()


def test_absent_files_are_told_with_those_that_are_there(hub: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no 2B\.pth; it has 8B-512\.pth, README\.md, text"
    ):
        look_up(HubAddress(REPOSITORY, "2B.pth"), [["2B.pth"]])
    assert "8B-512.pth" in list_files(HubAddress(REPOSITORY))


def test_a_repository_that_changes_before_the_download_is_told(hub: Hub) -> None:
    wanted = look_up(FILE, FILE_CHOICES)
    hub.repositories[REPOSITORY].files["8B-512.pth"] = WEIGHTS[::-1]
    with pytest.raises(CheckpointError, match="changed on the hub just now"):
        fetch(wanted)


@pytest.mark.parametrize(
    "answer",
    [
        {"sha": "../../../evil"},  # the library would write to that place
        {"sha": None},
        {"siblings": [{"rfilename": "8B-512.pth", "size": -1}]},
        {"siblings": [{"rfilename": "8B-512.pth", "size": None}]},
        {"siblings": [{"rfilename": "8B-512.pth", "size": 10**400}]},
        {"siblings": [{"rfilename": "8B-\x1b[31m512.pth", "size": 1}]},
        {"siblings": [{"rfilename": 5, "size": 1}]},
        {"siblings": [{"rfilename": "8B-512.pth", "size": 1, "lfs": {"sha256": "x", "size": 1}}]},
    ],
)
def test_an_answer_that_is_none_is_refused(hub: Hub, answer: dict[str, Any]) -> None:
    hub.answer = answer
    with pytest.raises(CheckpointError, match="the hub's answer about owner/model is not as exp"):
        look_up(FILE, FILE_CHOICES)
    assert not any("/resolve/" in request for request in hub.requests)


@pytest.mark.parametrize("tags", [None, [], [None, 1], {}, "license:mit", ["license:"]])
def test_a_licence_that_is_not_stated_is_none(hub: Hub, tags: Any) -> None:
    hub.answer = {"tags": tags, "cardData": None, "library_name": None, "pipeline_tag": None}
    wanted = look_up(FILE, FILE_CHOICES)
    assert not wanted.licence
    assert fetch(wanted)[0].read_bytes() == WEIGHTS
    assert "licence not stated" in str(Download((wanted,)))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (HubAddress("owner/other", "f"), "no repository owner/other"),
        (HubAddress(REPOSITORY, "f", "v9"), "no revision v9"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, address: HubAddress, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        look_up(address, [["f"]])


def test_private_and_gated_repositories_need_a_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.repositories[REPOSITORY]
    repository.token = "secret"
    with pytest.raises(CheckpointError, match="set HF_TOKEN if it is private"):
        look_up(FILE, FILE_CHOICES)
    repository.gated = True
    with pytest.raises(CheckpointError, match="accept them on its page") as refusal:
        look_up(FILE, FILE_CHOICES)
    monkeypatch.setenv("HF_TOKEN", "secret")
    path, _ = fetch(look_up(FILE, FILE_CHOICES))
    assert path.read_bytes() == WEIGHTS
    assert "secret" not in str(refusal.value)


def test_a_cut_connection_goes_on_where_it_stopped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts = [4000]
    path, _ = fetch(look_up(FILE, FILE_CHOICES))
    assert path.read_bytes() == WEIGHTS
    assert any("bytes=4000-" in request for request in hub.requests)


def test_a_download_that_fails_for_good_can_be_tried_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts = [6000] + [0] * 6
    with pytest.raises(CheckpointError, match="fetched whole are kept"):
        fetch(look_up(FILE, FILE_CHOICES))
    path, _ = fetch(look_up(FILE, FILE_CHOICES))
    assert path.read_bytes() == WEIGHTS


def users_of(hub: Hub, cache: Path) -> dict[str, str]:
    """Return the environment of a process that downloads from a hub into an own cache."""
    asked = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **asked}


def test_a_killed_download_keeps_the_files_that_were_whole(tmp_path: Path) -> None:
    """The library itself begins the file anew in which it was killed."""
    script = (
        "from varedit_export.weights.hub import HubAddress, fetch, look_up\n"
        "for name in ('first', 'second'):\n"
        "    print(fetch(look_up(HubAddress('owner/model', name), [[name]]))[0])"
    )
    files = {"first": WEIGHTS, "second": WEIGHTS[::-1]}
    with serve({REPOSITORY: Repository(files)}) as hub:
        environment = users_of(hub, tmp_path)
        command = [sys.executable, "-c", script]
        hub.cuts, hub.hangs = [len(WEIGHTS), 100], True
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while not any("second" in request for request in hub.requests if "/blobs/" in request):
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
        first.wait()
        hub.requests.clear()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert [Path(line).read_bytes() for line in done.stdout.split()] == list(files.values())
        assert [r for r in hub.requests if "/blobs/" in r] == ["GET /blobs/owner/model/second"]


def test_an_interrupted_download_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """The library's own threads would go on until every file is whole."""
    script = (
        "from varedit_export.weights.hub import HubAddress, fetch, look_up\n"
        "fetch(look_up(HubAddress('owner/model'), [['first', 'second']]))"
    )
    files = {"first": WEIGHTS, "second": WEIGHTS[::-1]}
    with serve({REPOSITORY: Repository(files)}) as hub:
        environment = users_of(hub, tmp_path)
        hub.cuts, hub.hangs = [100, 100], True
        command = [sys.executable, "-c", script]
        running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while not (blobs := [request for request in hub.requests if "/blobs/" in request]):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        assert running.wait() not in (0, None)
        assert [request for request in hub.requests if "/blobs/" in request] == blobs
    assert not [*tmp_path.rglob("*.incomplete")]


def test_a_file_that_differs_from_the_hubs_is_refused(hub: Hub) -> None:
    hub.damaged = True
    with pytest.raises(CheckpointError, match=r"is not the file that the hub has: delete"):
        fetch(look_up(FILE, FILE_CHOICES))


def test_without_a_connection_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path, origins = fetch(look_up(FILE, FILE_CHOICES))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    wanted = look_up(FILE, FILE_CHOICES)
    assert (wanted.commit, wanted.files) == (None, ())
    assert fetch(wanted) == (path, origins)
    assert list_files(HubAddress(REPOSITORY)) == ["8B-512.pth"]
    with pytest.raises(CheckpointError, match="cannot reach the hub for hf://owner/unknown"):
        list_files(HubAddress("owner/unknown"))
    assert hub.requests == []
    with pytest.raises(CheckpointError, match="cannot reach the hub for hf://owner/model/text"):
        fetch(look_up(FOLDER, FOLDER_CHOICES))

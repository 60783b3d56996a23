"""Random command lines: known exit codes, one printable line, and nothing written elsewhere."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from varedit_export.cli import main as export_main
from varedit_runtime.cli import main as run_main
from varedit_runtime.errors import BackendError, CheckpointError

Cases = Callable[[int], Iterator[Random]]

NUMBERS = ("0", "1", "-1", "7", "1e999", "nan", "-inf", "9" * 400, "0x10", "1,2,,", "1_0", "٣")
PATHS = ("photo.png", "missing.png", "out.png", "out.bmp", "folder", ".", "..", "no/out.png", "/")
PATHS += ("/dev/full", "/proc/self/mem", "link.png", "loop.png", "~", "C:\\x.png", "a:b.png")
TEXTS = ("", " ", "-", "--", "add a hat", "\x1b[31mred", "\udcff\udcfe", "é→\u202e", "a\nb\r", "\t")
TEXTS += (
    "x" * 5000,
    "%s{}$HOME",
    "--" + "x" * 3000,
    "--seed=",
    "-oout.png",
    "--json=",
    "---",
    "-é",
)
SKELETONS = {
    run_main: (
        ("photo.png", "add a hat"),
        ("photo.png", "add a hat", "-o", "out.png"),
        ("prepare", "photo.png", "-o", "out.png"),
        ("bench", "folder"),
        ("grids",),
        (),
    ),
    export_main: (
        ("build", "--size", "2b", "--res", "512"),
        ("convert", "--size", "2b", "-o", "folder"),
        ("inspect", "folder"),
        ("verify", "folder"),
        ("engines", "folder"),
        ("bench", "folder"),
        ("triton", "nano", "-o", "folder"),
        ("train", "--size", "nano", "--data", "pairs.jsonl", "-o", "folder"),
        ("doctor",),
        (),
    ),
}

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_written: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
        _written.append(os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else "")
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
        _written.append(os.fsdecode(arguments[0]))
    elif event in ("os.link", "os.symlink"):  # from the first to the second
        _written.append(os.fsdecode(arguments[1]))
    elif event == "os.rename":
        _written.extend(map(os.fsdecode, arguments[:2]))


sys.addaudithook(_audit)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with a picture; nothing that a model is needed for is done."""

    def no_model(*_: object, **__: object) -> None:
        raise BackendError("there is no model here")

    def no_weights(*_: object) -> None:
        raise CheckpointError("there are no weights here")

    for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.delenv("VAREDIT_BUNDLE", raising=False)
    monkeypatch.setattr("varedit_runtime.editing.editor.Editor.open", no_model)
    monkeypatch.setattr("varedit_runtime.backends.detect.detect_machine", no_model)
    monkeypatch.setattr("varedit_export.resolve_options.random_sources", no_weights)
    monkeypatch.setattr("varedit_export.resolve_options.sources_of", no_weights)
    place = tmp_path / "work" / "here"
    (place / "folder").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(place / "photo.png")
    (place / "link.png").symlink_to("photo.png")
    (place / "loop.png").symlink_to("loop.png")
    monkeypatch.chdir(place)
    return place


def words(random: Random, command: click.Group) -> list[str]:
    """Return a command line: one that may work, with words added, doubled and taken away."""
    line = list(random.choice(SKELETONS[command]))
    inner = command.commands.get(line[0] if line else "", command.commands.get("edit", command))
    parameters = inner.get_params(click.Context(inner))
    names = [name for option in parameters for name in option.opts if name.startswith("-")]
    values = NUMBERS + PATHS + TEXTS
    for _ in range(random.randrange(6)):
        at = random.randrange(len(line) + 1)
        chance = random.random()
        if line and chance < 0.1:
            line.pop(at - 1)
        elif chance < 0.7:
            line[at:at] = [random.choice(names), random.choice(values)]
        else:
            line.insert(at, random.choice((*values, *names, *command.commands)))
    return [word for word in line if word not in ("--debug", "--help", "--version")]


def check(line: list[str], code: int, stdout: str, stderr: str) -> None:
    """Check what a command line came to."""
    told = [text for text in stderr.splitlines() if not text.startswith("bundle: ")]
    assert code in (0, 1, 2), line
    assert all(text.isprintable() for text in [*stdout.splitlines(), *told]), line
    if code == 1:
        assert len(told) == 1 and told[0].startswith("Error: ") and len(told[0]) < 2100, line
    elif code == 2:
        assert told[0].startswith(("Usage: ", "Error: ")), line
        assert told[-1].startswith("Error: ") or not line, line
        assert not line or sum(map(len, told)) < 4000, line
        assert "varedit-run edit" not in stderr
    else:
        assert told == [], line


@pytest.mark.parametrize("command", (run_main, export_main), ids=("run", "export"))
def test_fuzz_command_lines(command: click.Group, place: Path, cases: Cases) -> None:
    global _written
    inside = place.parent.parent
    for random in cases(200):
        line = words(random, command)
        _written = []
        try:
            done = CliRunner().invoke(command, line)
        finally:
            written, _written = _written, None
        assert done.exception is None or isinstance(done.exception, SystemExit), line
        check(line, done.exit_code, done.stdout, done.stderr)
        outside = {
            path
            for path in written
            if not Path(os.path.realpath(path)).is_relative_to(inside)
            and "__pycache__" not in path
            and path != os.devnull
        }
        assert not outside, line


RAW = (
    [b"\xff\xfe.png", b"add \x1b]0;x\x07"],
    [b"prepare", b"photo.png", b"-o", b"\xff.\x1b[2J"],
    [b"--\xff\n=1"],
)


@pytest.mark.parametrize("line", RAW)
def test_bytes_that_are_no_text_are_told(line: list[bytes], place: Path) -> None:
    code = "from varedit_runtime.terminal.start import varedit_run; varedit_run()"
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True)
    assert done.stdout == b""
    check([], done.returncode, "", done.stderr.decode())

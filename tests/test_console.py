"""What `varedit-export` shows while it works, through a pipe and on a terminal."""

import os
import pty
import re
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from terminals import read_terminal

from varedit_engines.progress import OnStep
from varedit_export.console import progress, say
from varedit_reference.weights_file import write_safetensors

STEPS = [
    ("weights of transformer", 0),
    ("weights of transformer, 0 of 3", 0),
    ("weights of transformer, 1 of 3", 0),
    ("graph scale_00", 1),
    ("graph scale_01", 2),
    ("done", 3),
]


def work(on_step: OnStep) -> None:
    for what, done in STEPS:
        on_step(what, done, 3)


def on_terminal(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> str:
    """Return what an action shows on a pseudo-terminal."""
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 80))
    shown: list[bytes] = []

    reader = threading.Thread(target=lambda: shown.append(read_terminal(reading)))
    reader.start()
    with os.fdopen(writing, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        action()
    reader.join()
    return shown[0].decode()


def test_names_from_strangers_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("weights: \x1b[31mw\r.pth\n  next")
    assert capsys.readouterr().err == "weights: \\x1b[31mw .pth\n  next\n"


def test_through_a_pipe_every_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as on_step:
        work(on_step)
    assert capsys.readouterr() == (
        "",
        "  0 of 3: weights of transformer\n"
        "  1 of 3: graph scale_00\n"
        "  2 of 3: graph scale_01\n"
        "  3 of 3: done\n",
    )


def test_through_a_pipe_a_long_step_is_told_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2) as on_step:
        for done in range(101):
            on_step("editing", done, 100)
    assert capsys.readouterr().err == (
        "  0 of 100: editing\n  50 of 100: editing\n  100 of 100: editing\n"
    )


def test_a_terminal_shows_a_counter_and_keeps_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> None:
        with progress() as on_step:
            say("what is built")
            work(on_step)

    shown = on_terminal(monkeypatch, action)
    first, *frames = shown.replace("\r\n", "\r").strip("\r").split("\r")
    assert first == "what is built"  # and no bar before the first step
    for what, done in STEPS:
        assert any(re.match(rf"{what} \|.*\| {done} of 3, 00:0", frame) for frame in frames), what
    assert "\n  1 of 3" not in shown
    assert not re.search(r"<|\?|/s", shown)  # no time left, no rate


def test_a_file_of_weights_shows_no_time_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = {str(n): torch.zeros(4) for n in range(5)}
    shown = on_terminal(
        monkeypatch, lambda: write_safetensors(tmp_path / "w.safetensors", tensors, {})
    )
    assert re.search(r"w\.safetensors \|.*\| 5 of 5 tensors, 00:0", shown)
    assert not re.search(r"<|\?|/s", shown)

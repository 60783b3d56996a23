"""The commands where streams fail, names are no text, and signals come at any time."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
from disks import file_size_limit
from PIL import Image

from varedit_runtime.cli import main
from varedit_runtime.files import atomic_file
from varedit_runtime.locate import embedded

FULL = "Error: the output cannot be written: No space left on device\n"


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Draw a picture in a folder of its own, for a user who has built no bundle."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("VAREDIT_BUNDLE", raising=False)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "photo.png")
    return folder / "photo.png"


def exit_code(*arguments: object) -> int | None:
    """Run varedit-run in this process, on the streams that there are."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments], prog_name="varedit-run")
    assert ended.value.code is None or isinstance(ended.value.code, int)
    return ended.value.code


def whole(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.size == (40, 30)


# Streams


def full() -> TextIO:
    return open("/dev/full", "w")


def unbuffered() -> TextIO:
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)  # type: ignore[arg-type]


def unread() -> TextIO:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("words", (["grids"], ["--help"], ["--version"], ["prepare", "--help"]))
@pytest.mark.parametrize("stream", (full, unbuffered))
def test_what_a_full_stdout_cannot_take_is_an_error(
    words: list[str],
    stream: Callable[[], TextIO],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", stream())
    assert exit_code(*words) == 1
    assert capsys.readouterr().err == FULL
    sys.stdout.flush()  # as Python does at the end


def test_readers_that_have_read_enough_get_no_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", unread())
    assert exit_code("grids") == 1
    assert capsys.readouterr().err == ""
    sys.stdout.flush()


def test_an_edit_is_written_though_its_line_is_not(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", full())
    assert exit_code(photo, "add a hat", "--threads", 1) == 1
    assert capsys.readouterr().err.splitlines(keepends=True)[1:] == [FULL]
    assert whole(photo.with_name("photo-edited.png"))


@pytest.mark.parametrize("stream", (full, unread))
def test_an_edit_does_not_need_stderr(
    photo: Path,
    stream: Callable[[], TextIO],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    assert exit_code(photo, "add a hat", "--threads", 1) is None
    assert capsys.readouterr().out.startswith(f"{photo.with_name('photo-edited.png')}: 40 x 30")
    assert whole(photo.with_name("photo-edited.png"))
    assert exit_code("--nonsense") == 2
    assert exit_code(photo.with_name("missing"), "add a hat") == 1


def shell(*words: object, closing: str) -> subprocess.CompletedProcess[str]:
    """Run varedit-run as its script does, with streams that a shell closed."""
    code = "from varedit_runtime.terminal.start import varedit_run; varedit_run()"
    command = [
        "sh",
        "-c",
        f'exec "$@" {closing}',
        "sh",
        sys.executable,
        "-c",
        code,
        *map(str, words),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_edit_goes_on_when_nobody_reads_what_it_says(photo: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "varedit_runtime", photo, "add a hat", "--bundle", embedded()]
    done = subprocess.run(command, stderr=writing, stdout=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert done.returncode == 0 and photo.with_name("photo-edited.png").exists()


def test_closed_streams_are_no_files_of_an_edit(photo: Path) -> None:
    edited = photo.with_name("photo-edited.png")
    done = shell(photo, "add a hat", "--threads", 1, closing="<&- 2>&-")
    assert done.returncode == 0 and done.stdout.startswith(f"{edited}: ")
    assert whole(edited)
    edited.unlink()
    done = shell(photo, "add a hat", "--threads", 1, closing="<&- >&-")
    assert done.returncode == 1
    (told, error) = done.stderr.splitlines()
    assert told.startswith("bundle: ")
    assert error == "Error: the output cannot be written: Bad file descriptor"
    assert whole(edited)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"h\xe4t\u2192"),
        ("latin-1", b"h\xe4t\\u2192"),
        ("utf-8", "hät→".encode()),
    ],
)
def test_streams_of_any_encoding_take_any_name(
    photo: Path, encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, raw in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding))
    odd = photo.rename(photo.with_name(os.fsdecode("hät→".encode() + b"\xff.png")))
    target = photo.with_name(f"{odd.stem}.bmp")
    assert exit_code("prepare", odd, "-o", target, "--res", 256) is None
    out = written["stdout"].getvalue()
    assert out.endswith(b".bmp: 256 x 256, from 40 x 30\n") and shown in out
    assert target.exists()
    assert exit_code(photo.with_name("gönĕ"), "add a hat") == 1
    assert b"g" in written["stderr"].getvalue()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


# Signals


def pressed(
    module: str, sent: signal.Signals, start: str, *words: object
) -> "subprocess.CompletedProcess[str]":
    """Run code in a process that gets a signal when it begins to import a module."""
    code = f"""if True:
        import os, runpy, sys
        from varedit_runtime.terminal.start import varedit_run
        class Pressed:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    os.kill(os.getpid(), {int(sent)})
        sys.meta_path.insert(0, Pressed())
        {start}
        """
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


MODULES = ("click", "varedit_runtime.cli", "platformdirs", "msgspec", "onnxruntime", "PIL.Image")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_during_an_import_is_one_line(
    photo: Path, module: str, sent: signal.Signals
) -> None:
    words = (photo, "add a hat", "--previews", photo.with_name("previews"))
    done = pressed(module, sent, "varedit_run()", *words)
    assert done.returncode == 128 + sent
    told = ("bundle: ", "backend: ")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(told)]
    assert lines == ["Interrupted."]
    assert list(photo.parent.iterdir()) == [photo]


@pytest.mark.parametrize(
    ("start", "module"),
    [
        ("varedit_export", "varedit_export.cli"),
        ("varedit_export", "tqdm"),
        ("varedit_export", "torch"),
        ("varedit_export", "onnxscript"),
        ("varedit_runtime", "varedit_runtime.cli"),
        ("varedit_runtime", "click"),
        ("varedit_reference.golden", "torch"),
        ("varedit_reference.golden", "varedit_reference.checkpoint"),
    ],
)
def test_a_signal_while_a_module_starts_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, module: str
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    run = f"runpy.run_module({start!r}, run_name='__main__', alter_sys=True)"
    words = {
        "varedit_export": ["build", "--size", "tiny-2b", "--res", "256", "--random-weights", "1"],
        "varedit_runtime": ["grids"],
        "varedit_reference.golden": [tmp_path],
    }[start]
    done = pressed(module, signal.SIGINT, run, *words)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("backend: ")]
    assert (done.returncode, done.stdout, lines) == (130, "", ["Interrupted."])
    assert not [*tmp_path.iterdir()]


def test_what_ends_on_a_signal_waits_for_no_thread(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        "import click, signal, threading, time\n"
        "from varedit_runtime.terminal.command import CommandGroup\n"
        "@click.group(cls=CommandGroup, invoke_without_command=True)\n"
        "def main():\n"
        "    threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    code = "from varedit_runtime.terminal.start import _start; _start('stuck')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (143, "Interrupted.\n")


def test_an_interrupt_may_come_as_another_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def imported(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as error:  # as extension modules do
            raise ImportError("initialisation failed") from error

    monkeypatch.setattr("varedit_runtime.commands.prepare.picture_size", imported)
    handler = signal.getsignal(signal.SIGINT)
    assert exit_code("grids") == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert signal.getsignal(signal.SIGINT) == handler


def test_an_interrupt_at_any_time_leaves_no_folder(tmp_path: Path) -> None:
    """Interrupt where Python looks for signals, at the 1st, 2nd, 3rd ... call or return from C."""
    left = places = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal left
        left -= event != "return"
        if left == 0:
            raise KeyboardInterrupt

    while left <= 0:
        places += 1
        left = places
        with suppress(KeyboardInterrupt, OSError):  # rmtree may close a descriptor twice
            try:
                sys.setprofile(profile)
                with atomic_file(tmp_path / "file") as whole:
                    whole.write_bytes(b"x")
            finally:
                sys.setprofile(None)
        assert {path.name for path in tmp_path.iterdir()} <= {"file"}, places
    assert places > 50


# Disks


@pytest.mark.parametrize(
    "words",
    (
        ("prepare", "photo.png", "-o", "out.png"),
        ("photo.png", "add a hat", "--threads", "1"),
        ("photo.png", "add a hat", "--threads", "1", "--previews", "previews"),
        ("bench", embedded(), "--repeat", "1", "--threads", "1", "--json", "report.json"),
    ),
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    words: tuple[object, ...],
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photo.parent)
    with file_size_limit(50):
        assert exit_code(*words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: ") and error.endswith(" cannot be written: File too large")
    assert list(photo.parent.iterdir()) == [photo]


def test_a_device_is_not_replaced_by_a_file(photo: Path, tmp_path: Path) -> None:
    """Where the user may do all, as in containers, a rename would do so."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for target in (pipe, Path(os.devnull)):
        assert exit_code("prepare", photo, "-o", target) == 1
    assert pipe.is_fifo() and Path(os.devnull).is_char_device()

"""`varedit-run` in scripts: standard streams, errors as JSON, names that exist, several turns."""

import io
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import commands
import pytest
from bundles import TEXT_TOKENS, small_bundle
from click.testing import CliRunner, Result
from commands import fails, spoken
from editing import picture
from PIL import Image
from terminals import read_terminal

from varedit_runtime.cli import main
from varedit_runtime.commands import results
from varedit_runtime.commands.results import edited_names, write_steps
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import PictureError
from varedit_runtime.files import atomic_file


@pytest.fixture(autouse=True)
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    picture(30, 20).save("photo.png")
    return Path("photo.png")


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def run(*words: object, **more: Any) -> Result:
    return commands.run("--seed", 7, *words, **more)


def process(*words: object, **streams: Any) -> "subprocess.Popen[bytes]":
    return commands.start("--seed", 7, *words, **streams)


# Standard input and output


def test_a_picture_goes_through_pipes(photo: Path) -> None:
    with photo.open("rb") as source:
        done = process("-", "red", "-o", "-", stdin=source, stdout=-1, stderr=-1)
    stdout, stderr = done.communicate()
    assert done.returncode == 0
    assert run(photo, "red").exit_code == 0
    assert stdout == Path("photo-edited.png").read_bytes()
    (told,) = spoken(stderr.decode())
    assert told.startswith("-: 30 x 20, seed 7, ")


def test_a_stream_and_a_file_can_be_combined(photo: Path) -> None:
    assert run("-", "red", "-o", "out.bmp", input=photo.read_bytes()).exit_code == 0
    done = run(photo, "red", "-o", "-", "--compare", "both.png")
    with Image.open(io.BytesIO(done.stdout_bytes)) as streamed, Image.open("out.bmp") as written:
        assert streamed.format == "PNG" and streamed.tobytes() == written.tobytes()
    assert names() == ["both.png", "out.bmp", "photo.png"]


def test_a_file_named_like_a_stream_is_written_with_a_slash(photo: Path) -> None:
    photo.rename("-")
    assert run("./-", "red", "-o", "out.png", input=b"").exit_code == 0
    fails(run("-", "red", "-o", "x.png", input=b"x"), "the picture cannot be read: it is not a")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-", "red"), "name the result of standard input: -o FILE, or -o -"),
        (("photo.png", "red", "-o", "-", "--json"), "-o - and --json would both write to"),
        (
            ("photo.png", "red", "-o", "-", "--then", "blue", "--keep-steps"),
            "--keep-steps needs names: give -o a file",
        ),
        (("photo.png", "red", "--keep-steps"), "--keep-steps is for the pictures between turns"),
        (("photo.png", "red", "--then", "blue", "--previews", "p"), "leave out --then"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], message: str) -> None:
    fails(run(*words), message)


def test_terminals_give_and_take_no_pictures() -> None:
    ours, theirs = pty.openpty()
    done = process("-", "red", "-o", "out.png", stdin=theirs, stderr=-1)
    _, stderr = done.communicate(timeout=60)
    assert done.returncode == 1
    assert stderr == (
        b"Error: standard input is no picture: pipe a file into the command, or name one\n"
    )
    done = process("photo.png", "red", "-o", "-", stdout=theirs, stderr=-1)
    _, stderr = done.communicate(timeout=60)
    assert done.returncode == 1
    assert stderr.startswith(b"Error: a terminal shows no picture: send standard output into")
    os.close(ours)
    os.close(theirs)


def test_a_pipe_that_nobody_reads_is_no_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = process("photo.png", "red", "-o", "-", stdout=writing, stderr=-1)
    os.close(writing)
    _, stderr = done.communicate()
    assert done.returncode == 1 and spoken(stderr.decode()) == []
    with open("/dev/full", "wb") as full:
        done = process("photo.png", "red", "-o", "-", stdout=full, stderr=-1)
    _, stderr = done.communicate()
    assert done.returncode == 1
    said = "Error: the output cannot be written: No space left on device"
    assert spoken(stderr.decode()) == [said]


# Errors as JSON


@pytest.mark.parametrize(
    ("words", "kind", "message", "code"),
    [
        (("missing.png", "red"), "PictureError", "missing.png cannot be read: No such file", 1),
        (("photo.png", "red", "--guidance-scale", "x"), "ConfigError", "--guidance-scale is", 1),
        (("photo.png", "x" * TEXT_TOKENS), "TextError", "the instruction has", 1),
        (("photo.png", "red", "--sede", "7"), "UsageError", "No such option '--sede'", 2),
        (("photo.png",), "UsageError", "Missing argument 'INSTRUCTION'", 2),
        (("photo.png", "red", "--seed", "x"), "UsageError", "Invalid value for '--seed'", 2),
        (("photo.png", "red", "--list", "l.csv"), "UsageError", "--list names pictures and", 2),
    ],
)
def test_an_error_is_one_object(words: tuple[str, ...], kind: str, message: str, code: int) -> None:
    done = run("--json", *words)
    assert done.exit_code == code
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["exit_code"]) == (kind, code)
    assert error["message"].startswith(message)
    assert done.stderr.splitlines()[-1] == f"Error: {error['message']}"
    assert run(*words).stdout == ""


def test_an_interrupt_is_an_object_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Editor, "open", pressed)
    done = run("photo.png", "red", "--json")
    assert done.exit_code == 130
    expected = {"type": "KeyboardInterrupt", "message": "Interrupted.", "exit_code": 130}
    assert json.loads(done.stdout) == {"error": expected}


# Refused before the bundle is opened


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("red", "--seed", "-1"), "the seed is -1; it must be at least 0"),
        (("red", "--seed", 2**64), "it must be at least 0 and less than 2^64"),
        ((" ",), "the instruction is empty"),
        (("red", "--then", ""), "the instruction is empty"),
        (("red", "--guidance-scale", "nan"), "guidance_scale is nan; it must be finite"),
        (("red", "--guidance-scale", "1,inf"), "guidance_scale is inf; it must be finite"),
        (("red", "--temperature", "0"), "temperature is 0.0; it must be over 0"),
        (("red", "--temperature", "1,0"), "temperature is [1.0, 0.0]; it must be over 0"),
    ],
)
def test_values_that_no_bundle_takes_are_refused_before_one_is_sought(
    words: tuple[object, ...], message: str
) -> None:
    done = CliRunner().invoke(main, ["photo.png", *map(str, words), "--bundle", "missing"])
    assert done.exit_code == 1 and done.stderr.startswith("Error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_further_instructions_are_tokenised_before_the_first_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Editor, "edit", None)
    fails(run("photo.png", "red", "--then", "x" * 99), "the instruction has 100 tokens")


# Names that exist


def test_a_second_result_takes_another_name(photo: Path) -> None:
    for number in ("", "-2", "-3"):
        done = run(photo, "red")
        assert done.stdout.startswith(f"photo-edited{number}.png: ")
    assert names() == ["photo-edited-2.png", "photo-edited-3.png", "photo-edited.png", "photo.png"]
    Path("photo-edited-2.png").write_bytes(b"")
    assert run(photo, "red", "--overwrite").stdout.startswith("photo-edited.png: ")
    assert len(names()) == 4


@pytest.mark.parametrize(
    ("existing", "options"),
    [
        ("out.png", ("-o", "out.png")),
        ("both.png", ("--compare", "both.png")),
        ("previews/scale-02.png", ("--previews", "previews")),
        ("out-step-1.png", ("-o", "out.png", "--then", "blue", "--keep-steps")),
    ],
)
def test_a_file_that_exists_is_replaced_only_if_that_is_said(
    existing: str, options: tuple[str, ...], photo: Path
) -> None:
    path = Path(existing)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"dear")
    said = f"{existing} exists: choose another name, or replace it with --overwrite"
    fails(run(photo, "red", *options), said)
    assert path.read_bytes() == b"dear" and len(names()) == 2
    assert run(photo, "red", *options, "--overwrite").exit_code == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("option", "name"),
    [("-o", "out.png"), ("--compare", "both.png"), ("--previews", "previews")],
)
def test_a_file_that_comes_during_the_edit_is_kept(
    option: str, name: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(name) if option != "--previews" else Path(name, "scale-00.png")
    opened = Editor.open

    def slowly(*given: Any, **more: Any) -> Editor:
        path.write_bytes(b"dear")
        return opened(*given, **more)

    monkeypatch.setattr(Editor, "open", slowly)
    fails(run(photo, "red", option, name), f"{path} exists: choose another name")
    assert path.read_bytes() == b"dear"


def test_a_name_that_another_process_takes_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = os.path.lexists
    image = picture(4, 4)
    Path("photo-edited.png").write_bytes(b"dear")
    Path("photo-edited-2-step-1.png").write_bytes(b"dear")
    monkeypatch.setattr(results.os.path, "lexists", lambda path: False)
    path = write_steps(edited_names(Path(), "photo"), [image, image], overwrite=False)
    monkeypatch.setattr(results.os.path, "lexists", seen)
    assert path == Path("photo-edited-3.png")
    dear = [name for name in names() if Path(name).read_bytes() == b"dear"]
    assert dear == ["photo-edited-2-step-1.png", "photo-edited.png"]
    assert len(names()) == 5  # of the names that were not free, nothing is left


def test_steps_are_written_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    write = results.write_encoded

    def full(content: bytes, path: Path, replace: bool) -> None:
        if path.name == "out.png":
            raise PictureError("the disk is full")
        write(content, path, replace)

    monkeypatch.setattr(results, "write_encoded", full)
    with pytest.raises(PictureError):
        write_steps([Path("out.png")], [picture(4, 4)] * 3, overwrite=False)
    assert names() == ["photo.png"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_only_where_there_is_none(
    links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlinkable(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:  # as on FAT
        monkeypatch.setattr(Path, "hardlink_to", unlinkable)
    with atomic_file(Path("new"), replace=False) as whole:
        whole.write_bytes(b"new")
    Path("link").symlink_to("nowhere")
    for name in ("new", "link", "photo.png"):
        with pytest.raises(FileExistsError), atomic_file(Path(name), replace=False) as whole:
            whole.write_bytes(b"other")
    assert Path("new").read_bytes() == b"new" and not os.path.exists("nowhere")
    assert names() == ["link", "new", "photo.png"]


def test_a_file_that_cannot_be_moved_leaves_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input"), atomic_file(Path("new"), replace=False) as whole:
        whole.write_bytes(b"new")
    assert names() == ["photo.png"]


def test_a_folder_takes_a_name_as_a_file_does(photo: Path) -> None:
    Path("photo-edited.png").mkdir()
    path = write_steps(edited_names(Path(), "photo"), [picture(4, 4)], overwrite=False)
    assert path == Path("photo-edited-2.png")
    assert run(photo, "red").stdout.startswith("photo-edited-3.png: ")


def test_a_name_is_free_if_those_of_its_steps_are(photo: Path) -> None:
    Path("photo-edited-step-1.png").write_bytes(b"dear")
    done = run(photo, "red", "--then", "blue", "--keep-steps")
    assert done.stdout.startswith("photo-edited-2.png: "), done.output
    assert Path("photo-edited-step-1.png").read_bytes() == b"dear"


# Several instructions in turn


def test_instructions_in_turn_edit_the_result_of_the_one_before(photo: Path) -> None:
    done = run(photo, "red", "--then", "blue", "--then", "green", "--keep-steps", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["instruction"], told["then"], told["seed"]) == ("red", ["blue", "green"], 7)
    with Editor.open(small_bundle(), threads=1) as editor:
        expected = photo
        for name, prompt in (("-step-1", "red"), ("-step-2", "blue"), ("", "green")):
            expected = editor.edit(expected, prompt, seed=7).image  # type: ignore[assignment]
            with Image.open(f"photo-edited{name}.png") as edited:
                assert edited.tobytes() == expected.tobytes()  # type: ignore[attr-defined]
    assert len(names()) == 4
    assert run(photo, "red", "--then", "blue", "-o", "out.png").exit_code == 0
    assert Path("out.png").read_bytes() == Path("photo-edited-step-2.png").read_bytes()


def test_steps_do_not_take_the_place_of_the_source(photo: Path) -> None:
    source = photo.rename("out-step-1.png")
    before = source.read_bytes()
    words = ("red", "--then", "blue", "--keep-steps", "--overwrite")
    fails(run(source, *words, "-o", "out.png"), "out-step-1.png is the source picture")
    Path("folder").mkdir()
    source = source.rename("folder/a-edited-step-1.png")
    Path("folder/a.png").write_bytes(before)
    done = run("folder/a.png", source, *words, "-o", "folder")
    assert done.stdout.startswith("folder/a-edited-2.png") and source.read_bytes() == before


def test_only_the_last_of_several_turns_is_reduced(photo: Path) -> None:
    Image.new("L", (30, 20), 255).save("mask.png")
    words = ("red", "--then", "blue", "--max-side", 15, "--keep-steps", "--mask", "mask.png")
    assert run(photo, *words).exit_code == 0
    with Image.open("photo-edited-step-1.png") as first, Image.open("photo-edited.png") as last:
        assert (first.size, last.size) == ((30, 20), (15, 10))


def test_several_pictures_are_edited_in_turn_too(photo: Path) -> None:
    Path("other.png").write_bytes(photo.read_bytes())
    words = (photo, "other.png", "red", "--then", "blue", "--keep-steps", "-o", "out")
    for finished in (0, 2):
        done = run(*words)
        assert done.exit_code == 0 and done.stdout.count("finished") == finished
    assert len(list(Path("out").glob("*-edited-step-1.png"))) == 2


def test_a_terminal_sees_one_bar_over_all_turns(photo: Path) -> None:
    ours, theirs = pty.openpty()
    done = process(photo, "red", "--then", "blue", stdout=-1, stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    done.communicate()
    assert done.returncode == 0
    assert shown.count(b"100%") == 1 and b" 50%" in shown

"""`varedit-run` with several pictures, folders and lists: names, resuming, failures, progress."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from bundles import TEXT_TOKENS, small_bundle
from click.testing import Result
from commands import fails, run, slowed, spoken, start
from disks import file_size_limit
from editing import pair_bundle, picture, plain_bundle
from PIL import Image
from terminals import read_terminal

from varedit_runtime.commands import several
from varedit_runtime.commands.orders import LONGEST_LINE, Order, Orders
from varedit_runtime.commands.record import RECORD, Record
from varedit_runtime.commands.results import edited_names
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import ConfigError, VareditError


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with three photos of different sizes."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        picture(30 + number, 20).save(folder / name)
    return folder


def names(folder: str | Path = "out") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def same(one: str | Path, other: str | Path) -> bool:
    return Path(one).read_bytes() == Path(other).read_bytes()


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


EDITED = ["a-edited.png", "b-edited.png", "c-edited.png"]


# What is edited


@pytest.mark.parametrize("words", [["photos"], ["photos/a.png", "photos/b.png", "photos/c.png"]])
def test_several_pictures_and_folders_go_into_a_folder(words: list[str]) -> None:
    Path("photos/notes.txt").write_text("no picture")
    Path("photos/._a.png").write_text("of another system")
    Path("photos/more.png").mkdir()
    done = run(*words, "red", "--seed", 7, "-o", "out")
    assert done.exit_code == 0, done.output
    assert names() == [*EDITED, RECORD]
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [
        f"out/{name}" for name in EDITED
    ]
    assert spoken(done.stderr) == [] and done.stderr.count("weights are random") == 1
    assert run("photos/b.png", "red", "--seed", 7, "-o", "alone.png").exit_code == 0
    assert same("alone.png", "out/b-edited.png")


def test_one_picture_goes_into_a_folder_that_exists_or_is_written_with_a_slash() -> None:
    assert run("photos/a.png", "red", "-o", "out/").exit_code == 0
    assert run("photos/b.png", "red", "-o", "out").exit_code == 0
    assert names() == ["a-edited.png", "b-edited.png", RECORD]


LISTS = {
    "list.csv": "\ufeffimage, instruction,seed,negative_prompt,mask\r\n"
    'a.png,"red, and more",7,,\r\n\r\nb.png,blue,8,a dog,\r\nc.png,red,,,white.png\r\n',
    "german.csv": "image;instruction;seed;negative_prompt;mask\n"
    "a.png;red, and more;7;;\nb.png;blue;8;a dog;\nc.png;red;;;white.png\n",
    "list.jsonl": '{"image": "a.png", "instruction": "red, and more", "seed": 7}\n'
    '{"image": "b.png", "instruction": "blue", "seed": 8, "negative_prompt": "a dog"}\n'
    '{"image": "c.png", "instruction": "red", "seed": null, "mask": "white.png"}',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_pictures_and_what_is_wanted_of_each(name: str) -> None:
    Image.new("L", (32, 20), 255).save("photos/white.png")
    listed = Path("photos", name)
    listed.write_bytes(LISTS[name].encode())
    done = run("--list", listed, "--seed", 9, "-o", "out", "--json")
    assert done.exit_code == 0, done.output
    told = [(t["input"], t["instruction"], t["seed"], t["negative_prompt"]) for t in lines(done)]
    assert told == [
        ("photos/a.png", "red, and more", 7, None),
        ("photos/b.png", "blue", 8, "a dog"),
        ("photos/c.png", "red", 9, None),
    ]
    assert [t["mask"] for t in lines(done)] == [None, None, "photos/white.png"]
    with Editor.open(small_bundle(), threads=1) as editor:
        expected = editor.edit("photos/b.png", "blue", negative_prompt="a dog", seed=8)
    with Image.open("out/b-edited.png") as edited:
        assert edited.tobytes() == expected.image.tobytes()


BAD_LISTS = {
    "a column": ("l.csv", "image,instruction,sead\n", "line 1: the column 'sead' is not one of"),
    "twice": ("l.csv", "image,image\n", "line 1: a column is named twice"),
    "no instruction": ("l.csv", "image,instruction\na.png\n", "line 2: .*field `instruction`"),
    "empty instruction": ("l.csv", "image,instruction\na.png, \n", "line 2: the instruction is"),
    "many cells": ("l.csv", "image,instruction\na.png,red,7\n", "line 2: it has 3 cells for 2"),
    "a quote": ("l.csv", 'image,instruction\na.png,"red\n', "line 2: unexpected end of data"),
    "a seed": ("l.csv", "image,instruction,seed\na.png,red,x\n", "line 2: the seed is 'x', not a"),
    "no seed": ("l.csv", "image,instruction,seed\na.png,red,null\n", "line 2: the seed is 'null'"),
    "a broken seed": ("l.csv", "image,instruction,seed\na.png,red,7.0\n", "line 2: the seed is"),
    "a low seed": ("l.csv", "image,instruction,seed\na.png,red,-1\n", "line 2: the seed is -1"),
    "a long seed": ("l.csv", f"image,instruction,seed\na.png,red,{'9' * 6000}\n", "line 2: "),
    "nothing": ("l.csv", "image,instruction\n", "l.csv lists no edits"),
    "no lines": ("l.jsonl", "", "l.jsonl lists no edits"),
    "a field": ("l.jsonl", '{"image": "a", "instruction": "b", "out": 1}', "line 1: .*`out`"),
    "a type": ("l.jsonl", '\n{"image": 1}', "line 2: Expected `str`, got `int`"),
    "no object": ("l.jsonl", "[" * 60000, "line 1: Expected `object`"),
    "a long line": ("l.jsonl", " " * (LONGEST_LINE + 1), f"line 1: it has over {LONGEST_LINE}"),
    "another kind": ("l.txt", "a.png red", "l.txt is no list of edits: its name must end in .csv"),
    "latin-1": ("l.csv", "image,instruction\nä\udcff,red", "line 2: 'utf-8' codec can't decode"),
    "a folder": ("l.csv/x", "", "l.csv cannot be read: Is a directory"),
    "above": ("l.csv", "image,instruction\n../x.png,red\n", "line 2: '../x.png' is not in the l"),
    "absolute": ("l.csv", "image,instruction\n/etc/passwd,red\n", "line 2: '/etc/passwd' is not"),
    "a link": ("l.csv", "image,instruction\nlink.png,red\n", "line 2: 'link.png' is not in the"),
    "a mask": ("l.csv", "image,instruction,mask\na.png,red,../x\n", "line 2: '../x' is not in"),
    "a NUL": ("l.jsonl", '{"image": "a\\u0000", "instruction": "b"}', "line 1: "),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_bad_list_is_refused_before_anything_is_opened(
    name: str, text: str, message: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "open", None)
    (photos / "link.png").symlink_to("/etc/passwd")
    path = photos / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message) as caught:
        Orders(Order(Path(), ""), listed=photos / Path(name).parts[0]).checked()
    assert str(caught.value).isprintable()
    fails(run("--list", photos / Path(name).parts[0], "-o", "out"), "photos/l.")
    assert not Path("out").exists()


def test_a_list_may_name_pictures_below_itself_by_any_path(photos: Path) -> None:
    (photos / "here.png").symlink_to("a.png")
    rows = [photos.resolve() / "a.png", "photos/../photos/b.png", "photos/here.png"]
    Path("list.csv").write_text(
        "".join(f"{row},red\n" for row in ("image", *rows)).replace(
            "image,red", "image,instruction"
        )
    )
    images = [order.image for order in Orders(Order(Path(), ""), listed=Path("list.csv"))]
    assert [image.resolve().name for image in images] == ["a.png", "b.png", "a.png"]


def test_a_list_is_read_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    class File:
        def __enter__(self) -> "File":
            return self

        def __exit__(self, *_: object) -> None: ...

        def readline(self, limit: int) -> bytes:
            nonlocal taken
            taken += 1
            return b'{"image": "a.png", "instruction": "red"}\n'

    monkeypatch.setattr(Path, "open", lambda *_: File())
    orders = iter(Orders(Order(Path(), ""), listed=Path("endless.jsonl")))
    assert [next(orders).instruction for _ in range(3)] == ["red"] * 3
    assert taken == 3


def test_fuzz_lists(cases: Callable[[int], Iterator[Random]]) -> None:
    for random in cases(300):
        name = random.choice([*LISTS])
        text = bytearray(LISTS[name].encode())
        for _ in range(random.randrange(1, 6)):
            at = random.randrange(len(text))
            piece = random.choice(
                [b'"', b",", b"\n", b"\r", b"\0", b"..", b"/", b"{", b"\xff", b""]
            )
            text[at : at + random.randrange(9)] = piece * random.choice([1, 1, 1000])
        path = Path("photos", Path(name).name)
        path.write_bytes(text)
        try:
            for order in Orders(Order(Path(), ""), listed=path):
                inside = Path(os.path.realpath(order.image))
                assert inside.is_relative_to(Path("photos").resolve())
                assert order.instruction.strip()
        except VareditError as error:
            assert str(error).isprintable()


# Names, and results that exist


def test_results_are_numbered_and_never_replaced() -> None:
    first = run("photos", "red", "--seed", 7, "-o", "out")
    second = run("photos", "blue", "--seed", 7, "-o", "out")
    assert first.exit_code == second.exit_code == 0
    assert names() == sorted([*EDITED, *(n.replace(".png", "-2.png") for n in EDITED), RECORD])
    Path("photos/a.jpg").write_bytes(Path("photos/a.png").read_bytes())
    done = run("photos/a.png", "photos/a.jpg", "green", "-o", "twins")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "twins/a-edited.png",
        "twins/a-edited-2.png",
    ]


def test_overwriting_replaces_results_of_before_and_nothing_else() -> None:
    assert run("photos/a.png", "photos/b.png", "red", "-o", "out").exit_code == 0
    before = Path("out/a-edited.png").read_bytes()
    Path("out/a.png").write_bytes(Path("photos/a.png").read_bytes())
    words = ("out/a.png", "photos/a.png", "out/a-edited.png")
    done = run(*words, "blue", "-o", "out", "--overwrite")
    assert done.exit_code == 0, done.output
    # The first result is a source of this run, the second one of its results.
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "out/a-edited-2.png",
        "out/a-edited-3.png",
        "out/a-edited-edited.png",
    ]
    assert Path("out/a-edited.png").read_bytes() == before
    assert run("photos/b.png", "blue", "-o", "out", "--overwrite").exit_code == 0
    assert "b-edited-2.png" not in names()


def test_overwriting_edits_anew_what_is_finished() -> None:
    again = [run("photos/a.png", "red", "-o", "out/", "--overwrite", "--json") for _ in range(2)]
    first, second = (line for done in again for line in lines(done))
    assert first["output"] == second["output"] == "out/a-edited.png"
    assert first["seed"] != second["seed"] and "finished_before" not in second
    (kept,) = lines(run("photos/a.png", "red", "-o", "out/", "--json"))
    assert kept["finished_before"] and kept["seed"] == second["seed"]


# Resuming


def test_what_is_finished_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("photos", "red", "-o", "out")
    first = run(*words, "--json")
    Path("out/b-edited.png").unlink()
    Path("out/c-edited.png").write_bytes(b"changed")
    done = run(*words, "--json")
    assert done.exit_code == 0
    assert [told.get("finished_before", False) for told in lines(done)] == [True, False, False]
    assert [told["output"] for told in lines(done)] == [
        "out/a-edited.png",
        "out/b-edited.png",
        "out/c-edited-2.png",
    ]
    assert lines(done)[0]["seed"] == lines(first)[0]["seed"]
    monkeypatch.setattr(Editor, "edit", None)
    shutil.move("photos", "moved")
    assert "finished before, seed" in run("moved", *words[1:]).stdout


CHANGES: dict[str, tuple[object, ...]] = {
    "instruction": ("blue",),
    "seed": ("red", "--seed", 8),
    "negative": ("red", "--negative-prompt", "dog"),
    "guidance": ("red", "--guidance-scale", 2),
    "temperature": ("red", "--temperature", 2),
    "then": ("red", "--then", "blue"),
    "size": ("red", "--max-side", 10),
    "mask": ("red", "--mask", "mask.png"),
}


def test_another_edit_never_takes_the_results_of_one() -> None:
    Image.new("L", (30, 20), 255).save("mask.png")
    assert run("photos/a.png", "red", "-o", "out/").exit_code == 0
    for number, words in enumerate(CHANGES.values(), 2):
        done = run("photos/a.png", *words, "-o", "out")
        assert done.stdout.startswith(f"out/a-edited-{number}.png: "), done.output
    assert "finished" not in run("photos/a.png", "red", "-o", "out", bundle=plain_bundle).stdout
    picture(31, 20).save("photos/a.png")
    assert "finished" not in run("photos/a.png", "red", "-o", "out").stdout
    assert "finished" in run("photos/a.png", "red", "-o", "out").stdout


def test_equal_lines_of_a_list_are_edits_of_their_own() -> None:
    Path("photos/list.csv").write_text("image,instruction\na.png,red\na.png,red\n")
    for _ in range(2):
        assert run("--list", "photos/list.csv", "-o", "out").exit_code == 0
        assert names() == ["a-edited-2.png", "a-edited.png", RECORD]


def test_an_equal_line_does_not_take_the_result_of_another() -> None:
    """The line of a result that was never written names the file that another edit has made."""
    Path("photos/list.csv").write_text("image,instruction,seed\na.png,red,7\na.png,red,7\n")
    assert run("--list", "photos/list.csv", "-o", "whole").exit_code == 0
    Path("out").mkdir()
    first, _ = Path("whole", RECORD).read_text().splitlines()
    Path("out", RECORD).write_text(first + "\n")
    assert run("--list", "photos/list.csv", "-o", "out").exit_code == 0
    assert names() == ["a-edited-2.png", "a-edited.png", RECORD]


def test_a_name_that_was_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def noted(folder: Path, stem: str) -> Iterator[Path]:
        for path in edited_names(folder, stem):
            tried.append(path.name)
            yield path

    monkeypatch.setattr(several, "edited_names", noted)
    Path("photos/list.csv").write_text("image,instruction\n" + "a.png,red\n" * 4)
    assert run("--list", "photos/list.csv", "-o", "out").exit_code == 0
    assert tried == ["a-edited.png", "a-edited-2.png", "a-edited-3.png", "a-edited-4.png"]


@pytest.mark.parametrize(
    "damage",
    [b'{"output": "a', b"\n[]\n", b'{"output": "../x", "key": "k", "sha256": "", "seed": 1}'],
)
def test_a_damaged_record_is_read_as_far_as_it_goes(damage: bytes) -> None:
    assert run("photos/a.png", "red", "-o", "out/").exit_code == 0
    with Path("out", RECORD).open("ab") as file:
        file.write(damage)
    for finished in (1, 3):
        done = run("photos", "red", "-o", "out")
        assert done.exit_code == 0 and "a-edited.png: finished" in done.stdout
        assert done.stdout.count("finished") == finished


@pytest.mark.parametrize("name", ["", ".", "..", "\0", "\ud800", "/", "folder", "../photos/a.png"])
def test_a_record_names_files_in_its_folder_alone(name: str) -> None:
    Path("out/folder").mkdir(parents=True)
    told = {"output": name, "key": "k", "seed": 1}
    told["sha256"] = sha256(Path("photos/a.png").read_bytes()).hexdigest()
    Path("out", RECORD).write_text(json.dumps(told) + "\n")
    assert Record(Path("out")).take("k") is None


@pytest.mark.parametrize("name", ["a.png", "mask.png"])
def test_what_is_recorded_is_what_was_edited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read once: what it holds after its digest was taken is not edited."""
    key_of = several.key_of

    def replacing(*arguments: Any) -> str:
        key = key_of(*arguments)
        picture(50, 40).save(Path("photos", name))
        return key

    Image.new("L", (30, 20), 255).save("photos/mask.png")
    monkeypatch.setattr(several, "key_of", replacing)
    done = run("photos/a.png", "red", "-o", "out/", "--mask", "photos/mask.png")
    assert done.exit_code == 0, done.output
    with Image.open("out/a-edited.png") as edited:
        assert edited.size == (30, 20)


@pytest.mark.parametrize("target", ["victim.txt", "new.txt"])
def test_the_record_is_no_way_to_a_file_elsewhere(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "open", None)  # it is told before work is spent
    Path("victim.txt").write_text("mine")
    Path("out").mkdir()
    Path("out", RECORD).symlink_to(f"../{target}")
    told = f"out/{RECORD} cannot be read: it is a link; delete it"
    fails(run("photos", "red", "-o", "out"), told)
    assert Path("victim.txt").read_text() == "mine" and not Path("new.txt").exists()


def test_names_that_are_no_text_are_found_again() -> None:
    odd = Path("photos", os.fsdecode(b"\xff.png"))
    shutil.copy("photos/a.png", odd)
    for expected in (0, 1):
        done = run(odd, "red", "-o", "out/")
        assert done.exit_code == 0 and done.stdout.count("finished") == expected


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_loses_the_picture_in_work_alone(sent: signal.Signals) -> None:
    Path("photos/list.csv").write_text(
        "image,instruction,seed\na.png,red,7\nb.png,red,8\nc.png,red,9\n"
    )
    words = ("--list", "photos/list.csv", "-o", "out")
    process = start(
        *words,
        code=slowed("seed == 8 and scale == 2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert any(b"under way" in line for line in process.stdout)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent
        assert stderr.decode().splitlines()[-1] == "Interrupted."
    assert names() == ["a-edited.png", RECORD]
    done = run(*words)
    assert done.exit_code == 0 and done.stdout.count("finished") == 1
    assert names() == [*EDITED, RECORD]


def test_two_commands_at_once_share_a_folder() -> None:
    both = [start("photos", text, "-o", "out", stdout=subprocess.PIPE) for text in ("red", "blue")]
    told = [process.communicate(timeout=120)[0].decode().splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    written = {line.split(": ")[0] for lines in told for line in lines}
    assert len(written) == 6 and len(names()) == 7
    for text in ("red", "blue"):
        assert run("photos", text, "-o", "out").stdout.count("finished") == 3


# Failures


def test_a_picture_that_fails_does_not_stop_the_others(photos: Path) -> None:
    (photos / "b.png").write_bytes(b"no picture")
    os.mkfifo(photos / "pipe.png")
    done = run("photos", "red", "--seed", 5, "-o", "out", "--json")
    fails(
        done,
        "picture 2 of 4: photos/b.png cannot be read: it is not a picture",
        "picture 4 of 4: photos/pipe.png cannot be read: it is no file",
        "2 of 4 pictures could not be edited",
    )
    assert names() == ["a-edited.png", "c-edited.png", RECORD]
    error = lines(done)[1]
    assert (error["input"], error["output"], error["seed"]) == ("photos/b.png", None, 5)
    assert error["error"]["type"] == "PictureError" and error["error"]["exit_code"] == 1
    assert error["error"]["message"].startswith("picture 2 of 4: photos/b.png cannot be read")
    picture(9, 9).save(photos / "b.png")
    (photos / "pipe.png").unlink()
    assert run("photos", "red", "--seed", 5, "-o", "out").stdout.count("finished") == 2


def test_names_of_files_say_nothing_to_the_terminal_on_stderr() -> None:
    odd = Path("photos/\033]0;title\a\nError: mine.png")
    odd.write_bytes(b"no picture")
    done = run(odd, "red", "-o", "out/", "--json")
    shown = r"photos/\x1b]0;title\x07 Error: mine.png"
    fails(done, re.escape(f"picture 1 of 1: {shown} cannot be read"), "1 of 1 pictures could not")
    assert lines(done)[0]["error"]["message"].startswith(f"picture 1 of 1: {shown} cannot be read")
    done = run("photos/a.png", "red", bundle=lambda: Path("no\033]0;title\a"))
    assert done.exit_code == 1 and all(map(str.isprintable, done.stderr.splitlines()))


def test_names_of_files_are_told_on_stdout_as_they_are(photos: Path) -> None:
    photos.joinpath("a.png").rename(photos / "n\033[31mame.png")
    done = run("photos", "red", "-o", "out/")
    assert "out/n\033[31mame-edited.png: " in done.stdout


def test_a_batch_with_one_that_fails_is_edited_without_it() -> None:
    rows = ["a.png,red", f"b.png,{'x' * TEXT_TOKENS}", "c.png,red"]
    Path("photos/list.csv").write_text("\n".join(["image,instruction", *rows]))
    done = run("--list", "photos/list.csv", "-o", "out", "--seed", 7, bundle=pair_bundle)
    told = f"picture 2 of 3, photos/b.png: the instruction has {TEXT_TOKENS + 1} tokens"
    fails(done, told, "1 of 3 pictures could not be edited")
    assert names() == ["a-edited.png", "c-edited.png", RECORD]


def test_batches_have_the_size_of_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    edit = Editor.edit

    def counted(self: Editor, image: list[Image.Image], *rest: Any, **more: Any) -> Any:
        sizes.append(len(image))
        return edit(self, image, *rest, **more)

    monkeypatch.setattr(Editor, "edit", counted)
    assert run("photos", "red", "-o", "out", "--seed", 7, bundle=pair_bundle).exit_code == 0
    assert sizes == [2, 1]
    assert run("photos", "red", "-o", "alone", "--seed", 7).exit_code == 0
    with Image.open("out/b-edited.png") as one, Image.open("alone/b-edited.png") as other:
        assert one.size == other.size == (31, 20)


def test_a_full_disk_ends_the_run() -> None:
    with file_size_limit(50):
        done = run("photos", "red", "-o", "out")
    fails(done, f"out/{RECORD} cannot be written: No space left on device")
    assert names() == [RECORD]
    assert run("photos", "red", "-o", "out").exit_code == 0
    assert run("photos", "red", "-o", "out").stdout.count("finished") == 3


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no folder": (("photos", "red"), "several results need a folder: name it with -o"),
    "to stdout": (("photos", "red", "-o", "-"), "standard output takes one picture"),
    "a file": (("photos", "red", "-o", "out.png"), "out.png is no folder, and several results"),
    "missing": (("missing/", "red", "-o", "new"), "missing cannot be read: No such file"),
    "no slash": (("photos/a.png", "red", "-o", "new"), "end it in .png for a picture, or in / for"),
    "nowhere": (("photos", "red", "-o", "no/out"), "no/out cannot be made a folder: No such file"),
    "in a bundle": (("photos", "red", "-o", small_bundle), "it would lie in the bundle"),
    "the same": (("photos", "red", "-o", "photos/"), "photos/ has the pictures"),
    "no pictures": (("empty", "red", "-o", "out"), "empty has no pictures"),
    "two instructions": (
        ("photos/a.png", "red", "blue", "-o", "out"),
        "there is no picture 'red'; an instruction after the first is given with --then",
    ),
    "stdin too": (("-", "photos/a.png", "red", "-o", "out"), "must be the only picture"),
    "stdin in a folder": (("-", "red", "-o", "out/"), "has no name for a result in out/: give"),
    "compare": (("photos", "red", "-o", "out", "--compare", "c.png"), "are of one picture"),
    "previews": (("photos", "red", "-o", "out", "--previews", "p"), "are of one picture"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_at_once(words: tuple[object, ...], message: str) -> None:
    Path("empty").mkdir()
    fails(run(*(word() if callable(word) else word for word in words)), message)
    assert not Path("out").exists() and names("photos") == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--list", "l.csv", "photos", "red"), "--list names pictures and instructions: leave out"),
        (("--list", "l.csv", "red"), "--list names pictures and instructions: leave out"),
        (("photos/a.png", "photos/b.png"), "photos/b.png is a picture: the instruction comes last"),
        (("photos/a.png",), "Missing argument 'INSTRUCTION'"),
        (("bundels",), "no command 'bundels'; did you mean bundles?"),
        (("-o", "out"), "Missing argument 'IMAGE...'"),
    ],
)
def test_words_that_cannot_be_meant_are_wrong_usage(words: tuple[str, ...], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2 and message in done.stderr.splitlines()[-1]


# Progress


def test_a_terminal_sees_how_many_are_done_and_how_long_the_rest_takes() -> None:
    Path("photos/b.png").write_bytes(b"no picture")
    ours, theirs = pty.openpty()
    process = start("photos", "red", "-o", "out", stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    assert process.wait() == 1
    text = shown.decode()
    for told in ("editing", "1/3", "2/3", "3/3", "0 s left"):
        assert told in text
    # Each line begins where a bar was cleared.
    for line in ("out/a-edited.png: 30 x 20", "Error: picture 2 of 3", "out/c-edited.png"):
        assert f"\r\033[K{line}" in text

"""`varedit-run bundles`, and bundles by name in all commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import click
import pytest
from click.testing import CliRunner, Result
from editing import picture
from fake_bundles import publish, publish_random, publish_textless

from varedit_export.cli import main as export_main
from varedit_runtime.bundle import set_aside
from varedit_runtime.cli import main as run_main
from varedit_runtime.locate import RECORD, VARIABLE, data_folder, default_root, embedded
from varedit_runtime.terminal.command import BUNDLE
from varedit_serve.cli import main as serve_main

pytestmark = pytest.mark.usefixtures("home")


def run(*arguments: object, main: click.Group = run_main) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def rows(*options: str) -> dict[str, list[str]]:
    """Return the columns of every listed bundle by its name."""
    done = run("bundles", *options)
    assert done.exit_code == 0, done.output
    found = {}
    for line in done.stdout.splitlines()[1:]:
        mark, rest = line[0], line[1:].split("  ")
        columns = [column.strip() for column in rest if column]
        found[columns[0]] = [mark, *columns[1:]]
    return found


def test_the_list_shows_what_each_bundle_is(home: Path) -> None:
    publish(default_root() / "8b-512")
    publish_random(default_root() / "random")
    publish_textless(default_root() / "recording")
    (publish(default_root() / "damaged") / "tokenizer.json").unlink()
    found = rows()
    folder = str(default_root() / "8b-512")
    assert found["8b-512"][:4] == [" ", "tiny", "64", "fp32"]
    assert found["8b-512"][5:] == ["yes", folder]
    assert found["nano"][:4] == ["*", "nano", "128", "fp32"]
    assert found["nano"][4].endswith(" MB") and found["nano"][5:] == ["yes", str(embedded())]
    assert found["random"][5] == "no: its weights are random"
    assert found["recording"][5] == "no: it has no text encoder"
    assert found["damaged"][1:4] == ["?", "?", "?"] and "tokenizer.json" in found["damaged"][5]


def test_the_default_is_set_and_cleared_by_name_or_path(home: Path) -> None:
    publish(default_root() / "8b-512")
    elsewhere = publish(home / "elsewhere")
    assert "now uses 8b-512 by default; undo" in run("bundles", "--set", "8b-512").stderr
    assert [name for name, row in rows().items() if row[0] == "*"] == ["8b-512"]
    found = rows("--set", str(elsewhere))
    assert found[str(elsewhere)][0] == "*" and found["8b-512"][0] == " "
    cleared = run("bundles", "--clear")
    assert "varedit-run now uses nano by default" in cleared.stderr
    assert str(elsewhere) not in cleared.stdout
    assert "--set and --clear contradict" in run("bundles", "--clear", "--set", "nano").stderr
    assert run("bundles", "--set", "missing").exit_code == 1


def test_json_says_the_same_and_what_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(default_root() / "8b-512")
    run("bundles", "--set", "8b-512")
    told = json.loads(run("bundles", "--json").stdout)
    nano, own = told["bundles"]
    assert (nano["name"], nano["default"], nano["can_edit"]) == ("nano", False, True)
    assert own | {"digest": "", "size": 0} == {
        "name": "8b-512",
        "path": str(default_root() / "8b-512"),
        "default": True,
        "can_edit": True,
        "unfit": None,
        "size": 0,
        "model": "tiny",
        "resolutions": ["64"],
        "precision": "fp32",
        "digest": "",
    }
    files = (default_root() / "8b-512").rglob("*")
    assert own["size"] == sum(file.stat().st_size for file in files if file.is_file())
    assert (told["used"], told["why"]) == (own["path"], "your default")
    monkeypatch.setenv(VARIABLE, "nano")
    told = json.loads(run("bundles", "--json").stdout)
    assert told["used"] == str(embedded()) and VARIABLE in told["why"]


def test_a_default_that_cannot_be_used_is_told_beside_the_list(home: Path) -> None:
    run("bundles", "--set", publish(home / "bundle"))
    (home / "bundle").rename(home / "gone")
    listed = run("bundles")
    assert listed.exit_code == 0 and "no: there is no bundle at" in listed.stdout
    assert f"your default bundle, {home / 'bundle'}, is gone" in listed.stderr
    assert json.loads(run("bundles", "--json").stdout)["used"] is None
    (data_folder() / RECORD).write_bytes(b"")
    listed = run("bundles")
    assert listed.exit_code == 0 and "is damaged" in listed.stderr and "*" not in listed.stdout
    picture(90, 60).save("photo.png")
    edit = run("photo.png", "add a hat")
    assert edit.exit_code == 1 and "`varedit-run bundles --set NAME`" in edit.stderr
    assert json.loads(run("bundles", "--json").stdout)["used"] is None


def test_a_bundle_whose_replacement_was_cut_short_is_listed_as_it_stands() -> None:
    bundle = publish(default_root() / "8b-512")
    run("bundles", "--set", "8b-512")
    before = rows()["8b-512"]
    aside = set_aside(bundle)
    aside.parent.mkdir(exist_ok=True)
    bundle.rename(aside)
    assert rows()["8b-512"] == before and before[0] == "*"


def test_a_default_that_was_set_through_a_link_is_listed_once(home: Path) -> None:
    publish(default_root() / "8b-512")
    (home / "link").symlink_to(default_root())
    found = rows("--set", str(home / "link" / "8b-512"))
    assert sorted(found) == ["8b-512", "nano"] and found["8b-512"][0] == "*"
    # Of two names for one bundle, the one that was chosen is marked.
    (default_root() / "8b").symlink_to("8b-512")
    found = rows("--set", "8b-512")
    assert [name for name, row in found.items() if row[0] == "*"] == ["8b-512"]


def test_every_command_takes_bundles_by_name() -> None:
    """All arguments and options called `bundle` have the one type that knows names."""
    commands = [*run_main.commands.items(), *export_main.commands.items(), ("serve", serve_main)]
    taken = []
    for name, command in commands:
        for parameter in command.params:
            if parameter.name == "bundle":
                assert parameter.type is BUNDLE, name
                taken.append(name)
    edits = ["edit", "bench", "serve", "evaluate", "bench"]  # attention takes a size as well
    shows = ["engines", "layers", "verify", "inspect", "doctor", "triton"]
    assert sorted(taken) == sorted(edits + shows)


def test_an_edit_and_inspect_by_name(home: Path) -> None:
    copytree(embedded(), default_root() / "mine")
    picture(90, 60).save("photo.png")
    done = run("photo.png", "add a hat", "--bundle", "mine", "--threads", 1)
    assert done.exit_code == 0
    assert f"bundle: {default_root() / 'mine'} (named by --bundle)\n" in done.stderr
    shown = run("inspect", "mine", main=export_main)
    assert shown.exit_code == 0 and shown.stdout == run("inspect", "nano", main=export_main).stdout


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("varedit-run", "photo.png hat --bundle "),
        ("varedit-run", "bundles --set "),
        ("varedit-run", "bench "),
        ("varedit-export", "inspect "),
    ],
)
def test_a_shell_completes_the_names(program: str, words: str) -> None:
    publish(default_root() / "8b-512")
    line = f"{program} {words}"
    environment = os.environ | {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()))}
    environment[f"_{program.replace('-', '_').upper()}_COMPLETE"] = "bash_complete"
    command = Path(sys.executable).with_name(program)
    done = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert {"plain,8b-512", "plain,nano", "dir,"} <= set(done.stdout.splitlines())


def test_without_folders_of_ones_own_editing_works(home: Path) -> None:
    picture(90, 60).save("photo.png")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
    environment["HOME"] = "/dev/null/nowhere"  # nothing can be made there
    command = Path(sys.executable).with_name("varedit-run")
    for words in (["photo.png", "add a hat", "--threads", "1"], ["bundles"]):
        done = subprocess.run([command, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["photo-edited.png", "photo.png"]

"""The `varedit-export` command: build, verify, inspect."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import small_bundle
from click.testing import CliRunner, Result
from fake_bundles import publish, publish_random

from varedit_export.cli import main
from varedit_export.errors import ParityError
from varedit_export.options import BuildOptions, VerifyOptions
from varedit_export.resolve_options import plan_of
from varedit_runtime.bundle import Bundle
from varedit_runtime.locate import RECORD, data_folder, default_root, embedded, find_bundle
from varedit_runtime.manifest import ParityLine
from varedit_runtime.terminal.streams import OutputError

RECORDINGS = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Become a user who never built anything."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("VAREDIT_BUNDLE", raising=False)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line_error(result: Result) -> str:
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    (error,) = (line for line in lines if not line.startswith("backend: "))  # what auto chose
    return f"{error}\n"


def test_a_recordings_bundle_agrees_with_the_recording(
    recording_folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    built = run(
        *("build", "--config", recording_folder / "config.json", "-o", bundle),
        *("--checkpoint", recording_folder / "var.pth"),
        *("--tokenizer", recording_folder / "vae.pth", "--text-tokens", "20"),
    )
    assert built.exit_code == 0, built.output
    assert built.stdout == f"{bundle}\n"
    assert "parity with the reference" in built.stderr
    assert find_bundle(None).path == embedded()

    report = tmp_path / "report.json"
    verified = run("verify", bundle, "--golden", recording_folder, "--report", report)
    assert verified.exit_code == 0, verified.output
    lines = json.loads(report.read_text())
    recorded = [line for line in lines if "against the recording, largest" in line["measure"]]
    settings = json.loads((recording_folder / "config.json").read_text())
    assert len(recorded) == {"0.06M": 7, "0.25M": 10}[settings["pn"]]
    assert all(line["value"] <= line["tolerance"] for line in lines)


def test_another_recordings_numbers_do_not_pass() -> None:
    other = RECORDINGS / "tiny2b-256"
    assert one_line_error(run("verify", small_bundle(), "--golden", other))


# The default


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[BuildOptions]:
    """Let builds publish a few bytes where they are asked to; return the options of each."""
    asked: list[BuildOptions] = []

    def build(options: BuildOptions, *_: object) -> Bundle:
        asked.append(options)
        target = Path(options.output) if options.output else default_root() / "8b-512"
        publish_any = publish if options.random_weights is None else publish_random
        return Bundle.open(publish_any(target))

    monkeypatch.setattr("varedit_export.build", build)
    return asked


@pytest.mark.usefixtures("built")
def test_a_bundle_among_ones_own_becomes_the_default() -> None:
    done = run("build", "--size", "8b", "--res", "512")
    assert done.exit_code == 0 and done.stdout == f"{default_root() / '8b-512'}\n"
    told = "varedit-run now uses 8b-512 by default; undo: varedit-run bundles --clear\n"
    assert told in done.stderr
    assert find_bundle(None).path == default_root() / "8b-512"


@pytest.mark.usefixtures("built")
def test_a_bundle_elsewhere_becomes_the_default_where_that_is_asked(tmp_path: Path) -> None:
    words = ("build", "--size", "8b", "--res", "512", "-o", tmp_path / "bun dle")
    done = run(*words)
    assert done.exit_code == 0 and find_bundle(None).path == embedded()
    asked = f"to make it varedit-run's default: varedit-run bundles --set '{tmp_path}/bun dle'\n"
    assert asked in done.stderr
    assert f"varedit-run now uses {tmp_path}/bun dle by default" in run(*words, "--default").stderr
    assert find_bundle(None).path == tmp_path / "bun dle"


@pytest.mark.usefixtures("built")
def test_a_whole_bundle_that_cannot_become_the_default_is_no_failure() -> None:
    (data_folder() / RECORD / "full").mkdir(parents=True)
    done = run("build", "--size", "8b", "--res", "512")
    assert done.exit_code == 0 and done.stdout == f"{default_root() / '8b-512'}\n"
    assert "cannot be written (Is a directory): name bundles with --bundle" in done.stderr


def test_random_weights_do_not_become_the_default(
    built: list[BuildOptions], tmp_path: Path
) -> None:
    words = ("build", "--size", "2b", "--res", "512", "--random-weights", "0")
    done = run(*words)
    assert done.exit_code == 0 and find_bundle(None).path == embedded()
    assert "cannot become varedit-run's default, its weights are random" in done.stderr
    # Nor do they take the place of the real ones, where no folder is named.
    assert plan_of(built[0]).request.target.name == "2b-512-random"
    assert "default" not in run(*words, "-o", tmp_path / "bundle").stderr


def test_what_cannot_edit_is_not_built_as_the_default(built: list[BuildOptions]) -> None:
    recorded = ("--config", RECORDINGS / "tiny2b-256" / "config.json")
    for weights, said in (
        (("--size", "2b", "--res", "512", "--random-weights", "0"), "random weights"),
        (recorded, "no text encoder"),
    ):
        error = one_line_error(run("build", *weights, "--default"))
        assert f"--default: a bundle with {said} is unfit for editing" in error
    assert not built


def test_inspect_says_what_is_in_a_bundle() -> None:
    shown = run("inspect", small_bundle())
    assert shown.exit_code == 0, shown.output
    for word in ("random, seed 0", "fp32", "96 x 96 px", "4 scales", "graphs/weights", "parity"):
        assert word in shown.output


def test_without_weights_the_error_says_which() -> None:
    error = one_line_error(run("build", "--size", "2b", "--res", "512"))
    assert "cannot reach the hub for hf://HiDream-ai/VAREdit" in error
    error = one_line_error(run("build", "--size", "125m", "--res", "512", "--checkpoint", "x.pth"))
    assert "size 125m needs --tokenizer and --text-encoder, each a path or hf://" in error
    error = one_line_error(run("build", "--size", "125m", "--res", "512", "--from", "me/x"))
    assert "--from: only 2b and 8b are published" in error
    error = one_line_error(run("convert", "--size", "2b", "--tokenizer", "vae.pth", "-o", "out"))
    assert error == "Error: convert needs --checkpoint and --text-encoder too\n"
    paths = ("--checkpoint", "a.pth", "--tokenizer", "b.pth", "--text-encoder", "c")
    for words in (("build", "--res", "512"), ("convert", "-o", "out")):
        error = one_line_error(run(*words, "--size", "2b", *paths))
        assert "there is no a.pth and no b.pth and no c: " in error


@pytest.mark.parametrize("command", ("engines", "build"))
def test_all_extras_that_compiling_needs_are_named(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    words = ["--size", "nano"] if command == "build" else [small_bundle()]
    error = one_line_error(run(command, *words, "--backend", "tensorrt"))
    assert 'pip install "varedit-export[export,tensorrt]"' in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("build", "--size", "3b", "--res", "512"), "nano, 2b, 8b"),
        (("build", "--size", "nano", "--res", "256"), "128 px and 1:1 alone, not at 256 px"),
        (("build", "--size", "nano", "--aspect", "2:1"), "128 px and 1:1 alone"),
        (("build", "--size", "nano", "--checkpoint", "x"), "give none, or all of --checkpoint"),
        (("build", "--size", "nano", "--conditioning", "full"), "were trained with sar"),
        (("build", "--size", "2b", "--res", "512", "--conditioning", "finest"), "--checkpoint"),
        (("build", "--size", "2b", "--res", "300"), "256, 512"),
        (("build", "--size", "2b"), "--res"),
        (("build", "--config", "nowhere.json"), "config.json"),
        (("build", "--config", "x.json", "--size", "2b"), "leave out --size"),
        (
            ("build", "--size", "2b", "--res", "256", "--aspect", "9:1", "--random-weights", "0"),
            "1:1",
        ),
        (
            ("build", "--size", "2b", "--res", "256", "--random-weights", "0", "--checkpoint", "x"),
            "replaces all checkpoints",
        ),
        (
            ("build", "--size", "tiny-2b", "--res", "256", "--random-weights", "0", "--batch", "0"),
            "batch of 1 to 1024",
        ),
        (("verify", "nowhere"), "nowhere"),
        (("inspect", "."), "not a bundle"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in one_line_error(run(*arguments))


def test_a_checkpoint_of_another_size_is_named(tmp_path: Path) -> None:
    folder = RECORDINGS / "tiny8b-256"
    error = one_line_error(
        run(
            *("build", "--config", RECORDINGS / "tiny2b-256" / "config.json"),
            *("--checkpoint", folder / "var.pth", "--tokenizer", folder / "vae.pth"),
            *("-o", tmp_path / "bundle"),
        )
    )
    assert "does not fit" in error
    assert not (tmp_path / "bundle").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ("build", "--size", "tiny-2b", "--res", "256", "--random-weights", "0")
    result = run(*arguments, "-o", tmp_path / "file" / "bundle")
    assert result.exit_code == 1
    assert "cannot make the folder" in result.stderr.splitlines()[-1]


def test_a_verification_is_reported_whole_though_its_output_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(bundle: Path, options: VerifyOptions, measured: Callable[[ParityLine], None]):
        for stage in ("condition", "prefill"):
            measured(ParityLine(stage, "largest error", 0.0, 1.0))
        if bundle.name == "wrong":
            raise ParityError("1 of 2 measures failed")

    def echo(text: str, err: bool = False) -> None:
        if not err:
            raise OutputError("standard output cannot be written")
        print(text, file=sys.stderr)

    monkeypatch.setattr("varedit_export.verify", verify)
    monkeypatch.setattr("click.echo", echo)
    for bundle, said in (("right", "output cannot be written"), ("wrong", "1 of 2 measures")):
        report = tmp_path / f"{bundle}.json"
        assert said in one_line_error(run("verify", bundle, "--report", report))
        stages = [line["stage"] for line in json.loads(report.read_text())]
        assert stages == ["condition", "prefill"]

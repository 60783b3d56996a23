"""`varedit-run`: editing and measuring from a terminal, in a pipe, and when it goes wrong."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import msgspec
import numpy as np
import onnx
import pytest
from bundles import bundle_config, small_bundle
from click.testing import CliRunner, Result
from editing import picture, reference
from msgspec import structs
from PIL import Image
from product_graph import product_graph
from stand_in_cuda import pretend
from terminals import read_terminal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from varedit_reference.scale_loop import predict_scales, seeded
from varedit_runtime import bench, bench_report
from varedit_runtime.backends import BACKENDS, choose
from varedit_runtime.backends.onnxruntime.backend import Buffer, OnnxBackend, Session
from varedit_runtime.backends.onnxruntime.spec import OnnxRuntime
from varedit_runtime.bench_report import Report, Spread, report_table
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import ConfigError
from varedit_runtime.files import check_report, write_report
from varedit_runtime.grids import scale_grids

RANDOM = (
    "Warning: the bundle's weights are random, so the result is noise: use a bundle that was built "
    "from checkpoints\n"
)
COMMAND = Path(sys.executable).with_name("varedit-run")
SCALES = len(bundle_config().transformer.grids)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture(90, 60).save(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def edit(photo: Path, *options: object, prompt: str = "add a hat") -> Result:
    return run(photo, prompt, "--bundle", small_bundle(), "--threads", 1, *options)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def fails(result: Result, message: str) -> None:
    """Check for exit code 1, one line that says what is wrong, and no output."""
    commands.fails(result, message)
    assert result.stdout == ""


# Editing


def test_an_edit_goes_beside_the_picture_and_is_told(photo: Path) -> None:
    source = photo.read_bytes()
    done = edit(photo, "--seed", 7)
    edited = photo.with_name("photo-edited.png")
    assert re.fullmatch(rf"{edited}: 90 x 60, seed 7, \d+\.\d s\n", done.stdout)
    assert done.stderr == f"bundle: {small_bundle()} (named by --bundle)\n{RANDOM}"
    assert photo.read_bytes() == source
    with Editor.open(small_bundle(), threads=1) as editor:
        expected = editor.edit(photo, "add a hat", seed=7)
    assert pixels(edited) == expected.image.tobytes()
    assert sorted(p.name for p in photo.parent.iterdir()) == ["photo-edited.png", "photo.png"]


def test_options_reach_the_editor(photo: Path) -> None:
    arguments = {"negative_prompt": "a dog", "guidance_scale": [1, 2, 3, 4], "temperature": 0.9}
    options = ("--negative-prompt", "a dog", "--guidance-scale", "1,2,3,4", "--temperature", ".9")
    output = photo.with_name("out.bmp")
    assert edit(photo, "-o", output, "--seed", 3, *options).exit_code == 0
    with Editor.open(small_bundle(), threads=1) as editor:
        expected = editor.edit(photo, "add a hat", seed=3, **arguments)  # type: ignore[arg-type]
        plain = editor.edit(photo, "add a hat", seed=3)
    assert pixels(output) == expected.image.tobytes() != plain.image.tobytes()


def test_json_is_one_object_with_all_that_was_done(photo: Path) -> None:
    output = photo.with_name("out.webp")
    given = ("--negative-prompt", "a dog", "--guidance-scale", "2", "--temperature", "1,2,3,4")
    told = json.loads(edit(photo, "--seed", 7, "--json", "-o", output, *given).stdout)
    assert output.exists()
    assert told.pop("timings").keys() >= {"text_encoder", "prefill", "scale_00", "image_decoder"}
    assert told == {
        "input": str(photo),
        "output": str(output),
        "instruction": "add a hat",
        "then": [],
        "negative_prompt": "a dog",
        "mask": None,
        "width": 90,
        "height": 60,
        "seed": 7,
        "guidance_scale": [2] * 4,
        "temperature": [1, 2, 3, 4],
        "bundle": str(small_bundle()),
        "bundle_chosen": "named by --bundle",
        "digest": Bundle.open(small_bundle()).digest,
        "variant": "96-b1",
        "backend": "onnxruntime",
        "backend_chosen": "as asked for",
        "provider": "cpu",
        "warnings": [RANDOM.removeprefix("Warning: ").strip()],
    }
    seeds = [json.loads(edit(photo, "--json").stdout)["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_source_and_result_side_by_side(photo: Path) -> None:
    both = photo.with_name("both.png")
    assert edit(photo, "--compare", both).exit_code == 0
    with Image.open(both) as image, Image.open(photo.with_name("photo-edited.png")) as edited:
        assert image.size == (180, 60)
        assert image.crop((0, 0, 90, 60)).tobytes() == picture(90, 60).tobytes()
        assert image.crop((90, 0, 180, 60)).tobytes() == edited.tobytes()


def test_previews_do_not_take_the_place_of_the_source(photo: Path) -> None:
    source = photo.with_name("scale-03.png")
    photo.rename(source)
    before = source.read_bytes()
    message = "scale-03.png could be overwritten by a preview"
    fails(edit(source, "--previews", photo.parent), message)
    assert source.read_bytes() == before


def test_previews_of_every_scale(photo: Path) -> None:
    folder = photo.with_name("previews")
    assert edit(photo, "--previews", folder).exit_code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"scale-{k:02}.png" for k in range(SCALES)]
    last = (folder / names[-1]).read_bytes()
    assert last == photo.with_name("photo-edited.png").read_bytes()


def test_the_bundle_is_found_and_told(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAREDIT_BUNDLE", str(small_bundle()))
    done = run(photo, "add a hat", "--threads", 1)
    assert done.exit_code == 0
    why = "named by the environment variable VAREDIT_BUNDLE"
    assert done.stderr == f"bundle: {small_bundle()} ({why})\n{RANDOM}"


# The commands beside it


def test_a_first_argument_that_names_no_command_is_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(20, 20).save(tmp_path / "bench", format="PNG")
    assert edit(Path("./bench"), "-o", "out.png").exit_code == 2  # Path drops the "./"
    options = ("--bundle", small_bundle(), "--threads", 1)
    for arguments in (
        ("./bench", "add a hat", "-o", "one.png", *options),
        ("-o", "two.png", "./bench", "add a hat", *options),
        (*options, "-o", "three.png", "--", "bench", "add a hat"),
        ("edit", "bench", "add a hat", "-o", "four.png", *options),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, (arguments, done.output)
    written = {path.stem for path in tmp_path.glob("*.png")}
    assert written == {"one", "two", "three", "four"}


def test_help_shows_the_options_of_editing_and_the_commands() -> None:
    text = run("--help").stdout
    assert run().output == text
    assert re.search("(varedit-run|main) IMAGE... INSTRUCTION .OPTIONS.", text)
    for told in ("--negative-prompt", "--previews", "--version", "bench", "grids", "prepare"):
        assert told in text
    assert 'varedit-run photo.png "add a hat"' in text


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        ("varedit-run ", 1, {"plain,bench", "plain,prepare", "file,"}),
        ("varedit-run be", 1, {"plain,bench", "file,be"}),
        ("varedit-run --se", 1, {"plain,--seed"}),
        ("varedit-run photo.png red --neg", 3, {"plain,--negative-prompt"}),
        ("varedit-run bench --rep", 2, {"plain,--repeat"}),
    ],
)
def test_a_shell_can_complete(words: str, number: int, expected: set[str]) -> None:
    environment = os.environ | {"COMP_WORDS": words, "COMP_CWORD": str(number)}
    environment["_VAREDIT_RUN_COMPLETE"] = "bash_complete"
    done = subprocess.run([COMMAND], env=environment, capture_output=True, text=True)
    assert expected <= set(done.stdout.splitlines())


# What is refused


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "the source": (("-o", "photo.png"), "photo.png is the source picture"),
    "the source compared": (("--compare", "photo.png"), "photo.png is the source picture"),
    "twice": (("-o", "a.png", "--compare", "a.png"), "a.png is where the result goes"),
    "format": (("-o", "out.gif"), r"out.gif .*: its format must be .png, .jpg.*not '.gif'"),
    "no format": (("--compare", "out"), "out cannot be written: its format must be"),
    "no folder": (("-o", "missing/out.png"), "there is no folder missing"),
    "a folder": (("--compare", ".."), r"\.\. cannot be written: it is a folder; name a file in"),
    "a new folder for previews": (("--previews", "new", "--seed", "-1"), "the seed is -1"),
    "previews nowhere": (("--previews", "no/new"), "no/new cannot be made a folder: No such file"),
    "the result among previews": (
        ("-o", "scale-01.png", "--previews", "."),
        "scale-01.png could be overwritten by a preview",
    ),
    "a file for previews": (("--previews", "photo.png"), "photo.png cannot be made a folder"),
    "number": (("--temperature", "1,warm"), "--temperature is '1,warm'; give a number, or one per"),
    "no number": (("--guidance-scale", ""), "--guidance-scale is ''"),
    "too few": (("--guidance-scale", "1,2"), "guidance_scale has 2 values.*4"),
    "cold": (("--temperature", "0"), "over 0"),
    "seed": (("--seed", "-1"), "the seed is -1"),
    "provider": (("--provider", "tpu"), "there are cpu, cuda"),
    "threads": (("--threads", "0"), "threads is 0"),
    "a provider of engines": (
        ("--backend", "tensorrt", "--provider", "cuda"),
        "tensorrt does not take provider and threads, only onnxruntime: leave that out",
    ),
    "trust without engines": (
        ("--trust-engines",),
        "threads and trust_engines: name the backend that takes this",
    ),
    "bundle": (("--bundle", "missing"), "no bundle at .*missing: build one with `varedit-export"),
    "no bundle": (("--bundle", "."), "is not a bundle"),
    "long negative": (("--negative-prompt", "x" * 99), "100 tokens.*24"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_line_and_leaves_no_file(
    photo: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(photo.parent)
    before = photo.read_bytes()
    fails(edit(Path("photo.png"), *options), message)
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]
    assert photo.read_bytes() == before


@pytest.mark.parametrize(
    ("backend", "absent", "said"),
    [
        ("tensorrt", "tensorrt", r"\(tensorrt is missing\); run: pip install .*\[tensorrt\]"),
        ("tensorrt-rtx", "tensorrt_rtx", r"\(tensorrt_rtx is missing\); .*\[tensorrt-rtx\]"),
        ("tensorrt-rtx", "cuda.core", r"\(cuda.core is missing\); run: pip install .*\[cuda\]"),
    ],
)
def test_what_engines_need_is_named(
    photo: Path, monkeypatch: pytest.MonkeyPatch, backend: str, absent: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    fails(run(photo, "add a hat", "--bundle", small_bundle(), "--backend", backend), said)


@pytest.mark.parametrize(
    ("option", "target"),
    [
        ("-o", "bundle/new.png"),
        ("-o", "link/new.png"),
        ("-o", "bundle/out.png"),
        ("--compare", "bundle/new.png"),
        ("--previews", "bundle"),
        ("--previews", "link/new"),
    ],
)
@pytest.mark.parametrize("in_use", [True, False])
def test_nothing_is_written_into_a_bundle(
    photo: Path, option: str, target: str, in_use: bool
) -> None:
    folder = photo.parent
    shutil.copytree(small_bundle(), folder / "bundle")
    (folder / "link").symlink_to("bundle")
    (folder / "bundle" / "out.png").symlink_to(folder / "outside.png")
    before = sorted((folder / "bundle").iterdir())
    used = folder / "bundle" if in_use else small_bundle()
    result = run(photo, "red", "--bundle", used, "--overwrite", option, folder / target)
    said = f"it would lie in the bundle {folder / 'bundle'}, which never changes"
    fails(result, f"{folder / target} cannot be written( to)?: {said}")
    assert sorted((folder / "bundle").iterdir()) == before


def test_a_folder_with_the_manifest_of_another_program_is_no_bundle(photo: Path) -> None:
    (photo.parent / "manifest.json").write_text("{}")
    assert edit(photo, "-o", photo.with_name("new.png")).exit_code == 0
    assert not photo.with_name("photo-edited.png").exists()


def test_a_prepared_picture_replaces_a_file_only_if_told_to(photo: Path) -> None:
    output = photo.with_name("out.png")
    output.write_bytes(b"mine")
    prepare = ("prepare", photo, "-o", output)
    fails(run(*prepare), "out.png exists: choose another name, or replace it with --overwrite")
    assert output.read_bytes() == b"mine"
    assert run(*prepare, "--overwrite").exit_code == 0
    with Image.open(output) as image:
        assert image.size == (512, 512)


def test_a_link_to_the_source_is_the_source(photo: Path) -> None:
    link = photo.with_name("link.png")
    link.symlink_to(photo)
    twin = photo.with_name("twin.png")
    twin.hardlink_to(photo)
    before = photo.read_bytes()
    for same in (link, twin, photo, photo.parent / ".." / photo.parent.name / "photo.png"):
        fails(edit(photo, "-o", same), "is the source picture")
        fails(run("prepare", photo, "-o", same), "is the source picture")
    assert photo.read_bytes() == before and link.is_symlink()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_edit(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != photo.parent)
    said = f"the folder {photo.parent} cannot be written to"
    fails(edit(photo), said)
    fails(run("prepare", photo, "-o", photo.with_name("out.png")), said)
    fails(run("bench", small_bundle(), "--json", photo.with_name("b.json")), said)
    fails(edit(photo, "-o", "/tmp/out.png", "--previews", photo.parent), said)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["", "red"], "'IMAGE...'"),
        *(
            (["photo.png", "red", option, ""], f"'{option}'")
            for option in ("--mask", "--bundle", "--compare", "--previews")
        ),
        (["bench", ""], "'BUNDLE'"),
        (["prepare", "photo.png", "-o", ""], "'-o' / '--output'"),
    ],
)
def test_an_empty_path_is_wrong_usage(words: list[str], named: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    said = f"Error: Invalid value for {named}: the path is empty; name a file or a folder"
    assert result.stderr.splitlines()[-1] == said


def test_wrong_usage_is_told_as_of_the_command_that_was_typed() -> None:
    for words in (["photo.png", "red", "--seeed", "1"], ["edit", "photo.png"], ["--nonsense"]):
        result = CliRunner().invoke(main, words, prog_name="varedit-run")
        assert result.exit_code == 2 and result.stdout == ""
        usage, hint, empty, error = result.stderr.splitlines()
        assert usage == "Usage: varedit-run [OPTIONS] IMAGE... INSTRUCTION"
        assert hint == "Try 'varedit-run --help' for help."
        assert empty == "" and error.startswith("Error: ")
    result = run("grids", "one\n\x1b[31mtwo")
    assert result.stderr.splitlines()[-1].endswith(r"(one \x1b[31mtwo)")


def test_with_a_digest_no_other_bundle_is_used(photo: Path) -> None:
    assert edit(photo, "--digest", Bundle.open(small_bundle()).digest).exit_code == 0
    fails(
        edit(photo, "--digest", "0" * 64, "-o", photo.with_name("other.png")), "not the one asked"
    )


def test_wrong_pictures_and_instructions_are_one_line(photo: Path) -> None:
    fails(edit(photo, prompt=" "), "the instruction is empty")
    fails(edit(photo, prompt="x" * 30), "31 tokens, end token included, of at most 24")
    fails(edit(photo.with_name("missing.png")), "missing.png cannot be read: No such file")
    data = photo.read_bytes()
    photo.write_bytes(data[: len(data) // 2])
    fails(edit(photo), r"photo.png cannot be read")
    photo.write_bytes(b"no picture")
    fails(edit(photo), r"photo.png cannot be read: it is not a picture")


def test_debug_shows_a_traceback_wherever_it_is_said(photo: Path) -> None:
    for result in (
        edit(photo, "--debug", prompt=""),
        run("--debug", photo, "", "--bundle", small_bundle()),
    ):
        assert result.exit_code == 1
        assert "Traceback" in result.stderr and "errors.TextError: " in result.stderr
    fails(edit(photo, prompt=""), "empty")


# Terminals, pipes, interrupts


def test_a_terminal_sees_a_bar(photo: Path) -> None:
    ours, theirs = pty.openpty()
    command = [COMMAND, photo, "red", "--bundle", small_bundle(), "--threads", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    assert process.wait() == 0
    assert told["output"].endswith("photo-edited.png")
    assert b"editing" in shown and b"100%" in shown


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(photo: Path, sent: signal.Signals) -> None:
    words = (photo, "red", "--previews", photo.with_name("previews"))
    process = commands.start(*words, code=commands.slowed("True"), stdout=-1, stderr=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"under way\n"
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert commands.spoken(stderr.decode()) == ["Interrupted."]
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_at_any_time_there_is_a_whole_picture_or_none(
    photo: Path, sent: signal.Signals
) -> None:
    command = [COMMAND, photo, "red", "--bundle", small_bundle(), "--threads", "1"]
    edited = photo.with_name("photo-edited.png")
    for delay in (0.3, 0.6, 0.9):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(delay)
        process.send_signal(sent)
        process.communicate(timeout=60)
        if edited.exists():
            with Image.open(edited) as image:
                image.load()
            edited.unlink()
        if sent == signal.SIGINT:
            assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]


# Measuring


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    done = run("bench", small_bundle(), "--repeat", 2, "--threads", 1, "--json", file)
    assert done.exit_code == 0, done.output
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]
    return done.stdout, msgspec.json.decode(file.read_bytes(), type=Report)


def test_bench_measures_every_stage_and_scale(measured: tuple[str, Report]) -> None:
    table, report = measured
    (own,) = report.measurements
    scales = [f"scale_{k:02}" for k in range(SCALES)]
    expected = ["text_encoder", "image_encoder", "condition", "prefill", *scales, "image_decoder"]
    assert [stage.name for stage in own.stages] == expected
    for stage in own.stages:
        for clock in (stage.wall, stage.cpu):
            assert 0 < clock.lower <= clock.median <= clock.upper
        assert stage.name in table
        counted = stage.name == "prefill" or stage.name in scales
        assert (stage.share is not None) == counted
        if counted:
            assert stage.flops and stage.rate and own.product_rate
            assert stage.rate == stage.flops / stage.wall.median
            assert stage.share == stage.rate / own.product_rate
    assert own.digest == Bundle.open(small_bundle()).digest
    assert (report.repeat, report.threads, own.batch) == (2, 1, 1)
    assert own.process and own.process.first_edit_seconds > 0 and own.process.open_seconds > 0


def test_bench_tells_where_the_memory_is(measured: tuple[str, Report]) -> None:
    table, report = measured
    assert report.measurements[0].process
    memory, bundle = report.measurements[0].process.memory, Bundle.open(small_bundle())
    stored = [bundle.weights_path(name).stat().st_size for name in bundle.components]
    assert memory.weights == sum(stored)
    with Editor.open(small_bundle(), threads=1) as editor:
        assert memory.buffers == editor.backend.buffer_bytes
    assert "memory" in table
    files = [file for file in small_bundle().rglob("*") if file.is_file()]
    assert memory.disk == sum(file.stat().st_size for file in files)
    assert memory.disk_ratio == memory.disk / memory.weights
    assert f"{memory.disk_ratio:.3f} x weights" in table
    if bench.ROLLUP.exists():
        assert memory.before and memory.peak and memory.activations is not None
        assert 0 < memory.before < memory.peak
        assert 0 <= memory.activations < memory.peak
        assert memory.peak_ratio == memory.peak / memory.weights
        held = memory.peak - memory.buffers - memory.activations
        assert memory.held_ratio == held / memory.weights
        assert f"peak {memory.peak_ratio:.2f} x weights" in table


def test_bench_tells_what_was_offloaded(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--repeat", 1, "--backend", "onnxruntime", "--offload", "text")
    done = run("bench", small_bundle(), *options, "--json", file)
    assert done.exit_code == 0, done.output
    (own,) = msgspec.json.decode(file.read_bytes(), type=Report).measurements
    assert own.offload == "text" and "batch 1, offload text" in done.stdout
    bundle = Bundle.open(small_bundle())
    held = [bundle.weights_path(n) for n in bundle.components if n != "text_encoder"]
    assert own.process and own.process.memory.weights == sum(p.stat().st_size for p in held)


def test_the_yardstick_of_a_gpu_runs_when_the_bundle_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    done: list[str] = []
    close = OnnxBackend.close
    monkeypatch.setattr(OnnxBackend, "close", lambda self: (done.append("close"), close(self)))
    monkeypatch.setattr(bench, "product_rate", lambda provider: done.append(provider) or 1e12)
    report = bench.measure_bundle(small_bundle(), 2, choose("onnxruntime", provider="cuda"))
    assert done == ["close", "cuda"]
    assert report.measurements[0].product_rate == 1e12


class OfNumpy(OnnxRuntime):
    name = "ofnumpy"
    packages = ("numpy", "missing")


OF_NUMPY = OfNumpy()


def test_versions_are_of_what_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "ofnumpy", f"{__name__}:OF_NUMPY")
    report = bench.measure_bundle(small_bundle(), 1, choose("ofnumpy", threads=1))
    assert report.versions == {"numpy": np.__version__}
    table = report_table(structs.replace(report, versions={}))
    assert table.splitlines()[1].startswith("1 threads; median of 1")


def test_a_clock_that_saw_no_time_pass_gives_no_ratio() -> None:
    one, none = Spread(1, 1, 1), Spread(0, 0, 0)
    assert bench._times(one, one) == 1
    assert bench._times(one, none) is None


def test_memory_is_left_out_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "ROLLUP", tmp_path / "missing")
    assert bench.memory_in_use() is None
    with bench.peak_memory() as samples:
        pass
    assert samples == []
    report = bench.measure_bundle(small_bundle(), 1, choose("onnxruntime", threads=1))
    (own,) = report.measurements
    assert own.process
    memory = own.process.memory
    assert memory.peak is memory.activations is memory.held_ratio is None
    memory = structs.replace(memory, weights=10**6, buffers=2 * 10**6)
    own = structs.replace(own, process=structs.replace(own.process, memory=memory))
    table = report_table(structs.replace(report, measurements=(own,)))
    assert "weights 1.0 MB, caches 2.0 MB; this system does not report" in table
    assert "disk" in table


def test_the_processor_and_its_instruction_sets_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for unreadable in (tmp_path / "cpuinfo", tmp_path):
        monkeypatch.setattr(bench_report, "CPUINFO", unreadable)
        assert bench_report.Processor.detect().processor
    monkeypatch.setattr(bench_report, "CPUINFO", tmp_path / "cpuinfo")
    lines = ["model name\t: EPYC: 9", "flags\t\t: fpu avx2 avx512f avx512_vnni avx512_vnni2", ""]
    (tmp_path / "cpuinfo").write_bytes("\n".join(lines * 2).encode() + b"serial: \xff")
    machine = bench_report.Processor.detect()
    assert machine.processor == "EPYC: 9"
    assert machine.instruction_sets == ("avx2", "avx512f", "avx512_vnni")


@pytest.mark.skipif(not bench.ROLLUP.exists(), reason="the system does not tell")
def test_the_peak_of_memory_is_seen() -> None:
    before = bench.memory_in_use()
    assert before is not None
    with bench.peak_memory() as samples:
        held = np.ones(200 * 2**20, np.uint8)
        while max(samples, default=0) < before + held.nbytes * 0.9:
            time.sleep(0.01)
        del held
    assert max(samples) < before + 400 * 2**20


def test_products_are_counted_as_the_reference_computes_them() -> None:
    """Count the reference's products of prefill and all scales, without embedding and head."""
    config, bundle = bundle_config(), Bundle.open(small_bundle())
    variant, model = bundle.manifest.variants[0], reference(config)
    transformer = config.transformer
    text = model.transformer.condition(
        model.transformer.text_rows(model.text_encoder.encode(["x" * 23]), True, None)
    )
    source = model.read([picture(96, 96)])
    # The fused attention of the CPU is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        list(predict_scales(model.transformer, config, source, text, seeded([1]), 3.0, 0.5))
    stages = ["prefill", *(f"scale_{k:02}" for k in range(SCALES))]
    counted = [bench.product_flops(s, bundle.manifest.model, variant, variant.rows) for s in stages]
    tokens = sum(transformer.lengths)
    head = 2 * tokens * variant.rows * transformer.width * transformer.token_channels * 2
    total = sum(flops or 0 for flops in counted) + head
    assert counter.get_total_flops() == pytest.approx(total, rel=0.02)
    assert bench.product_flops("image_encoder", bundle.manifest.model, variant, 1) is None


def test_products_are_counted_as_by_hand() -> None:
    """Of one block of width 256 that has seen one token, and of 125m at 512 px."""
    model: Any = SimpleNamespace(depth=1, width=256, conditioning="finest")
    variant: Any = SimpleNamespace(grids=((1, 1),), text_tokens=3)
    # Six products of 256 x 256 and two of 256 x 1024; queries and values of itself, the source
    # and three tokens of text.
    by_hand = 2 * (6 * 256**2 + 2 * 256 * 1024) + 4 * 256 * (1 + 1 + 3)
    assert bench.product_flops("scale_00", model, variant, 1) == by_hand
    model = SimpleNamespace(depth=12, width=768, conditioning="sar")
    variant = SimpleNamespace(grids=scale_grids(512), text_tokens=128)
    stages = ["prefill", *(f"scale_{k:02}" for k in range(10))]
    counted = [bench.product_flops(stage, model, variant, 2) for stage in stages]
    assert sum(flops or 0 for flops in counted) == pytest.approx(1.995e12, rel=2e-4)


def test_the_yardstick_is_a_matrix_product() -> None:
    graph = bench.PRODUCT.read_bytes()
    assert graph == product_graph()
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    session = Session("product", graph, Path(), "cpu", 1)
    a, b = np.random.default_rng(0).normal(size=(2, 300, 300)).astype(np.float32)
    buffers = {name: Buffer((300, 300), "float32", "cpu") for name in "abc"}
    buffers["a"].write(a)
    buffers["b"].write(b)
    session.run({name: buffers[name].part() for name in "ab"}, {"c": buffers["c"].part()})
    np.testing.assert_allclose(buffers["c"].read(), a @ b, atol=1e-3)
    assert bench.product_rate("cpu", 1) > 1e8


def test_the_schema_of_reports_is_current() -> None:
    file = Path(__file__).parent.parent / "docs" / "bench.schema.json"
    assert file.read_bytes() == bench_report.schema(), "run `make docs`"
    described = json.loads(file.read_text())["$defs"].values()
    assert not any("\n " in struct["description"] for struct in described)  # on any Python


def test_quartiles() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    fails(run("bench", small_bundle(), "--repeat", 0), "repeat is 0; it must be at least 1")
    fails(run("bench", tmp_path / "missing"), "there is no bundle at .*missing")
    fails(run("bench", small_bundle(), "--json", tmp_path / "no" / "b.json"), "there is no folder")
    own = small_bundle() / "manifest.json"
    fails(run("bench", small_bundle(), "--json", own), "it would lie in the bundle")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report({}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_replaces_nothing_but_json(tmp_path: Path) -> None:
    mine, old = tmp_path / "keep.png", tmp_path / "old.json"
    for path in (mine, old):
        path.write_text("mine")
    fails(run("bench", small_bundle(), "--json", mine), "a report replaces only files that end in")
    with pytest.raises(ConfigError, match="File exists"):  # one that appeared meanwhile
        write_report({}, mine)
    assert mine.read_text() == "mine"
    check_report(old)
    write_report({}, old)
    assert old.read_text() == "{}\n"

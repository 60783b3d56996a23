"""A backend in one file, registered by one line: everything that runs bundles knows it."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from bundles import small_bundle
from click.testing import CliRunner, Result
from PIL import Image
from test_doctor import LAPTOP

from varedit_export.cli import main as export_main
from varedit_export.doctor import report
from varedit_export.parity.compare_bundle import compare_chosen
from varedit_runtime.backends import BACKENDS, choose, find_backend, option_names, specs
from varedit_runtime.backends.detect import detect_machine
from varedit_runtime.backends.machine import Machine, ProbeResult
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.spec import RESERVED, BackendOptions, BackendSpec, Verdict, option
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as run_main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import Variant
from varedit_runtime.terminal.command import BackendCommand

# The toy backend: ONNX Runtime on one thread, which says what it is made of.


@dataclass(frozen=True)
class ToyOptions(BackendOptions):
    """material: what the toy is made of."""

    material: str = option("wood", "What the toy is made of.", "STUFF")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.material == "lead":
            raise ConfigError("material is 'lead'; toys are made of something else")


class ToySpec(BackendSpec[ToyOptions]):
    """Describes the toy: it runs on every machine with Python 3."""

    name = "toy"
    options = ToyOptions

    def verdicts(self, machine: Machine) -> Sequence[Verdict]:
        word = "can run" if machine.python.startswith("3.") else "cannot"
        return (Verdict(self.name, word, "play"),)

    def open(self, bundle: Bundle, variant: Variant, options: ToyOptions) -> OnnxBackend:
        backend = OnnxBackend(bundle, variant, OnnxRuntimeOptions(threads=1))
        backend.provider = options.material
        return backend


TOY = ToySpec()


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest may import this file by another name than a second import would.
    monkeypatch.setitem(BACKENDS, "toy", f"{__name__}:TOY")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_main, [str(argument) for argument in arguments])


def test_doctor_asks_every_registered_backend() -> None:
    assert "toy               can run: play" in report(LAPTOP).splitlines()
    assert "toy               cannot: play" in report(replace(LAPTOP, python="2.7")).splitlines()


@pytest.mark.parametrize(
    ("main", "command"),
    [(run_main, "edit"), (run_main, "bench"), (export_main, "build"), (export_main, "verify")],
)
def test_the_commands_offer_it(main: click.Group, command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"])
    auto = "" if command == "verify" else "auto|"
    assert f"[{auto}onnxruntime|tensorrt|tensorrt-rtx|toy]" in shown.output
    assert ("--material STUFF" in shown.output) == (command != "build")  # which opens nothing
    unknown = CliRunner().invoke(main, [command, "--backend", "doll"])
    assert unknown.exit_code == 2 and "'toy'" in unknown.output


def test_only_backends_with_engines_are_compiled_for() -> None:
    shown = CliRunner().invoke(export_main, ["engines", "--help"])
    assert "[tensorrt|tensorrt-rtx]" in shown.output
    asked = ["build", "--size", "nano", "--backend", "toy", "--engine-layout", "baked"]
    refused = CliRunner().invoke(export_main, asked)
    assert refused.exit_code == 1 and "toy runs the graphs and has no engines" in refused.output


def test_it_edits_as_a_library_and_as_a_command(photo: Path) -> None:
    with Editor.open(small_bundle(), backend=choose("toy", material="tin")) as editor:
        assert editor.provider == "tin"
        ours = editor.edit(photo, "add a hat", seed=7).image
    with Editor.open(small_bundle(), backend="toy") as editor:
        assert editor.provider == "wood"
        assert editor.chosen and (editor.chosen.label, editor.chosen.why) == ("toy", "as asked for")
    out = photo.with_name("out.png")
    asked = (
        photo,
        "add a hat",
        "--bundle",
        small_bundle(),
        "--seed",
        7,
        "-o",
        out,
        "--json",
        "--overwrite",
    )
    for named in (("--backend", "toy"), ()):  # an option of one backend alone names it
        done = run(*asked, *named, "--material", "tin")
        assert done.exit_code == 0 and '"provider": "tin"' in done.stdout
        with Image.open(out) as theirs:
            assert np.array_equal(np.asarray(theirs), np.asarray(ours))


def test_verify_compares_it_with_onnx_runtime() -> None:
    lines = compare_chosen(Bundle.open(small_bundle()), choose("toy"))
    first = next(lines)
    assert "against ONNX Runtime" in first.measure and first.value <= first.tolerance
    assert first.against == "onnxruntime"  # which `verify` goes by to name the layers to look at


@pytest.mark.skipif(
    "CUDAExecutionProvider" in find_backend("onnxruntime").probe().offers, reason="it would run"
)
def test_verify_takes_a_backends_own_options() -> None:
    asked = ["verify", str(small_bundle()), "--provider", "cuda"]
    refused = CliRunner().invoke(export_main, asked)
    assert refused.exit_code == 1 and "has no CUDAExecutionProvider" in refused.stderr


def test_its_options_are_checked_and_are_its_own(photo: Path) -> None:
    asked = (photo, "add a hat", "--bundle", small_bundle())
    for options, said in (
        (("--backend", "toy", "--material", "lead"), "Error: material is 'lead'; toys are made"),
        (("--material", "tin", "--threads", "2"), "Error: threads and material: name the backend"),
        (("--trust-engines",), "Error: trust_engines: name the backend that takes this (tensorrt"),
        (
            ("--backend", "toy", "--threads", "2"),
            "Error: backend toy does not take threads, only onnx",
        ),
    ):
        refused = run(*asked, *options)
        assert refused.exit_code == 1 and refused.stderr.startswith(said)
    with pytest.raises(ConfigError, match="toy does not take threads, only onnxruntime"):
        Editor.open(small_bundle(), backend="toy", threads=2)
    with pytest.raises(ConfigError, match="threads: give these to choose"):
        Editor.open(small_bundle(), backend=choose("toy"), threads=2)
    with pytest.raises(ConfigError, match="toy does not take size: leave that out"):
        choose("toy", size=2)


@pytest.mark.parametrize(
    ("module", "text", "problem"),
    [
        ("unloadable", "raise OSError('libtoy.so: cannot open')", "libtoy.so: cannot open"),
        ("ending", "import sys; sys.exit('no toys')", "no toys"),
        ("empty", "", "module 'empty' has no attribute 'SPEC'"),
        ("wrong", "SPEC =", "invalid syntax (wrong.py, line 1)"),
    ],
)
def test_a_backend_that_cannot_be_imported_stays_listed_and_says_why(
    module: str, text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "broken", f"{module}:SPEC")
    why = f"it cannot be imported ({problem})"
    assert f"broken            cannot: {why}" in report(LAPTOP).splitlines()
    assert "|broken]" in run("bench", "--help").output
    with pytest.raises(BackendError, match="broken cannot be used: it cannot be imported"):
        Editor.open(embedded(), backend="broken")
    assert find_backend("toy") is TOY  # the others are found all the same


# Specs that break the rules: their backends are listed, say what is wrong, and break nothing else.


def options_of(name: str, kind: Any = str, **given: Any) -> type[BackendOptions]:
    made = field(**given) if given else option("wood", "What the toy is made of.")
    return make_dataclass("Made", [(name, kind, made)], bases=(BackendOptions,), frozen=True)


class Bare(BackendOptions):
    material: str = "wood"


class Plain:
    """Options of nothing."""


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no dataclass": ({"options": Plain}, "Plain is no dataclass below BackendOptions"),
    "undecorated": ({"options": Bare}, "Bare is no dataclass below BackendOptions"),
    "an instance": ({"options": BackendOptions()}, r"options is BackendOptions\(\); give type"),
    "none": ({"options": None}, "options is None; give type"),
    **{
        name: ({"options": options_of(name)}, f"no option can be called '{name}'")
        for name in ("backend", "variant", "bundle", "json", "Material", "_material", "a__b")
    },
    "type": ({"options": options_of("x", float)}, "option x is of no type that an option can"),
    "unknown type": ({"options": options_of("x", "Missing")}, "name 'Missing' is not defined"),
    "default": ({"options": options_of("x", int)}, "x is 'wood'; give an integer"),
    "no option": ({"options": options_of("x", default="")}, "option x is not made with option"),
    "name": ({"name": "doll"}, "its name is 'doll'"),
    "long name": ({"name": "\x1b" * 10**6}, r"its name is '\\x1b"),
    "packages": ({"packages": "toys"}, "packages is 'toys'; give a list"),
    "compiles": ({"compiles": None}, "compiles is None; give True or False"),
}


@pytest.mark.parametrize(("change", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_a_spec_that_breaks_the_rules_is_listed_and_breaks_nothing(
    change: dict[str, Any], problem: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(ToySpec, name, value)
    (line,) = (line for line in report(LAPTOP).splitlines() if line.startswith("toy "))
    assert re.search(rf"cannot: its spec is wrong \(.*{problem}", line) and line.isprintable()
    assert_commands_work(photo)


class NoSpec:
    """Is no spec."""


@pytest.mark.parametrize("value", [None, 3, NoSpec, ToySpec])
def test_what_is_no_spec_is_listed_and_breaks_nothing(
    value: object, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TOY", value)
    assert "is no BackendSpec)" in report(LAPTOP)
    assert_commands_work(photo)


def assert_commands_work(photo: Path) -> None:
    for command in ("bench", "edit"):
        assert run(command, "--help").exit_code == 0
    refused = run(photo, "add a hat", "--bundle", embedded(), "--backend", "toy")
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 2
    assert refused.stderr.splitlines()[-1].startswith("Error: backend toy cannot be used: its spec")


def test_options_are_never_called_like_what_commands_and_functions_take() -> None:
    names = {"help", *signature(Editor.open).parameters}
    names -= {name for spec in specs() for name in option_names(spec)}
    commands = [*run_main.commands.values(), *export_main.commands.values()]
    for command in commands:
        if isinstance(command, BackendCommand):
            names |= {option.name or "" for option in command.params}
            flags = (flag for option in command.params for flag in option.opts)
            names |= {flag.lstrip("-").replace("-", "_") for flag in flags if len(flag) > 2}
    assert names <= RESERVED


class FaultySpec(ToySpec):
    """A backend at fault whatever it is asked."""

    name = "faulty"

    def probe(self) -> ProbeResult:
        raise AttributeError("module 'toys' has no attribute 'make'")

    def report(self, machine: Machine) -> Iterator[tuple[str, str]]:
        raise AttributeError("no \n report")

    def verdicts(self, machine: Machine) -> tuple[Verdict, ...]:
        sys.exit()

    def open(self, bundle: Bundle, variant: Variant, options: ToyOptions) -> OnnxBackend:
        raise KeyError("toy")


FAULTY = FaultySpec()


def test_a_backend_at_fault_does_not_end_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(LAPTOP).splitlines()
    monkeypatch.setitem(BACKENDS, "faulty", f"{__name__}:FAULTY")
    after = report(LAPTOP).splitlines()
    assert [line for line in after if line not in before] == [
        "faulty            its report failed (no report)",
        "faulty            cannot: its check failed (SystemExit)",
    ]
    assert set(before) < set(after)
    problem = detect_machine().probe("faulty").problem
    assert problem == "module 'toys' has no attribute 'make'"
    with pytest.raises(BackendError, match="backend faulty cannot be opened: 'toy'"):
        Editor.open(embedded(), backend="faulty")


@pytest.mark.parametrize("name", (None, 3, ["toy"], {}))
def test_what_is_no_name_is_no_backend(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"backend is .*; give one of onnxruntime, "):
        choose(name)

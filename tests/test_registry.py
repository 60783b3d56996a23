"""A backend in one file, registered by one line: everything that runs bundles knows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from varedit_runtime.backends import BACKENDS, choose, find_backend
from varedit_runtime.backends.detect import detect_machine
from varedit_runtime.backends.machine import Machine, ProbeResult
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.spec import BackendOptions, BackendSpec, Verdict, option
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as run_main
from varedit_runtime.editor import Editor
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.manifest import Variant

# The toy backend: ONNX Runtime on one thread, which says what it is made of.


@dataclass(frozen=True)
class ToyOptions(BackendOptions):
    """material: what the toy is made of."""

    material: str = option("wood", "What the toy is made of.", "STUFF")

    def __post_init__(self) -> None:
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
    assert "[onnxruntime|tensorrt|tensorrt-rtx|toy]" in shown.output
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
    out = photo.with_name("out.png")
    asked = (photo, "add a hat", "--bundle", small_bundle(), "--seed", 7, "-o", out, "--json")
    done = run(*asked, "--backend", "toy", "--material", "tin")
    assert done.exit_code == 0 and '"provider": "tin"' in done.stdout
    with Image.open(out) as theirs:
        assert np.array_equal(np.asarray(theirs), np.asarray(ours))


def test_verify_compares_it_with_onnx_runtime() -> None:
    lines = compare_chosen(Bundle.open(small_bundle()), choose("toy"))
    first = next(lines)
    assert "against ONNX Runtime" in first.measure and first.value <= first.tolerance


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
        (("--material", "tin"), "Error: backend onnxruntime does not take material, only toy: "),
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


def test_a_backend_that_cannot_be_imported_stays_listed_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_backend.py").write_text("raise OSError('libtoy.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "broken", "broken_backend:SPEC")
    why = "it cannot be imported (libtoy.so: cannot open)"
    assert f"broken            cannot: {why}" in report(LAPTOP).splitlines()
    assert "|broken]" in run("bench", "--help").output
    with pytest.raises(BackendError, match="broken cannot be used: it cannot be imported"):
        Editor.open(small_bundle(), backend="broken")
    assert find_backend("toy") is TOY  # the others are found all the same


class FaultySpec(ToySpec):
    """A backend at fault whatever it is asked."""

    name = "faulty"

    def probe(self) -> ProbeResult:
        raise AttributeError("module 'toys' has no attribute 'make'")

    def report(self, machine: Machine) -> Iterator[tuple[str, str]]:
        raise AttributeError("no \n report")

    def verdicts(self, machine: Machine) -> tuple[Verdict, ...]:
        raise KeyError


FAULTY = FaultySpec()


def test_a_backend_at_fault_does_not_end_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(LAPTOP).splitlines()
    monkeypatch.setitem(BACKENDS, "faulty", f"{__name__}:FAULTY")
    after = report(LAPTOP).splitlines()
    assert [line for line in after if line not in before] == [
        "faulty            its report failed (no report)",
        "faulty            cannot: its check failed (KeyError)",
    ]
    assert set(before) < set(after)
    problem = detect_machine().probe("faulty").problem
    assert problem == "module 'toys' has no attribute 'make'"


@pytest.mark.parametrize("name", (None, 3, ["toy"], {}))
def test_what_is_no_name_is_no_backend(name: Any) -> None:
    with pytest.raises(ConfigError, match="no backend is called"):
        choose(name)

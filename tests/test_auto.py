"""The best backend by itself: what auto chooses, what it says, and what is asked for by name."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import small_bundle
from click.testing import CliRunner, Result
from editing import pair_bundle, picture
from test_doctor import (
    BF16,
    CPU,
    HOPPER,
    LAPTOP,
    SERVER,
    probed,
    with_bundle,
    with_engines,
    without,
)
from test_engine_backend import compiled
from uncompiled import GPU, Uncompiled, keep_engines_in

import varedit_export
from varedit_export import resolve_options
from varedit_export.cli import main as export_main
from varedit_export.commands import build as build_command
from varedit_export.doctor import can_edit, report
from varedit_export.options import BuildOptions, EngineOptions
from varedit_export.resolve_options import plan_of
from varedit_runtime.backends import choose, detect, host
from varedit_runtime.backends.auto import AutoBackend, best, best_precision, told, wanted_backend
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.host import nvidia
from varedit_runtime.backends.machine import Gpu, Machine, Nvidia, ProbeResult
from varedit_runtime.backends.onnxruntime.spec import OnnxRuntime
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as run_main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import ConfigError

NO_ENGINES = "tensorrt can compile: this bundle's engines for sm89"


def on_hopper(machine: Machine) -> Machine:
    return replace(machine, nvidia=Nvidia("570.1", (HOPPER,)))


@pytest.mark.parametrize(
    ("machine", "label", "why"),
    [
        (LAPTOP, "onnxruntime cpu", "no NVIDIA GPU was found"),
        (with_bundle(LAPTOP, precision=BF16), "onnxruntime cpu", "no NVIDIA GPU was found"),
        (SERVER, "tensorrt", "the first choice"),
        (with_engines("tensorrt"), "tensorrt", "the first choice"),
        (without(SERVER, "tensorrt"), "tensorrt-rtx", "tensorrt cannot: it is not installed"),
        (with_engines("tensorrt-rtx"), "tensorrt-rtx", NO_ENGINES),
        (
            with_bundle(SERVER),
            "onnxruntime cuda",
            f"{NO_ENGINES}; tensorrt-rtx can compile: this bundle's engines for sm89",
        ),
        (
            with_engines("tensorrt", gpu="sm89 another"),
            "onnxruntime cuda",
            f"{NO_ENGINES}; tensorrt-rtx can compile: this bundle's engines for sm89",
        ),
        (with_engines("tensorrt", needing=21), "onnxruntime cuda", "tensorrt cannot: about 21.0"),
        (
            with_engines("tensorrt", needing=21, offloaded=19),
            "onnxruntime cuda",
            "or edit with --offload text, which takes 19.0 GB",
        ),
        (
            on_hopper(without(SERVER, "tensorrt")),
            "onnxruntime cuda",
            "tensorrt-rtx can compile: sm75, sm89, not sm90",
        ),
        (
            with_bundle(SERVER, precision=BF16),
            "onnxruntime cpu",
            "cuda cannot: it runs no bf16",
        ),
        (
            probed(with_bundle(SERVER), "onnxruntime", failed={"cuda": "cuDNN is missing"}),
            "onnxruntime cpu",
            "onnxruntime cuda cannot: cuDNN is missing",
        ),
        (
            with_bundle(SERVER, gpu_memory=21 * 10**9),
            "onnxruntime cpu",
            "about 21.0 GB of GPU memory",
        ),
    ],
)
def test_the_best_backend_that_can_run_is_chosen(machine: Machine, label: str, why: str) -> None:
    chosen = best(machine)
    assert chosen.label == label and why in chosen.why
    line = told(chosen)
    assert line.startswith(f"backend: {label} (") and "\n" not in line
    marked = [row for row in report(machine).splitlines() if row.startswith("auto ")]
    assert marked == ([f"auto              takes {label}"] if can_edit(machine) else [])


@pytest.mark.parametrize(
    ("machine", "backend", "label", "precision"),
    [
        (LAPTOP, "auto", "onnxruntime cpu", "fp32"),
        (SERVER, "auto", "tensorrt", "fp16"),
        (SERVER, "onnxruntime", "onnxruntime cuda", "fp16"),
        (LAPTOP, "onnxruntime", "onnxruntime cpu", "fp32"),
        (probed(SERVER, "onnxruntime", offers=(CPU,)), "onnxruntime", "onnxruntime cpu", "fp32"),
        (LAPTOP, "tensorrt-rtx", "tensorrt-rtx", "fp16"),  # for named architectures
        (SERVER, "tensorrt-rtx", "tensorrt-rtx", "fp16"),
    ],
)
def test_the_precision_is_that_of_the_device(
    machine: Machine, backend: str, label: str, precision: str
) -> None:
    chosen = best(machine, backend)
    assert (chosen.label, best_precision(chosen)) == (label, precision)


# Running


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture(90, 60).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def edit(photo: Path, *options: str) -> Result:
    asked = [str(photo), "add a hat", "--bundle", str(small_bundle()), "--json", *options]
    return CliRunner().invoke(run_main, asked)


def backend_lines(done: Result) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("backend: ")]


def having(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    monkeypatch.setattr(host, "nvidia", lambda: Nvidia(None, gpus, "none"))


def test_an_edit_says_what_was_chosen_and_why(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(OnnxRuntime, "probe", lambda self: asked.append(self.name))
    having(monkeypatch)
    done = edit(photo)
    assert done.exit_code == 0, done.output
    assert backend_lines(done) == ["backend: onnxruntime cpu (no NVIDIA GPU was found)"]
    found = json.loads(done.stdout)
    assert (found["backend"], found["provider"]) == ("onnxruntime", "cpu")
    assert found["backend_chosen"] == "no NVIDIA GPU was found"
    assert asked == []  # which takes time, and nothing else can run


def test_a_gpu_that_is_not_used_is_explained(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "installed", lambda: {"onnxruntime": "1.30"})
    monkeypatch.setattr(OnnxRuntime, "probe", lambda self: ProbeResult(offers=(CPU,)))
    having(monkeypatch, HOPPER)
    done = edit(photo)
    assert done.exit_code == 0, done.output
    (line,) = backend_lines(done)
    assert line == (
        "backend: onnxruntime cpu (tensorrt cannot: it is not installed; tensorrt-rtx cannot: it "
        "is not installed; onnxruntime cuda cannot: onnxruntime-gpu is not installed)"
    )


@pytest.mark.parametrize(
    "options", [("--backend", "onnxruntime"), ("--threads", "1"), ("--provider", "cpu")]
)
def test_what_is_named_is_what_runs(
    options: tuple[str, ...], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "nvidia", None)  # nothing is looked for
    done = edit(photo, *options)
    assert done.exit_code == 0, done.output
    assert "backend: " not in done.stderr
    assert json.loads(done.stdout)["backend_chosen"] == "as asked for"


def test_an_option_of_one_backend_names_it() -> None:
    chosen = wanted_backend("auto", provider="cuda")
    assert chosen == choose("onnxruntime", provider="cuda")
    assert wanted_backend("auto", threads=None, trust_engines=False) == AutoBackend()
    with pytest.raises(ConfigError, match="no provider is called 'tpu'"):
        wanted_backend(AutoBackend(), provider="tpu")
    with pytest.raises(ConfigError, match=r"name the backend .* \(tensorrt or tensorrt-rtx\)"):
        wanted_backend(engines_digest="0" * 64)
    with pytest.raises(ConfigError, match=r"size: name the backend that takes this$"):
        wanted_backend(size=1)


def test_engines_of_another_variant_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_engines_in(tmp_path, monkeypatch)
    bundle, engines = compiled(pair_bundle())
    (own,) = {engines.manifest.recipe.variant}
    for variant, count in ((own, 1), ("another", 0), (None, 1)):
        facts = detect.detect_machine(bundle, variant).bundle
        assert facts and len(facts.engines) == count


@pytest.mark.parametrize("layout", ["external", "profiles", "baked"])
def test_engines_that_hold_weights_are_passed_over_where_text_is_offloaded(
    layout: EngineLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_engines_in(tmp_path, monkeypatch)
    bundle, engines = compiled(small_bundle(), layout)
    for offload in (None, "text"):
        facts = detect.detect_machine(bundle, offload=offload).bundle
        assert facts
        (found,) = facts.engines
        if offload and layout != "external":
            assert found.recipe is None and "contain their weights" in found.problem
        else:
            assert found.recipe == engines.manifest.recipe
            assert (found.offloaded < found.gpu_memory) == (layout == "external" and not offload)


def test_the_editor_takes_engines_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are opened by their own backend, which here has no GPU to run them on."""
    keep_engines_in(tmp_path, monkeypatch)
    bundle, engines = compiled(small_bundle())
    tools = {**engines.manifest.recipe.tools, "cuda-core": "1", "cuda-bindings": "13"}
    monkeypatch.setattr(detect, "installed", lambda: tools)
    monkeypatch.setattr(detect, "_probe", lambda spec: ProbeResult(offers=(GPU,)))
    having(monkeypatch, Gpu("NVIDIA RTX 4090", GPU, None, None))
    said: list[str] = []
    chosen = AutoBackend(said.append).pick(bundle, bundle.manifest.variants[0])
    assert chosen.label == "tensorrt-rtx"
    assert said == ["backend: tensorrt-rtx (tensorrt cannot: it is not installed)"]


def test_gpus_that_the_environment_hides_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    row = "570.1, NVIDIA RTX 4090, 8.9, 22888, 19073\n"
    found = SimpleNamespace(stdout=row, stderr="", returncode=0)
    monkeypatch.setattr(host.subprocess, "run", lambda *_, **__: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(nvidia().gpus) == 1
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert nvidia() == Nvidia(None, (), "CUDA_VISIBLE_DEVICES hides all")


def test_the_editor_tells_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch)
    with Editor.open(small_bundle()) as editor:
        assert editor.chosen and editor.chosen.label == "onnxruntime cpu"
        assert editor.chosen.why == "no NVIDIA GPU was found"


# Building


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Record what is built, and for what it is compiled, in place of doing it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    done: list[Any] = []

    def build(options: BuildOptions, *_: object) -> Bundle:
        done.append(options.precision)
        return Bundle.open(small_bundle())

    def compiles(bundle: Bundle, options: EngineOptions) -> tuple[Path, dict[str, Any]]:
        done.append((options.backend, options.architectures))
        return Path("engines"), {}

    monkeypatch.setattr(varedit_export, "build", build)
    monkeypatch.setattr(build_command, "compile_and_show", compiles)
    monkeypatch.setattr(EngineOptions, "compiler", lambda self: Uncompiled())
    return done


@pytest.mark.parametrize(
    ("machine", "options", "expected", "said"),
    [
        (LAPTOP, (), ["fp32"], "backend: onnxruntime cpu (no NVIDIA GPU was found)"),
        (SERVER, (), ["fp16", ("tensorrt", ())], "backend: tensorrt (the first choice)"),
        (
            without(SERVER, "tensorrt"),
            (),
            ["fp16", ("tensorrt-rtx", ())],
            "backend: tensorrt-rtx (tensorrt cannot: it is not installed)",
        ),
        (SERVER, ("--precision", "bf16"), ["bf16", ("tensorrt", ())], "backend: tensorrt ("),
        (SERVER, ("--backend", "onnxruntime"), ["fp16"], None),
        (
            LAPTOP,
            ("--backend", "tensorrt-rtx", "--architecture", "sm89"),
            ["fp16", ("tensorrt-rtx", ("sm89",))],
            None,
        ),
        (
            SERVER,
            ("--architecture", "sm86"),
            ["fp16", ("tensorrt-rtx", ("sm86",))],
            "tensorrt-rtx (it",
        ),
    ],
)
def test_a_build_is_for_the_best_backend(
    machine: Machine,
    options: tuple[str, ...],
    expected: list[Any],
    said: str | None,
    built: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detect, "detect_machine", lambda: machine)
    done = CliRunner().invoke(export_main, ["build", "--size", "nano", *options])
    assert done.exit_code == 0, done.output
    assert built == expected
    assert (said or "backend: ") in done.stderr if said else "backend: " not in done.stderr


@pytest.mark.parametrize(("machine", "precision"), [(LAPTOP, "fp32"), (SERVER, "fp16")])
def test_a_plan_is_in_the_precision_of_this_machine(
    machine: Machine, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve_options, "detect_machine", lambda: machine)
    assert plan_of(BuildOptions(size="nano")).request.precision == precision
    assert plan_of(BuildOptions(size="nano", precision="bf16")).request.precision == "bf16"

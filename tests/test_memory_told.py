"""What editing is said to take: told before a bundle is built, of a bundle, and by the docs."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import bundle_config, random_weights, request, small_bundle
from click.testing import CliRunner
from editing import conditioned, full_bundle, pair_bundle, picture, plain_bundle, plain_config
from stand_in_cuda import pretend

from varedit_export.cli import main
from varedit_export.estimate import cpu_editing, gpu_editing
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import random_sources
from varedit_reference.config import preset
from varedit_runtime.backends.detect import detect_machine
from varedit_runtime.backends.engines.memory import budget
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
from varedit_runtime.backends.onnxruntime.memory import host_budget
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import readable_size
from varedit_runtime.manifest import weights_file

ROOT = Path(__file__).parent.parent


def planned(path: Path) -> BundlePlan:
    """Return the plan of one of the bundles for tests."""
    wanted, config = request(path), bundle_config()
    if path == pair_bundle():
        wanted = replace(wanted, batch=2)
    if path == plain_bundle():
        config = plain_config()
        wanted = replace(wanted, config=config, guided=False)
        return BundlePlan([wanted], random_sources(config, seed=0))
    if path == full_bundle():
        wanted = replace(wanted, config=conditioned("full"))
    return BundlePlan([wanted], random_weights())


@pytest.mark.parametrize("path", [small_bundle, pair_bundle, plain_bundle, full_bundle])
def test_it_is_what_an_editor_allocates(path: Callable[[], Path]) -> None:
    bundle = Bundle.open(path())
    (variant,) = bundle.manifest.variants
    told = host_budget(bundle, variant)
    with Editor.open(path(), threads=1) as editor:
        assert told.caches + told.between == editor.backend.buffer_bytes
    plan = planned(path())
    before = cpu_editing(plan, plan.request.shapes)
    assert (before.caches, before.activations) == (told.caches, told.activations)
    for name in ("weights", "text", "between", "total", "offloaded"):
        assert getattr(before, name) == pytest.approx(getattr(told, name), rel=0.05)


@pytest.mark.parametrize("path", [small_bundle, pair_bundle, plain_bundle, full_bundle])
def test_a_plan_tells_what_engines_take(path: Callable[[], Path]) -> None:
    bundle = Bundle.open(path())
    (variant,) = bundle.manifest.variants
    plan = planned(path())
    for before, offload in zip(gpu_editing(plan, plan.request.shapes), (None, "text"), strict=True):
        told = budget(bundle, variant, offload=offload)
        assert before.caches == pytest.approx(told.caches, rel=0.01)  # places are aligned
        assert before.weights == pytest.approx(told.weights, rel=0.01)
        assert before.total == pytest.approx(told.total, rel=0.03)


def test_inspect_tells_it() -> None:
    bundle = Bundle.open(small_bundle())
    (variant,) = bundle.manifest.variants
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)]).output
    told = host_budget(bundle, variant)
    assert f"on a CPU: {readable_size(told.total)} of memory" in shown
    assert f"and the program; {readable_size(told.offloaded)} with --offload text" in shown
    offloaded = budget(bundle, variant, offload="text")
    assert (
        f"the driver takes; {readable_size(offloaded.total)} with --offload text on engines"
        in shown
    )


@pytest.mark.parametrize("offload", [None, "text"])
def test_backends_are_judged_by_it(offload: str | None) -> None:
    bundle = Bundle.open(small_bundle())
    (variant,) = bundle.manifest.variants
    facts, told = detect_machine(bundle, offload=offload).bundle, host_budget(bundle, variant)
    assert facts and facts.memory == (told.offloaded if offload else told.total)
    assert facts.offloaded == told.offloaded


@pytest.mark.parametrize("offload", [None, "text"])
def test_cuda_is_judged_by_what_its_arena_keeps(
    offload: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed caches stay taken while the text encoder is loaded into memory of its own."""
    pretend(monkeypatch)
    bundle = Bundle.open(small_bundle())
    (variant,) = bundle.manifest.variants
    files, enter = bundle.manifest.files, OnnxBackend._enter
    buffers, taken = [0], [0]

    def watched(backend: OnnxBackend, text: bool) -> None:
        enter(backend, text)
        buffers.append(max(buffers[-1], backend.buffer_bytes))
        loaded = {*bundle.components} - {TEXT} | {*backend._sessions} & {TEXT}
        taken.append(buffers[-1] + sum(files[weights_file(name)].size for name in loaded))

    monkeypatch.setattr(OnnxBackend, "_enter", watched)
    with Editor.open(bundle.path, provider="cuda", threads=1, offload=offload) as editor:
        editor.edit(picture(40, 30), "add a hat", seed=1)
    facts = detect_machine(bundle, offload=offload).bundle
    assert facts
    told = facts.gpu_memory - host_budget(bundle, variant).activations
    assert told == pytest.approx(max(taken), rel=0.005)


def test_a_dry_run_tells_it_and_builds_nothing(tmp_path: Path) -> None:
    asked = ("--size", "tiny-8b", "--res", "256", "--random-weights", "0", "--dry-run")
    done = CliRunner().invoke(main, ["build", *asked, "-o", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    assert re.search(r"256-b1 edits with .* of GPU memory \(.*\), and what the driver", done.stdout)
    assert re.search(r"256-b1 edits with .* of memory \(.* activations\), and the", done.stdout)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_and_fetches_no_weights() -> None:
    """The hub cannot be asked in tests: a build of the same options fails."""
    published = ("build", "--size", "8b", "--res", "512", "--yes")
    assert CliRunner().invoke(main, published).exit_code == 1
    done = CliRunner().invoke(main, [*published, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "weights: not read" in done.stdout and "512-b1 edits with" in done.stdout


def full_size(size: str, resolution: int, precision: str, gpu: bool) -> list[str]:
    """Return what editing takes, and what with the text encoder offloaded."""
    config = preset(size, resolution)
    wanted = VariantRequest(config, resolution, "1:1", precision, 1, True, 128, Path("none"))
    plan = BundlePlan([wanted], random_sources(config, seed=0))
    on_cpu = cpu_editing(plan, wanted.shapes)
    on_gpu = [whole.total for whole in gpu_editing(plan, wanted.shapes)]
    totals = on_gpu if gpu else [on_cpu.total, on_cpu.offloaded]
    return [f"{total / 1e9:.1f} GB" for total in totals]


@pytest.mark.parametrize("size", ["2b", "8b"])
@pytest.mark.parametrize("resolution", [512, 1024])
def test_the_docs_tell_what_full_sizes_take(size: str, resolution: int) -> None:
    half, fp8, byte = (full_size(size, resolution, of, True) for of in ("fp16", "fp8", "int8-gpu"))
    assert fp8 == byte
    cells = [*half, *fp8, *full_size(size, resolution, "int8", False)]
    row = " | ".join([f"{size}, {resolution} px", *cells])
    assert f"| {row} |" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_readme_tells_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    half, full = full_size("8b", 512, "fp16", True), full_size("8b", 512, "fp32", False)
    assert re.search(rf"\| {half[0]} of the GPU's \(.*\), and scratch \| {full[0]} \(", readme)
    assert f"with `--offload text` | {half[1]} on engines | {full[1]} |" in readme
    whole, offloaded = full_size("8b", 512, "int8", False)
    assert f"editing takes {whole}, and {offloaded} with `--offload text`" in readme
    whole, offloaded = full_size("8b", 512, "fp8", True)
    assert f"fp8 take {whole} of the GPU's, and {offloaded}." in readme

"""Bundles on the graphs and engines of others: their weights alone are new."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import bundle_config, quiet, request, small_bundle
from click.testing import CliRunner
from editing import picture
from fake_bundles import rewrite_manifest
from msgspec import structs
from simulated_gpu import SimulatedGpu
from uncompiled import Uncompiled, keep_engines_in, near

import varedit_export
from varedit_engines import engine_cache
from varedit_engines.compile_set import CompileJob, compile_engine_set
from varedit_engines.engine_compiler import Compiled
from varedit_export import BuildOptions
from varedit_export.assemble import assemble
from varedit_export.cli import main
from varedit_export.errors import ParityError
from varedit_export.estimate import needs
from varedit_export.graphs.trace import Tracer
from varedit_export.graphs_from import check_requests, check_weights_fit
from varedit_export.plan import BundlePlan
from varedit_export.resolve_options import plan_of
from varedit_export.sources import random_sources
from varedit_runtime.backends.engines.backend import EngineBackend
from varedit_runtime.backends.engines.engine_set import (
    EngineLayout,
    EngineSet,
    EngineSets,
    built_here,
)
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import FileEntry, canonical_json

pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_engines_in(tmp_path, monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(small_bundle(), tmp_path / "base"))


def plan(target: Path, other: Bundle | None, seed: int = 1) -> BundlePlan:
    return BundlePlan([request(target)], random_sources(bundle_config(), seed), other)


def quick(target: Path, other: Bundle) -> Bundle:
    """Build on the graphs of another bundle, without tracing any."""
    with pytest.MonkeyPatch.context() as untraced:
        untraced.setattr(Tracer, "graph", None)
        assemble(plan(target, other), quiet)
    return Bundle.open(target)


def test_the_bundle_is_the_one_that_tracing_makes(tmp_path: Path, base: Bundle) -> None:
    """Nothing of the weights is in the graphs. Parity is proven with the new weights."""
    ours = quick(tmp_path / "quick", base).manifest
    assemble(plan(tmp_path / "traced", None), quiet)
    traced = Bundle.open(tmp_path / "traced").manifest
    assert structs.replace(ours, name="") == structs.replace(traced, name="")
    changed = {name for name, entry in ours.files.items() if entry != base.manifest.files[name]}
    assert {Path(name).stem for name in changed} == {"transformer", "tokenizer", "text_encoder"}
    assert [line.measure for line in ours.parity] == [x.measure for x in base.manifest.parity]
    with Editor.open(base.path, backend="onnxruntime", threads=1) as editor:
        editor.swap_weights(tmp_path / "quick")


def test_a_bundle_may_take_its_own_place(base: Bundle) -> None:
    compiled_in(base)
    again = quick(base.path, base)
    assert again.digest != base.digest and len(EngineSets(again).folders) == 1


def test_graphs_that_compute_something_else_are_not_published(tmp_path: Path, base: Bundle) -> None:
    """The comparison with the reference is made again: these graphs were never compared."""
    (variant,) = base.manifest.variants
    file = variant.graphs["scale_02"].file
    model = onnx.load(base.path / file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.op_type = "Sigmoid"
            del node.attribute[:]
    write_graph(base, file, model.SerializeToString())
    with pytest.raises(ParityError, match="measures failed"):
        quick(tmp_path / "quick", Bundle.open(base.path))
    assert not (tmp_path / "quick").exists()


def write_graph(bundle: Bundle, file: str, data: bytes) -> None:
    (bundle.path / file).write_bytes(data)
    entry = FileEntry(sha256(data).hexdigest(), len(data))
    files = {**bundle.manifest.files, file: entry}
    rewrite_manifest(bundle.path, canonical_json(structs.replace(bundle.manifest, files=files)))


def test_a_damaged_graph_is_refused(tmp_path: Path, base: Bundle) -> None:
    (variant,) = base.manifest.variants
    with (base.path / variant.graphs["prefill"].file).open("r+b") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"prefill\.onnx is damaged"):
        quick(tmp_path / "quick", base)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100])
def test_what_is_no_graph_is_refused(tmp_path: Path, base: Bundle, damage: bytes) -> None:
    (variant,) = base.manifest.variants
    write_graph(base, variant.graphs["scale_02"].file, damage)
    with pytest.raises(BundleError, match=r"scale_02\.onnx "):
        quick(tmp_path / "quick", Bundle.open(base.path))


def test_nothing_is_planned_for_tracing(
    tmp_path: Path, base: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no pattern is kept there
    traced, taken = plan(tmp_path / "new", None), plan(tmp_path / "new", base)
    assert needs(traced).seconds > 2 * needs(taken).seconds
    assert f"  {taken.graph_count} graphs of {base.path}" in str(taken)


# What does not fit


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as refused:
        action()
    return str(refused.value)


def test_the_options_that_differ_are_listed_before_weights_are_looked_for() -> None:
    options = BuildOptions(size="nano", precision="fp16", batch=2, graphs_from=embedded())
    said = refusal(lambda: plan_of(options))
    assert (
        "(precision is 'fp32', not 'fp16'; variants is ['128-b1'], not ['128-b2']): give the "
        "options that it was built with, or leave out --graphs-from"
    ) in said
    options = BuildOptions("8b", (256,), checkpoint="missing.pth", graphs_from=small_bundle())
    said = refusal(lambda: plan_of(options))
    assert "depth is 2, not 40; width is 96, not 3584; heads is 3, not 28" in said
    with pytest.raises(BundleError, match="there is no bundle at"):
        plan_of(BuildOptions(size="nano", graphs_from="missing"))


def test_the_precision_is_by_default_that_of_the_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the best for this machine would be."""
    other = Path(shutil.copytree(embedded(), tmp_path / "integers"))
    manifest = structs.replace(Bundle.open(other).manifest, precision="int8")
    rewrite_manifest(other, canonical_json(manifest))
    assert BuildOptions(size="nano", graphs_from=other).for_graphs.precision == "int8"
    assert plan_of(BuildOptions(size="nano", graphs_from=embedded())).request.precision == "fp32"
    asked: list[BuildOptions] = []

    def build(options: BuildOptions, *rest: object) -> None:
        asked.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr(varedit_export, "build", build)
    done = CliRunner().invoke(main, ["build", "--size", "nano", "--graphs-from", str(other)])
    assert done.exit_code == 1 and [options.precision for options in asked] == ["int8"]


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "text tokens": ({"text_tokens": 30}, "96-b1's text_tokens is 24, not 30"),
    "resolution": ({"resolution": 97}, "96-b1's resolution is 96, not 97"),
    "guidance": ({"guided": False}, "variants is ['96-b1'], not ['96-b1-unguided']"),
    "precision": ({"precision": "bf16"}, "precision is 'fp32', not 'bf16'"),
}


@pytest.mark.parametrize("how", CHANGED)
def test_another_request_is_refused(base: Bundle, tmp_path: Path, how: str) -> None:
    change, said = CHANGED[how]
    wanted = replace(request(tmp_path / "new"), **change)
    assert said in refusal(lambda: check_requests(base, [wanted]))


def test_weights_that_would_lie_elsewhere_are_refused(base: Bundle, tmp_path: Path) -> None:
    config, sources = bundle_config(), random_sources(bundle_config(), 1)
    assert sources.text
    bigger = structs.replace(sources.text.config, vocabulary=400, max_distance=64)
    text = replace(sources.text, config=bigger)
    fused = replace(request(tmp_path / "new"), fused_attention=True)
    check_weights_fit(base, BundlePlan([request(tmp_path / "new")], sources))
    said = refusal(
        lambda: check_weights_fit(base, BundlePlan([fused], replace(sources, text=text)))
    )
    assert "text encoder's vocabulary is 384, not 400" in said
    assert "text encoder's max_distance is 128, not 64" in said
    assert "text_encoder's embedding is 'torch.float32 [384, 256]', not '" in said
    assert "graphs of 96-b1 is [" in said and "'fused_scale'" in said
    without = BundlePlan([request(tmp_path / "new")], replace(sources, text=None))
    assert "components is [" in refusal(lambda: check_weights_fit(base, without))
    tokenizer = replace(config.tokenizer, channels=64)
    other = replace(request(tmp_path / "new"), config=replace(config, tokenizer=tokenizer))
    assert "channels is 32, not 64" in refusal(lambda: check_requests(base, [other]))
    listed = refusal(lambda: check_weights_fit(base, BundlePlan([other], sources)))
    assert listed.count("tokenizer's ") == 3 and " more of tokenizer" in listed


# Engines


class Counting(Uncompiled):
    """A compiler that counts what it compiles."""

    compiled = 0

    def compile(self, name: str, graph: bytes, *rest: Any) -> Compiled:
        Counting.compiled += 1
        return super().compile(name, graph, *rest)


def compiled_in(bundle: Bundle, layout: EngineLayout = "external", gpu: str = "sm89") -> EngineSet:
    Counting.compiled = 0
    compiler: Any = Counting(gpu=gpu)
    return compile_engine_set(CompileJob(bundle, layout, compiler), lambda *_: None)


@pytest.mark.parametrize("place", ["bundle", "cache"])
def test_engines_with_external_weights_serve_the_new_bundle(
    tmp_path: Path, base: Bundle, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "cache":
        monkeypatch.setattr(engine_cache, "_writable", lambda folder: False)
    compiled_in(base)
    assert Counting.compiled > 5
    compiled_in(base, "baked")
    bundle = quick(tmp_path / "quick", base)
    engines = compiled_in(bundle)
    assert Counting.compiled == 0
    assert engines.path.is_relative_to(bundle.path) == (place == "bundle")
    (variant,) = bundle.manifest.variants
    found = EngineSets(bundle).find(
        variant.name, "tensorrt-rtx", {"tensorrt-rtx": "1.7"}, "sm89 NVIDIA L4"
    )
    assert found == engines  # the baked ones have other weights
    backend = EngineBackend(bundle, variant, found, SimulatedGpu(bundle.graphs_folder))
    ours = Editor(bundle, variant, backend, read_instructions(bundle, variant.text_tokens))
    with ours, Editor.open(bundle.path, backend="onnxruntime", threads=1) as theirs:
        pictures = (e.edit(picture(40, 30), "add a hat", seed=1).image for e in (ours, theirs))
        assert near(*pictures)


def test_copied_engines_are_trusted_as_the_copied_ones(tmp_path: Path, base: Bundle) -> None:
    """That somebody else's were copied here does not make them built here; damaged ones stay."""
    engines = compiled_in(base)
    built_here(engines.digest).unlink()
    damaged = compiled_in(base, gpu="sm120")
    with (damaged.path / "prefill.plan.gz").open("r+b") as file:
        file.write(b"x")
    bundle = quick(tmp_path / "quick", base)
    (copy,) = EngineSets(bundle).folders
    assert EngineSet.open(copy).digest == engines.digest
    with pytest.raises(BundleError, match="built elsewhere"):
        compiled_in(bundle)

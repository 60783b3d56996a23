"""Compiling engines with TensorRT for RTX, ahead of time and without a GPU."""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import msgspec
import onnx
import onnx_ir as ir
import pytest
from bundles import bundle_config, half_bundle, random_weights, request, small_bundle
from click.testing import CliRunner
from fake_bundles import rewrite_manifest
from onnx import helper

from varedit_engines import compile_set, engine_cache, engine_compiler
from varedit_engines.compile_set import CompileJob, compile_engine_set, stages_of
from varedit_engines.engine_cache import EngineCache
from varedit_engines.engine_compiler import Compiled, EngineCompiler
from varedit_engines.engine_report import EngineReport, Kernel, engine_reports
from varedit_engines.network import external_inputs
from varedit_engines.progress import OnStep
from varedit_engines.publish import Staging
from varedit_export import EngineOptions, assemble, compile_engines
from varedit_export.cli import main
from varedit_export.graphs.trace import Tracer
from varedit_export.plan import BundlePlan
from varedit_runtime.backends.engines import engine_set, import_tensorrt
from varedit_runtime.backends.engines.engine_set import (
    LAYOUTS,
    EngineLayout,
    EngineSet,
    why_unusable,
)
from varedit_runtime.backends.interrupt import exit_on_signals
from varedit_runtime.backends.wiring import profiles_of
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import (
    BackendError,
    BundleError,
    ConfigError,
    MissingExtraError,
    SignalArrived,
)
from varedit_runtime.manifest import (
    DIGEST,
    MANIFEST,
    UNGUIDED,
    Manifest,
    ParityLine,
    StoredWeight,
    canonical_json,
    weights_file,
)
from varedit_runtime.precision import FLOAT32, PRECISIONS

ADA = ("sm89",)
EXTERNAL_BYTES, PROFILE_BYTES = 8 * 10**6, 3 * 10**6


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data_folder", "cache_folder"):
        monkeypatch.setattr(engine_set, name, lambda name=name: tmp_path / name)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(small_bundle(), tmp_path / "bundle"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the graphs that are compiled, in order."""
    names: list[str] = []
    original = EngineCompiler.compile

    def recorded(compiler: EngineCompiler, name: str, *rest: Any) -> Compiled:
        made = original(compiler, name, *rest)
        names.append(name)
        return made

    monkeypatch.setattr(EngineCompiler, "compile", recorded)
    return names


def quiet(graph: str, done: int, steps: int) -> None:
    """Report progress to nobody."""


def compile_small(
    bundle: Bundle, layout: EngineLayout = "external", architectures: Sequence[str] = ADA
) -> EngineSet:
    compiler = EngineCompiler("tensorrt-rtx", architectures)
    return compile_engine_set(CompileJob(bundle, layout, compiler), quiet)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_graph_compiles(
    tmp_path: Path, precision: str, layout: EngineLayout, compiled: list[str]
) -> None:
    bundle = Bundle.open(shutil.copytree(half_bundle(precision), tmp_path / "bundle"))
    engines = compile_small(bundle, layout)
    (variant,) = bundle.manifest.variants
    weights = {name: bundle.weights_path(name).stat().st_size for name in bundle.components}
    sizes = {stage: len(engines.plan_bytes(stage)) for stage in stages_of(variant, layout)}
    assert set(compiled) == set(sizes) == set(engines.manifest.plans)
    stored = {stage: engines.manifest.files[p.file] for stage, p in engines.manifest.plans.items()}
    assert {stage: p.size for stage, p in engines.manifest.plans.items()} == sizes
    reports = dict(engine_reports(engines))
    assert {stage: report.plan for stage, report in reports.items()} == sizes
    assert all(report.kernels and report.scratch for report in reports.values())
    assert engines.manifest.scratch == max(report.scratch or 0 for report in reports.values())
    inside = sum(size for name, size in weights.items() if layout != "external")
    assert engines.manifest.resident and engines.manifest.resident > 0.9 * inside
    if layout == "external":
        assert all(stored[stage].size < size / 2 for stage, size in sizes.items())
    if layout == "profiles":
        assert sizes["scale"] > weights["transformer"]
        profiles = 2 * (len(variant.grids) + 1)
        assert stored["scale"].size < weights["transformer"] + profiles * PROFILE_BYTES
        assert {"prefill", "scale_00"}.isdisjoint(sizes)
    if layout == "baked":
        assert min(sizes["scale_00"], sizes["scale_02"]) > weights["transformer"] / 2


def test_a_plan_of_32_blocks_is_a_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of a plan is its kernels' source: it grows with the blocks, not with their width."""
    bundle = Bundle.open(shutil.copytree(half_bundle("fp16"), tmp_path / "bundle"))
    graph = deep_graph("scale_00", 32)
    monkeypatch.setattr(compile_set, "read_graph", lambda *_: graph)
    monkeypatch.setattr(compile_set, "stages_of", lambda variant, layout: ["scale_00"])
    engines = compile_small(bundle)
    plan = engines.manifest.plans["scale_00"]
    assert plan.size == len(engines.plan_bytes("scale_00"))
    assert (engines.path / plan.file).stat().st_size <= EXTERNAL_BYTES < plan.size


def deep_graph(stage: str, depth: int, precision: str = "fp16") -> bytes:
    """Grow a stage of the small bundle to more blocks; its weights have no bytes."""
    config = bundle_config()
    config = replace(config, transformer=replace(config.transformer, depth=depth))
    wanted = replace(request(Path("deep"), precision), config=config)
    plan = BundlePlan([wanted], random_weights())
    stored = {
        f"{part.attribute}.{name}" if part.attribute else name: StoredWeight(name, part.file, 0, 0)
        for part in plan.components
        for name in part.module.state_dict()
    }
    (graph,) = (graph for graph in plan.variants[0].graphs if graph.name == stage)
    model = Tracer(plan.fake, stored).graph(graph.stage, graph.depth, graph.binding)
    return ir.to_proto(model).SerializeToString()


def test_external_weights_are_inputs_that_lie_in_the_bundle(bundle: Bundle) -> None:
    (variant,) = bundle.manifest.variants
    for stage in stages_of(variant, "external"):
        graph, weights = external_inputs(bundle.graph_bytes(variant.name, stage))
        model = onnx.load_model_from_string(graph)
        names = [spec.name for spec in variant.graphs[stage].inputs]
        assert [value.name for value in model.graph.input] == [*names, *(w.name for w in weights)]
        assert weights
        for weight in weights:
            path = bundle.path / weight.file
            assert weight.offset + weight.length <= path.stat().st_size
            stored = _stored(path)
            whole = "level_embedding" if weight.name == "level" else weight.name
            offset, length = stored[whole]
            if weight.name in ("level", "cos", "sin"):  # a scale's own part of it
                assert offset <= weight.offset
                assert weight.offset + weight.length <= offset + length
            else:
                assert (weight.offset, weight.length) == (offset, length)


def test_what_is_no_graph_is_a_typed_error() -> None:
    for content in (b"\xff\xff garbage", b"no graph"):
        with pytest.raises(BundleError, match="a graph is not ONNX: build the bundle again"):
            external_inputs(content)


@pytest.mark.parametrize("place", [{}, {"location": "x", "offset": "0"}, {"location": "x"}])
@pytest.mark.parametrize("length", [None, "many"])
def test_a_weight_that_lies_nowhere_is_a_typed_error(
    place: dict[str, str], length: str | None
) -> None:
    weight = onnx.TensorProto(name="qkv", data_location=onnx.TensorProto.EXTERNAL, data_type=1)
    for key, value in {**place, **({"length": length} if length else {})}.items():
        weight.external_data.add(key=key, value=value)
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[weight]))
    with pytest.raises(BundleError, match="does not say where its weight 'qkv' lies"):
        external_inputs(model.SerializeToString())


def _stored(path: Path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (8 + length + start, end - start)
        for name, (start, end) in ((n, entry["data_offsets"]) for n, entry in header.items())
    }


def test_profiles_are_the_shapes_of_the_static_graphs(bundle: Bundle) -> None:
    (variant,) = bundle.manifest.variants
    twin = {spec.name: spec.shape for spec in variant.graphs["scale"].inputs}
    profiles, scales = profiles_of("scale", variant, "sar"), len(variant.grids)
    assert len(profiles) == 2 * (1 + scales)
    names = [f"scale_{k:02}{form}" for form in ("", UNGUIDED) for k in range(scales)]
    for index, sizes in zip(names, profiles[1 : 1 + scales] + profiles[2 + scales :], strict=True):
        static = {s.name: s.shape for s in variant.graphs[index].inputs}
        for name in static.keys() & twin.keys() - {"start"}:
            shape = tuple(n if isinstance(n, int) else sizes[n] for n in twin[name])
            assert shape == static[name], (index, name)
    assert profiles[0]["past"] == profiles[0]["reference"] == 0
    assert [sizes["rows"] for sizes in profiles_of("condition", variant, "sar")] == [2, 1]
    assert {sizes["text_tokens"] for sizes in profiles_of("scale", variant, "sar")} == {24}


def test_a_second_compilation_compiles_nothing(bundle: Bundle, compiled: list[str]) -> None:
    engines = compile_small(bundle)
    compiled.clear()
    assert compile_small(bundle) == engines and not compiled
    other = compile_small(bundle, architectures=("sm120",))
    assert other.path != engines.path and compiled


def test_an_interrupted_compilation_goes_on_where_it_was(
    bundle: Bundle, compiled: list[str]
) -> None:
    def stop(graph: str, done: int, steps: int) -> None:
        if len(compiled) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA))
    arrived: list[int] = []
    with pytest.raises(SignalArrived), exit_on_signals(arrived):
        compile_engine_set(job, stop)
    assert arrived == [signal.SIGTERM]
    first = list(compiled)
    assert len(first) == 3
    engines = compile_engine_set(job, quiet)
    assert sorted(compiled) == sorted(job.recipe.graphs)
    assert all(engines.plan_bytes(stage) for stage in first)


def test_every_graph_is_a_step(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(
        compiler: EngineCompiler,
        name: str,
        graph: bytes,
        folder: Path,
        shapes: Any,
        on_step: OnStep,
    ) -> Compiled:
        on_step(name, 7, 9)
        return Compiled(memoryview(name.encode()), EngineReport(len(name), scratch=len(name)))

    monkeypatch.setattr(EngineCompiler, "compile", pretend)
    told: list[tuple[str, int, int]] = []
    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA))
    compile_engine_set(job, lambda *step: told.append(step))
    count = len(job.recipe.graphs)
    assert told == [
        *(
            (f"engine {stage}{detail}", place, count)
            for place, stage in enumerate(job.recipe.graphs)
            for detail in ("", ", 7 of 9")
        ),
        ("done", count, count),
    ]


SOFTMAX = Kernel("_softmax_0", "kgen", ("blocks.0/Softmax",), (("float16",), ("float16",)), 4, 2, 0)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the graphs to compile, and write their names as plans, which takes no time."""
    names: list[str] = []

    def pretend(compiler: EngineCompiler, name: str, *rest: Any) -> Compiled:
        names.append(name)
        report = EngineReport(len(name), scratch=len(name), kernels=(SOFTMAX,))
        return Compiled(memoryview(name.encode()), report)

    monkeypatch.setattr(EngineCompiler, "compile", pretend)
    return names


# Bundles that change


@pytest.fixture(params=["writable", "read-only"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile engines into the bundle or, if it is read-only, into the user's cache."""
    if request.param == "read-only":
        monkeypatch.setattr(engine_cache, "_writable", lambda folder: False)


def test_engines_of_the_embedded_bundle_are_kept_in_the_cache(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA))
    recipe = job.recipe
    inside, cached = EngineCache(bundle).places_of(recipe)
    assert EngineCache(bundle).create(recipe).target == inside
    monkeypatch.setattr(engine_cache, "embedded", lambda: bundle.path)
    assert EngineCache(bundle).create(recipe).target == cached


def rebuilt(bundle: Bundle, file: str, change: Callable[[bytes], bytes]) -> Bundle:
    """Replace a bundle by one with other bytes in one file."""
    with Staging(bundle.path) as staging:
        for name in bundle.manifest.files:
            data = (bundle.path / name).read_bytes()
            staging.file(name).write_bytes(change(data) if name == file else data)
            staging.record(name)
        staging.publish(msgspec.structs.replace(bundle.manifest, files=staging.files))
    return Bundle.open(bundle.path)


def other_weights(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other_graph(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    model.doc_string = "another"
    return model.SerializeToString()


@pytest.mark.usefixtures("keeping")
def test_other_weights_compile_nothing_where_they_are_inputs(
    bundle: Bundle, pretended: list[str]
) -> None:
    engines = compile_small(bundle)
    baked = compile_small(bundle, "baked")
    pretended.clear()
    newer = rebuilt(bundle, weights_file("transformer"), other_weights)
    assert newer.digest != bundle.digest
    assert compile_small(newer) == engines and pretended == []
    assert compile_small(newer, "baked") != baked and pretended


@pytest.mark.usefixtures("keeping")
def test_another_graph_compiles_its_engine_and_no_other(
    pretended: list[str], tmp_path: Path
) -> None:
    bundle = Bundle.open(two_variants(tmp_path / "bundle"))
    jobs = [job_of(bundle, variant.name) for variant in bundle.manifest.variants]
    first, other = (compile_engine_set(job, quiet) for job in jobs)
    pretended.clear()
    newer = rebuilt(bundle, "graphs/other.prefill.onnx", other_graph)
    jobs = [job_of(newer, variant.name) for variant in newer.manifest.variants]
    assert compile_engine_set(jobs[0], quiet) == first and pretended == []
    assert compile_engine_set(jobs[1], quiet).path != other.path
    assert pretended == ["prefill"]


@pytest.mark.usefixtures("keeping")
def test_a_damaged_plan_is_not_taken_over(bundle: Bundle, pretended: list[str]) -> None:
    flip(compile_small(bundle).path / "scale_00.plan.gz")
    pretended.clear()
    newer = rebuilt(bundle, f"graphs/{bundle.manifest.variants[0].name}.prefill.onnx", other_graph)
    engines = compile_small(newer)
    assert sorted(pretended) == ["prefill", "scale_00"]
    engines.verify()


def job_of(bundle: Bundle, variant: str) -> CompileJob:
    return CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA), variant)


# Damaged engines


def cut_a_plan(folder: Path) -> None:
    (folder / "prefill.plan.gz").write_bytes(b"")


def lose_a_plan(folder: Path) -> None:
    (folder / "prefill.plan.gz").unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_a_plan(folder: Path) -> None:
    flip(folder / "prefill.plan.gz")


def flip_the_manifest(folder: Path) -> None:
    flip(folder / MANIFEST)


def flip_the_digest(folder: Path) -> None:
    flip(folder / DIGEST)


def make_it_of_an_earlier_format(folder: Path) -> None:
    """Turn a set into one that was built here by a program whose manifests named plans alone."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    manifest["plans"] = {stage: plan["file"] for stage, plan in manifest["plans"].items()}
    data = msgspec.json.encode(manifest)
    rewrite_manifest(folder, data)
    engine_set.built_here(sha256(data).hexdigest()).touch()


DAMAGES = (
    *(cut_a_plan, lose_a_plan, flip_a_plan),
    *(flip_the_manifest, flip_the_digest, make_it_of_an_earlier_format),
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_engines_are_compiled_again(
    bundle: Bundle, pretended: list[str], damage: Callable[[Path], None]
) -> None:
    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA))
    engines, notices = compile_engine_set(job, quiet), []
    damage(engines.path)
    pretended.clear()
    assert compile_engine_set(job, quiet, notices.append) == engines
    (notice,) = notices
    assert notice.startswith("engines are compiled again: ") and str(engines.path) in notice
    whole = damage is flip_a_plan  # but for one plan, which a look at sizes does not find
    assert sorted(pretended) == (["prefill"] if whole else sorted(job.recipe.graphs))
    assert compile_engine_set(job, quiet, notices.append) == engines and len(notices) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: None, "built elsewhere"),
        (cut_a_plan, "is damaged"),
        (flip_the_manifest, "is damaged"),
    ],
)
def test_engines_built_elsewhere_are_refused_and_left(
    bundle: Bundle,
    pretended: list[str],
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = compile_small(bundle).path
    damage(folder)
    before = contents(folder)
    monkeypatch.setattr(engine_set, "data_folder", lambda: tmp_path / "other")
    pretended.clear()
    for again in (False, True):
        with pytest.raises(BundleError, match=said):
            compile_engine_set(
                CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA)),
                quiet,
                again=again,
            )
    assert pretended == [] and contents(folder) == before


def test_damaged_engines_are_not_replaced_while_foreign_ones_are_in_the_cache(
    bundle: Bundle, pretended: list[str]
) -> None:
    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA))
    inside, cached = EngineCache(bundle).places_of(job.recipe)
    compile_engine_set(job, quiet)
    shutil.copytree(inside, cached)
    manifest = (cached / MANIFEST).read_bytes()
    rewrite_manifest(cached, manifest + b" ")
    cut_a_plan(inside)
    before = contents(cached)
    with pytest.raises(BundleError, match="damaged"):
        compile_engine_set(job, quiet)
    assert contents(cached) == before


@pytest.mark.usefixtures("keeping")
def test_whole_engines_are_compiled_again_when_asked(bundle: Bundle, pretended: list[str]) -> None:
    engines = compile_small(bundle)
    arguments = ["engines", str(bundle.path), "--backend", "tensorrt-rtx", "--architecture", "sm89"]
    for options, times in (([], 1), (["--again"], 2), ([], 2)):
        result = CliRunner().invoke(main, [*arguments, *options])
        assert result.exit_code == 0 and result.stdout == f"{engines.path}\n"
        assert sorted(pretended) == sorted([*engines.manifest.plans] * times)


def test_whole_engines_are_not_compiled_again_where_others_or_none_would_be_replaced(
    bundle: Bundle, pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", ADA))
    inside, cached = EngineCache(bundle).places_of(job.recipe)
    compile_engine_set(job, quiet)
    shutil.copytree(inside, cached)
    rewrite_manifest(cached, (cached / MANIFEST).read_bytes() + b" ")
    pretended.clear()
    with pytest.raises(BundleError, match=f"{cached} has engines that were built elsewhere"):
        compile_engine_set(job, quiet, again=True)
    shutil.rmtree(cached)
    monkeypatch.setattr(engine_cache, "_writable", lambda folder: False)
    with pytest.raises(BundleError, match=f"{inside} cannot be replaced"):
        compile_engine_set(job, quiet, again=True)
    assert pretended == []


def test_the_command_says_that_engines_are_compiled_again(
    bundle: Bundle, pretended: list[str]
) -> None:
    arguments = ["engines", str(bundle.path), "--backend", "tensorrt-rtx", "--architecture", "sm89"]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0 and "again" not in first.output
    cut_a_plan(Path(first.stdout.strip()))
    second = CliRunner().invoke(main, arguments)
    assert second.exit_code == 0 and second.stdout == first.stdout
    (line,) = (line for line in second.stderr.splitlines() if "again" in line)
    assert line.startswith("engines are compiled again: ") and "prefill.plan.gz is damaged" in line


def test_two_at_once_compile_once(bundle: Bundle, compiled: list[str]) -> None:
    results: list[EngineSet] = []
    threads = [
        threading.Thread(target=lambda: results.append(compile_small(bundle))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0] == results[1]
    assert len(compiled) == len(set(compiled))


def test_baked_weights_are_checked_before_they_are_baked(bundle: Bundle) -> None:
    path = bundle.weights_path("transformer")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="damaged"):
        compile_small(bundle, "baked")
    assert not list(bundle.path.glob("engines/*"))


def test_a_graph_that_cannot_be_compiled_says_which() -> None:
    compiler = EngineCompiler("tensorrt-rtx", ADA)
    with pytest.raises(BackendError, match="cannot read graph broken"):
        compiler.compile("broken", b"no graph", Path("."), [], quiet)


def test_a_graph_of_one_profile_is_compiled_with_static_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorRT has more kernels for them; it needs a profile for any other."""
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"
    )
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    monkeypatch.delattr(engine_compiler, "_fixed_profile")
    compiler, data = EngineCompiler("tensorrt-rtx", ADA), model.SerializeToString()
    assert compiler.compile("g", data, Path(), [{"x": (2, 4)}], quiet).plan.nbytes
    with pytest.raises(NameError, match="_fixed_profile"):
        compiler.compile("g", data, Path(), [{"x": (1, 4)}, {"x": (2, 4)}], quiet)


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend that this machine's GPU has this compute capability."""

    def become(major: int, minor: int) -> None:
        gpu = SimpleNamespace(compute_capability=(major, minor), name="NVIDIA GPU")
        monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=lambda: gpu))

    return become


@pytest.mark.parametrize("named", [(), ("sm89",), ("SM89",)])
def test_rtx_compiles_for_what_its_recipe_says(
    bundle: Bundle,
    named: Sequence[str],
    machine_of: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default it compiles for some architectures, which may not include this machine's."""
    machine_of(8, 9)
    trt = fake_tensorrt.fake_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    job = CompileJob(bundle, "external", EngineCompiler("tensorrt-rtx", named))
    assert job.recipe.gpu == "sm89" and job.recipe == job_of(bundle, job.variant.name).recipe
    assert why_unusable(job.recipe, job.recipe.tools, ["sm89 NVIDIA L4"]) is None
    job.compiler.compile("graph", b"a", Path(), [], quiet)
    (config,) = trt.Builder.configs
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89


def test_rtx_refuses_to_compile_for_a_gpu_that_it_cannot_compile_for(
    machine_of: Callable[[int, int], None],
) -> None:
    machine_of(9, 0)
    with pytest.raises(ConfigError, match=r"no engines for 'sm90', only for sm80, .*sm121: use"):
        EngineCompiler("tensorrt-rtx")
    assert EngineCompiler("tensorrt-rtx", ADA).gpu == "sm89"


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    yield


def test_what_cannot_be_is_refused(without_gpu: None) -> None:
    for gpu in ("sm1", "sm87", "sm90", "sm100", "sm103", "sm110"):
        with pytest.raises(
            ConfigError, match=rf"no engines for '{gpu}', only for .*: use tensorrt,"
        ):
            EngineCompiler("tensorrt-rtx", ["sm89", gpu])
    with pytest.raises(ConfigError, match=r"'sm75' \(no matrix products in fp32, "):
        EngineCompiler("tensorrt-rtx", ["sm75"])
    with pytest.raises(ConfigError, match="only tensorrt-rtx"):
        EngineCompiler("tensorrt", ADA)
    with pytest.raises(ConfigError, match="no backend"):
        EngineCompiler("openvino")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        EngineCompiler("tensorrt-rtx")
    with pytest.raises(ConfigError, match="no layout"):
        stages_of(Bundle.open(small_bundle()).manifest.variants[0], "loose")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_is_not_installed_is_named(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    with pytest.raises(MissingExtraError, match=rf"varedit-export\[export,{backend}\]"):
        EngineCompiler(backend)


def test_turing_really_has_no_matrix_products_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be refused for no reason; every precision keeps the head in fp32."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    monkeypatch.setattr(import_tensorrt, "TURING", "none")
    compiler = EngineCompiler("tensorrt-rtx", ["sm75"])
    with pytest.raises(BackendError, match="FP32 GEMM is not supported"):
        compiler.compile("head", model.SerializeToString(), Path(), [], quiet)
    assert all(p.format("transformer", "head").type == FLOAT32 for p in PRECISIONS.values())


@pytest.mark.parametrize(("precision", "slow"), [("fp32", True), ("fp16", False), ("bf16", False)])
def test_the_cost_of_fp32_is_said_before_compiling(
    bundle: Bundle, precision: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    types = {"fp32": b"float32", "fp16": b"float16", "bf16": b"bfloat16"}
    text = msgspec.json.encode(bundle.manifest).replace(b"float32", types[precision])
    text = text.replace(b'"precision":"fp32"', f'"precision":"{precision}"'.encode())
    changed = msgspec.json.decode(text, type=Manifest)
    monkeypatch.setattr(compile_set, "compile_engine_set", lambda *job: _none())
    options = EngineOptions("tensorrt-rtx", architectures=ADA)
    with pytest.raises(BackendError):
        compile_engines(replace(bundle, manifest=changed), options, notice=said.append)
    assert ["do not fuse large attentions" in line for line in said] == [False] + [True] * slow


def test_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        compile_set, "compile_engine_set", lambda job, *rest: shown.append(str(job)) or _none()
    )
    arguments = ["engines", str(bundle.path), "--backend", "tensorrt-rtx", "--architecture", "sm89"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "not compiled" in result.output
    assert "weights external" in result.output and len(shown) == 1


def test_the_command_reports_kernels_also_of_engines_that_are_there(
    bundle: Bundle, pretended: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "kernels.json"
    arguments = ["engines", str(bundle.path), "--backend", "tensorrt-rtx", "--architecture", "sm89"]
    told = []
    for _ in range(2):
        done = CliRunner().invoke(main, [*arguments, "--report", str(file)])
        assert done.exit_code == 0, done.output
        assert "1 kernels move 6 bytes, 0 fused attentions, 8 bytes of scratch" in done.stderr
        assert Path(done.stdout.strip()).is_dir()
        told.append(json.loads(file.read_text()))
        file.unlink()
    assert told[0] == told[1] and set(told[0]) == set(pretended)
    assert len(pretended) == len(set(pretended))
    (kernel,) = told[0]["scale_00"]["kernels"]
    assert msgspec.convert(kernel, Kernel) == SOFTMAX and told[0]["scale_00"]["scratch"] == 8
    missing = CliRunner().invoke(main, [*arguments, "--report", str(tmp_path / "no" / "file")])
    assert missing.exit_code == 1 and "there is no folder" in missing.stderr


def test_engines_of_an_earlier_version_have_no_report(bundle: Bundle, pretended: list[str]) -> None:
    engines = compile_small(bundle)
    manifest = msgspec.json.decode((engines.path / MANIFEST).read_bytes())
    for plan in manifest["plans"].values():
        del plan["report"], plan["scratch"], plan["resident"]
    data = msgspec.json.encode(manifest)
    rewrite_manifest(engines.path, data)
    engine_set.built_here(sha256(data).hexdigest()).touch()
    earlier = compile_small(bundle)
    assert earlier.manifest.scratch is None and not list(engine_reports(earlier))
    arguments = ["engines", str(bundle.path), "--backend", "tensorrt-rtx", "--architecture", "sm89"]
    assert "compiled by an earlier version: --again" in CliRunner().invoke(main, arguments).stderr
    again = compile_engine_set(job_of(bundle, earlier.manifest.recipe.variant), quiet, again=True)
    assert again.manifest.scratch and list(engine_reports(again))


def _none() -> EngineSet:
    raise BackendError("not compiled")


# Building with a backend


BUILD = ("build", "--size", "tiny-2b", "--res", "256", "--random-weights", "0", "-o")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace building by copying a bundle of two variants, and record what is built."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    targets: list[Path] = []

    def copied(plan: BundlePlan, progress: Any) -> list[ParityLine]:
        targets.append(plan.request.target)
        shutil.copytree(two_variants(tmp_path / "built"), plan.request.target)
        return []

    monkeypatch.setattr(assemble, "assemble", copied)
    return targets


def two_variants(folder: Path) -> Path:
    """Make a small bundle with one variant under two names, and two files of the prefill."""
    replace, own = msgspec.structs.replace, "graphs/other.prefill.onnx"
    manifest = Bundle.open(shutil.copytree(small_bundle(), folder)).manifest
    (variant,) = manifest.variants
    prefill = variant.graphs["prefill"]
    shutil.copy(folder / prefill.file, folder / own)
    files = {**manifest.files, own: manifest.files[prefill.file]}
    other = replace(
        variant, name="other", graphs={**variant.graphs, "prefill": replace(prefill, file=own)}
    )
    manifest = replace(manifest, variants=(variant, other), files=files)
    rewrite_manifest(folder, canonical_json(manifest))
    return folder


def test_a_build_for_a_backend_compiles_as_the_command_for_engines_does(
    builds: list[Path], compiled: list[str], tmp_path: Path
) -> None:
    options = ("--backend", "tensorrt-rtx", "--architecture", "sm89")
    target = tmp_path / "new"
    result = CliRunner().invoke(
        main, [*BUILD, str(target), *options, "--engine-layout", "profiles"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{target}\n" and builds == [target]
    manifest = Bundle.open(target).manifest
    variants = manifest.variants
    graphs = [v.graphs[stage] for v in variants for stage in stages_of(v, "profiles")]
    different = {manifest.files[graph.file].sha256 for graph in graphs}
    assert len(compiled) == len(different) < len(graphs)  # what variants share is compiled once
    compiled.clear()
    for variant in variants:
        arguments = ["engines", str(target), *options, "--layout", "profiles"]
        found = CliRunner().invoke(main, [*arguments, "--variant", variant.name])
        assert found.exit_code == 0 and found.stdout.strip() in result.stderr
    assert compiled == []


def test_a_failed_compilation_leaves_the_bundle(
    builds: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compile_set, "compile_engine_set", lambda job, *rest: _none())
    arguments = [*BUILD, str(tmp_path / "new"), "--backend", "tensorrt-rtx"]
    result = CliRunner().invoke(main, [*arguments, "--architecture", "sm89"])
    assert result.exit_code == 1 and "not compiled" in result.stderr
    assert result.stdout == f"{builds[0]}\n"
    assert Bundle.open(builds[0])


def test_a_build_compiles_nothing_unless_asked(
    builds: list[Path], compiled: list[str], tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, [*BUILD, str(tmp_path / "new")])
    assert result.exit_code == 0 and len(builds) == 1 and compiled == []


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_backend_is_named_before_the_build(
    backend: str, builds: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    result = CliRunner().invoke(main, [*BUILD, str(tmp_path / "new"), "--backend", backend])
    assert result.exit_code == 1 and builds == []
    assert f'pip install "varedit-export[export,{backend}]"' in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "onnxruntime", "--architecture", "sm89"), "--architecture: onnxruntime"),
        (("--architecture", "sm1"), "sm120"),  # which TensorRT for RTX alone has
        (("--engine-layout", "baked"), "--engine-layout: onnxruntime"),
        (("--backend", "tensorrt-rtx"), "no NVIDIA GPU"),
        (("--backend", "tensorrt-rtx", "--architecture", "sm1"), "sm120"),
        (("--backend", "tensorrt", "--architecture", "sm89"), "only tensorrt-rtx"),
    ],
)
def test_what_a_backend_does_not_take_is_said_before_the_build(
    options: tuple[str, ...], said: str, builds: list[Path], without_gpu: None, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, [*BUILD, str(tmp_path / "new"), *options])
    assert result.exit_code == 1 and builds == []
    assert said in result.stderr and len(result.stderr.splitlines()) == 1

"""Precisions of engines whose factors have 8 bits: products, a bundle, its engines, refusals."""

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from bundles import built, bundle_config, random_weights, request
from click.testing import CliRunner
from editing import picture
from safetensors import safe_open
from simulated_gpu import SimulatedGpu
from test_compile_set import quiet
from uncompiled import Uncompiled, compiled, keep_engines_in

from varedit_engines.compile_set import CompileJob
from varedit_engines.engine_compiler import EngineCompiler
from varedit_engines.network import external_inputs
from varedit_export import BuildOptions
from varedit_export.assemble import assemble
from varedit_export.check_options import check_build
from varedit_export.cli import main
from varedit_export.graphs.layout import pack
from varedit_export.graphs.model import GraphLinear
from varedit_export.graphs.trace import Tracer
from varedit_export.parity.compare_bundle import compare_backend
from varedit_export.parity.measures import gate
from varedit_export.parity.streamed import compare_streamed
from varedit_export.plan import BundlePlan
from varedit_export.sources import random_sources
from varedit_reference.config import preset
from varedit_runtime.backends.engines.backend import EngineBackend
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.manifest import StoredWeight, weights_file
from varedit_runtime.precision import (
    LARGEST_FP8,
    WHOLE_BYTE,
    EngineColumns,
    Float8Columns,
    Format,
    named,
)

STORAGES: dict[str, EngineColumns] = {
    "fp8": Float8Columns(LARGEST_FP8),
    "int8-gpu": EngineColumns(WHOLE_BYTE),
}
CHANNELS_IN, CHANNELS = 96, 48
BLOCKS = 2


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


# A product


def test_fp8_has_the_values_of_e4m3() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10**5, generator=generator) * torch.randn(10**5, generator=generator).exp() ** 4
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(STORAGES["fp8"].round(x), expected)
    assert expected.unique().numel() > 200


@pytest.mark.parametrize("name", STORAGES)
def test_a_graph_computes_what_the_storage_rounds(name: str) -> None:
    storage = STORAGES[name]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(CHANNELS_IN, CHANNELS, generator=generator)
    weight[:, 3] = 0  # a column that nothing has to divide by
    layer = GraphLinear(CHANNELS_IN, CHANNELS, Format("float16", storage))
    parts = pack(storage, weight)
    state = {f"weight.{part}": tensor for part, tensor in parts.items()}
    layer.eval().load_state_dict(state | {"bias": torch.arange(CHANNELS) / 10})
    x = torch.randn(20, CHANNELS_IN, generator=generator)
    x[0] *= 10  # rows have steps of their own
    x[1] = 0
    x = x.half().float()  # as the graph takes it
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False, opset_version=20)
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    (given,) = session.get_inputs()
    (made,) = session.run(None, {given.name: x.numpy()})
    rounded = storage.round_input(x)
    expected = rounded @ storage.unpack(parts) + layer.bias.float()
    assert torch.allclose(
        torch.from_numpy(np.asarray(made)).float(), expected, rtol=2e-3, atol=0.02
    )
    exact = x @ weight
    error = (rounded @ storage.unpack(parts) - exact).square().mean().sqrt()
    assert 0.005 < error / exact.square().mean().sqrt() < 0.05


# A bundle


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Parity with the reference is proven as it is built."""
    return Bundle.open(
        built("fp8", lambda target: BundlePlan([request(target, "fp8")], random_weights()))
    )


def test_its_products_are_stored_in_bytes(bundle: Bundle) -> None:
    with safe_open(bundle.path / weights_file("transformer"), "pt") as file:
        values, names = file.get_tensor("blocks.1.cross_kv.weight.values"), set(file.keys())
    assert values.dtype == torch.float8_e4m3fn and values.float().abs().max() == LARGEST_FP8
    assert "blocks.1.cross_kv.weight" not in names
    with safe_open(bundle.path / weights_file("text_encoder"), "pt") as file:
        assert file.get_tensor("blocks.1.qkv").dtype == torch.float16


def test_it_is_verified_from_its_own_weights(bundle: Bundle) -> None:
    output = run("verify", bundle.path)
    assert "rounded to fp8" in output and "EXCEEDED" not in output


def test_it_is_compared_block_by_block(bundle: Bundle) -> None:
    lines = gate(compare_streamed(bundle, bundle_config(), random_weights()))
    blocks = [line for line in lines if "rms error over what they add" in line.measure]
    assert {"condition", "prefill", "scale_01", "text_encoder"} <= {line.stage for line in blocks}


def test_it_edits_and_says_what_it_is(bundle: Bundle) -> None:
    with Editor.open(bundle.path) as editor:
        edited = np.asarray(editor.edit(picture(60, 50), "a red hat", seed=3).image)
    assert edited.shape == (50, 60, 3) and edited.std() > 0
    inspected = run("inspect", bundle.path)
    assert "fp8; in fp32: transformer: residual stream" in inspected and "on a GPU" in inspected
    told = run("doctor", bundle.path, code=1)  # its weights are random
    assert "this bundle, to check it: no CPU computes it fast" in told
    assert "can compile: sm89, sm120, sm121: name one with --architecture" in told


def test_other_weights_leave_graphs_and_plans_alone(bundle: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sources = random_sources(bundle_config(), seed=7)
    assemble(BundlePlan([request(other, "fp8")], sources, bundle), quiet)
    keep = pytest.MonkeyPatch()
    with keep.context() as folders:
        keep_engines_in(tmp_path, folders)
        digests = [compiled(path)[1].manifest.recipe.graphs for path in (bundle.path, other)]
    assert digests[0] == digests[1]
    with Editor.open(bundle.path) as editor:
        before = editor.edit(picture(60, 50), "a red hat", seed=3).image
        editor.swap_weights(other)
        after = editor.edit(picture(60, 50), "a red hat", seed=3).image
    with Editor.open(other) as editor:
        expected = editor.edit(picture(60, 50), "a red hat", seed=3).image
    assert after.tobytes() == expected.tobytes() != before.tobytes()


# Engines


def test_engines_are_verified(bundle: Bundle, tmp_path: Path) -> None:
    """Their weights of 8 bits, and the scales, are inputs."""
    with pytest.MonkeyPatch.context() as folders:
        keep_engines_in(tmp_path, folders)
        opened, engines = compiled(bundle.path)
        (variant,) = opened.manifest.variants
        weights = engines.manifest.weights["scale_01"]
        assert {w.name for w in weights} >= {
            f"blocks.1.qkv.weight.{part}" for part in ("values", "scales")
        }
        backend = EngineBackend(opened, variant, engines, SimulatedGpu(opened.graphs_folder))
        with closing(backend):
            lines = gate(compare_backend(opened, variant, backend))
    assert any("logits against the reference" in line.measure for line in lines)


def deep_graph_of_2b(precision: str) -> bytes:
    """Make a graph of four blocks of 2b's widths, at the third scale; its weights have no bytes."""
    config = preset("2b", 256)
    config = replace(config, transformer=replace(config.transformer, depth=BLOCKS))
    wanted = replace(request(Path("deep"), precision), config=config)
    plan = BundlePlan([wanted], random_sources(config, seed=0))
    stored = {
        f"{part.attribute}.{name}" if part.attribute else name: StoredWeight(name, part.file, 0, 0)
        for part in plan.components
        for name in part.module.state_dict()
    }
    (graph,) = (graph for graph in plan.variants[0].graphs if graph.name == "scale_02")
    model = Tracer(plan.fake, stored).graph(graph.stage, graph.depth, graph.binding)
    return external_inputs(ir.to_proto(model).SerializeToString())[0]


@pytest.mark.parametrize(
    ("precision", "architectures", "kind"),
    [("fp8", ["sm89", "sm120"], "float8_e4m3fn"), ("int8-gpu", ["sm86"], "int8")],
)
def test_products_of_the_blocks_are_native(
    precision: str, architectures: list[str], kind: str
) -> None:
    """Six a block, and rounding is fused into the kernels around them."""
    graph = deep_graph_of_2b(precision)
    for architecture in architectures:
        compiler = EngineCompiler("tensorrt-rtx", [architecture])
        report = compiler.compile("scale_02", graph, Path(), [], quiet).report
        assert report.kernels is not None
        products = [kernel for kernel in report.kernels if kernel.kind == "gemm"]
        native = [kernel for kernel in products if kernel.types[0] == (kind,)]
        assert len(native) == 6 * BLOCKS, architecture
        assert sum(kernel.attends for kernel in report.kernels) == 2 * BLOCKS
        assert report.resident is not None and report.resident < 10**6  # weights are inputs


def test_weights_of_the_transformer_are_half_of_those_of_fp16() -> None:
    config = preset("2b", 512)
    sizes = {}
    for precision in ("fp16", *STORAGES):
        wanted = replace(request(Path("sizes"), precision), config=config)
        sizes[precision] = BundlePlan([wanted], random_sources(config, seed=0)).shared[0].size
    assert sizes["fp8"] == sizes["int8-gpu"] < 0.55 * sizes["fp16"]


# Where it cannot run


def test_gpus_without_fp8_are_refused_with_what_helps(bundle: Bundle) -> None:
    why = r"sm86 has no products in fp8, .* since sm89: build with --precision int8-gpu or fp16"
    job = ["build", "--size", "nano", "--precision", "fp8", "--backend", "tensorrt-rtx"]
    result = CliRunner().invoke(main, [*job, "--architecture", "sm89", "--architecture", "sm86"])
    assert result.exit_code == 1 and re.search(why, result.output)
    with pytest.raises(ConfigError, match=why):
        CompileJob(bundle, "external", cast("EngineCompiler", Uncompiled(gpu="sm86 RTX A6000")))
    CompileJob(bundle, "external", cast("EngineCompiler", Uncompiled(gpu="sm89+sm120")))
    assert named("int8-gpu").not_on("sm80") is None


@pytest.mark.parametrize("name", STORAGES)
def test_onnx_runtime_on_a_gpu_is_refused(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} is for engines: compile them"):
        onnx_backend._check_precision(named(name), "cuda")
    with pytest.raises(ConfigError, match=f"ONNX Runtime runs no {name} on a GPU"):
        check_build(BuildOptions(size="nano", precision=name, fused_attention=True))

"""What engines consist of, read from the log of real compilations with TensorRT for RTX."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_compile_set import ADA, deep_graph, quiet

from varedit_engines import engine_report as engine_report_module
from varedit_engines.engine_compiler import EngineCompiler
from varedit_engines.engine_report import EngineReport, engine_report, packed, unpacked
from varedit_engines.network import external_inputs
from varedit_runtime.errors import BundleError

BLOCKS = 4
# Kernels of a four-block graph, as TensorRT for RTX 1.7 compiled them and a few more.
MOST = {"scale_01": 90, "prefill": 85}
LINEAR = "(Linear) Row major linear format"
KERNEL = (
    "Name: _gemm_mha_v2_myl0_61, LayerType: kgen, Inputs: [ "
    "{ Name: q, Dimensions: [6,4,32], Strides: [32,192,1], StrideOrder: [1,2,0], Datatype: Half, "
    "Format: (Arbitrary) Format with stride order = [1,2,0] }, "
    "{ Name: q, Dimensions: [6,2,32], Strides: [32,192,1], StrideOrder: [1,2,0], Datatype: Half, "
    f"Format: {LINEAR} }}, "
    "{ Name: bias, Dimensions: [], Strides: [], StrideOrder: [], Datatype: Float, "
    f"Format: {LINEAR} }}], Constants: [], Outputs: [ "
    "{ Name: y, Dimensions: [6,4,32], Strides: [32,192,1], StrideOrder: [1,2,0], "
    f"Datatype: BFloat16, Format: {LINEAR} }}], TacticName: _gemm_mha_v2_0x2a, StreamId: 0, "
    "Metadata: [ONNX Layer: blocks.3/MatMul_4][ONNX Layer: blocks.3/Softmax_2]"
    "[ONNX Layer: blocks.3/MatMul_3]"
)


def compiled(stage: str, precision: str = "fp16") -> EngineReport:
    graph, _ = external_inputs(deep_graph(stage, BLOCKS, precision))
    return EngineCompiler("tensorrt-rtx", ADA).compile(stage, graph, Path(), [], quiet).report


@pytest.mark.parametrize(
    ("stage", "fused"), [("scale_01", 2 * BLOCKS), ("prefill", 2 * BLOCKS - 2)]
)
def test_attention_is_fused_and_kernels_are_few(stage: str, fused: int) -> None:
    """Both attentions of every block; the prefill's last block computes keys and values alone."""
    report = compiled(stage)
    assert report.kernels is not None
    assert sum(kernel.attends for kernel in report.kernels) == fused
    assert len(report.kernels) <= MOST[stage]
    assert {kernel.stream for kernel in report.kernels} == {0}
    assert report.scratch and report.profiles == 1
    assert report.resident is not None and report.resident < 10**5  # constants: weights are inputs
    products = [kernel for kernel in report.kernels if kernel.kind == "gemm"]
    halves = [kernel for kernel in products if kernel.types == (("float16",), ("float16",))]
    assert len(halves) >= 4 * (BLOCKS - 1)
    assert {kernel.types[0] for kernel in products} == {("float16",), ("float32",)}  # the head


def test_engines_of_fp32_fuse_no_attention() -> None:
    """Which is why compiling them warns."""
    report = compiled("scale_02", "fp32")
    assert report.kernels and not any(kernel.attends for kernel in report.kernels)


def test_a_kernel_is_read_from_the_log() -> None:
    report = engine_report(7, [f"Layers:\n{KERNEL}\n\nI/O Tensors:\n Name: q"])
    assert report.kernels
    (kernel,) = report.kernels
    assert (kernel.name, kernel.kind, kernel.stream) == ("_gemm_mha_v2_myl0_61", "kgen", 0)
    assert kernel.types == (("float16", "float32"), ("bfloat16",))
    assert (kernel.read, kernel.written) == (6 * 4 * 32 * 2 + 4, 6 * 4 * 32 * 2)  # q counts once
    assert kernel.nodes == ("blocks.3/MatMul_4", "blocks.3/Softmax_2", "blocks.3/MatMul_3")
    assert kernel.attends


def test_a_length_that_is_copied_is_no_kernel() -> None:
    copied = (
        "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { "
        "Name: [Cast]_output, Location: Device, Dimensions: [], Datatype: Int64, Format: Format "
        "not available due to dynamic shapes }], ParameterType: ShapeH2D, shapeValues0: [1], "
        "TacticValue: 0x0000000000000000, StreamId: 0, Metadata: "
    )
    assert engine_report(7, [copied, KERNEL]) == engine_report(7, [KERNEL])


@pytest.mark.parametrize(
    "line",
    [
        KERNEL.replace("Datatype: Half", "Datatype: Quarter"),
        KERNEL.replace("Dimensions: [6,4,32]", "Dimensions: [6,-1,32]"),
        KERNEL.replace("StreamId", "Stream"),
        "Layer(Myelin): {ForeignNode[a...b]}, Tactic: 0x0, x (Half[1]) -> y (Half[1])",
    ],
)
def test_kernels_that_are_listed_in_another_form_are_unknown(line: str) -> None:
    report = engine_report(7, [line, KERNEL] if line.startswith("Name") else [line])
    assert report == EngineReport(7) and str(report) == "kernels unknown"


def test_what_an_engine_holds_is_its_weights_and_what_each_profile_keeps() -> None:
    lines = [f"Total Device Persistent Memory: {size} bytes" for size in (2, 3)]
    assert engine_report(7, lines).resident is None
    assert engine_report(7, [*lines, "Total Weights Memory: 10 bytes"]).resident == 15


@pytest.mark.parametrize(
    ("sizes", "scratch", "profiles"), [((), None, 1), ((5,), 5, 1), ((5, 9, 7), 9, 3)]
)
def test_scratch_is_that_of_the_largest_profile(
    sizes: Sequence[int], scratch: int | None, profiles: int
) -> None:
    lines = [f"Total Activation Memory: {size} bytes" for size in sizes]
    report = engine_report(7, lines)
    assert (report.scratch, report.profiles) == (scratch, profiles)


@pytest.mark.parametrize(
    "data", [b"", b"no gzip", gzip.compress(b"{}", mtime=0), gzip.compress(b"[", mtime=0)]
)
def test_what_is_no_report_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"a report of engines cannot be read \(.+\): compile"):
        unpacked([data])


def test_a_report_unpacks_to_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_report_module, "MOST", 100)
    with pytest.raises(BundleError, match="cannot be read"):
        unpacked([packed(engine_report(7, [KERNEL]))])


def test_a_report_is_kept_as_it_was() -> None:
    report = engine_report(7, [KERNEL, "Total Activation Memory: 5 bytes"])
    assert unpacked([packed(report)]) == report and packed(report) == packed(report)
    assert str(report) == (
        "1 kernels move 3.1 kB, 1 fused attentions, 5 bytes of scratch; bfloat16, float16, float32"
    )

"""Finding the first wrong layer of a graph, between two runners of ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

import varedit_export
from varedit_engines.compile_set import stages_of
from varedit_engines.engine_compiler import EngineCompiler
from varedit_export.cli import main
from varedit_export.errors import ParityError
from varedit_export.options import VerifyOptions
from varedit_export.parity.layers import (
    first_wrong,
    first_wrong_layer,
    stage_inputs,
    with_all_outputs,
)
from varedit_runtime.backends.onnxruntime.backend import load_graph
from varedit_runtime.backends.wiring import sized
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import ParityLine

STAGES = ["condition", "scale_00", "scale_02", "image_decoder"]


@pytest.fixture(scope="module")
def nano() -> Bundle:
    return Bundle.open(embedded())


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_wrong_layer_is_the_one_with_a_fault(nano: Bundle, stage: str) -> None:
    variant = nano.manifest.variant(None)
    graph = with_all_outputs(nano.graph_bytes(variant.name, stage))
    inputs = stage_inputs(nano, variant, stage)
    runner = OnnxrtRunner(load_graph(graph, nano.graphs_folder))
    assert first_wrong(graph, inputs, runner, runner, 60) is None
    model = onnx.load_model_from_string(graph)
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    planted = sums[len(sums) // 2]
    planted.op_type = "Sub"
    faulty = OnnxrtRunner(load_graph(model.SerializeToString(), nano.graphs_folder))
    found = first_wrong(graph, inputs, runner, faulty, 60)
    assert found is not None
    assert (found.name, found.operator) == (planted.name, "Add")
    assert found.snr < 60 and planted.name in str(found)


def test_every_stage_of_a_layout_has_inputs_of_an_edit(nano: Bundle) -> None:
    variant = nano.manifest.variant(None)
    for stage in ("text_encoder", "image_encoder", "prefill", "scale_06"):
        assert stage in stages_of(variant, "external")
        inputs = stage_inputs(nano, variant, stage)
        most = {"text_tokens": variant.text_tokens, "batch": variant.batch}
        specs = {spec.name: sized(spec, most) for spec in variant.graph(stage).inputs}
        assert {name: array.shape for name, array in inputs.items()} == specs


def test_a_stage_with_all_outputs_compiles_and_needs_a_gpu_to_run(nano: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    compiler = EngineCompiler("tensorrt-rtx", ["sm89"])
    with pytest.raises(ConfigError, match="no stage is called 'scale_99'; there are condition"):
        first_wrong_layer(nano, "scale_99", compiler)
    with pytest.raises(BackendError, match="Polygraphy cannot run condition's engine"):
        first_wrong_layer(nano, "condition", compiler)


def test_a_failed_engine_says_how_to_find_its_first_wrong_layer(
    nano: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(bundle: Path, options: VerifyOptions, measured: Callable[[ParityLine], None]):
        measured(ParityLine("condition", "a graph's own, against ONNX Runtime", 2.0, 1.0))
        measured(ParityLine("scale_00", "logits", 0.0, 1.0, "onnxruntime"))
        measured(ParityLine("scale_01", "logits", 2.0, 1.0, "onnxruntime"))
        raise ParityError("1 of 2 measures failed")

    monkeypatch.setattr(varedit_export, "verify", verify)
    for backend, told in (("tensorrt", True), ("onnxruntime", False)):
        arguments = ["verify", str(nano.path)]
        arguments += ["--backend", backend] if told else []
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert (f"layers {nano.path} scale_01 --backend tensorrt" in result.stderr) == told

"""Find which layer of an engine goes wrong first, with Polygraphy.

`verify --backend` tells which stage's engine differs from ONNX Runtime, and a stage has hundreds of
layers. A compiled engine does not show what is inside it, so every layer's output is made an output
of the graph, and that graph is compiled. Then ONNX Runtime and the new engine run on the same
inputs, those of an edit, and the outputs are compared in the graph's order: the first that differs
is the cause, later ones inherit the error.

What this cannot show: TensorRT fuses fewer layers when all their outputs are asked for, and the
weights are inside the engine here. If no layer is wrong although the stage is, look at a fused
kernel, or at the weights that the engine is fed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from varedit_engines.compile_set import profiles_to_compile, stages_of
from varedit_engines.engine_compiler import EngineCompiler, check_precision
from varedit_export.errors import ExportError
from varedit_runtime.backends.engines.import_tensorrt import RTX
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend, load_graph
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.wiring import TEXT, Step, wire
from varedit_runtime.bench import INSTRUCTION, synthetic_picture
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.random_text import with_any_text
from varedit_runtime.errors import BackendError, ConfigError, needs_extra, shown
from varedit_runtime.manifest import UNGUIDED, Variant

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

# Signal-to-noise ratio in dB below which a layer is wrong: an error of 0.1 % of its root mean
# square in fp32, of 3 % in 16 bits.
EXACT_SNR, ROUNDED_SNR = 60.0, 30.0
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class Layer:
    """A node of a graph whose output differs. snr: signal-to-noise ratio of the output, in dB."""

    name: str
    operator: str
    output: str
    snr: float

    def __str__(self) -> str:
        return f"{self.name} ({self.operator}): {self.snr:.1f} dB in its output {self.output}"


def first_wrong_layer(
    bundle: Bundle, stage: str, compiler: EngineCompiler, variant: str | None = None
) -> Layer | None:
    """Compile a stage with all layers' outputs, and return the first that differs; None if none.

    Raises ConfigError on an unknown stage, or a bundle whose precision cannot be compared,
    MissingExtraError without Polygraphy, BackendError if the graph does not compile or the engine
    cannot run here.
    """
    chosen = bundle.manifest.variant(variant)
    if stage not in (known := stages_of(chosen, "external")):
        raise ConfigError(f"no stage is called {shown(stage)}; there are {', '.join(known)}")
    if not (precision := bundle.manifest.policy).onnxruntime:
        raise ConfigError(
            f"{bundle.path} is in {precision.name}, which ONNX Runtime does not compute on CPUs: "
            "compare the layers of the same model in fp16"
        )
    check_precision(precision, compiler.gpu)
    graph = with_all_outputs(read_graph(bundle, chosen, stage))
    with needs_extra("polygraphy"):
        from polygraphy import config
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.exception import PolygraphyException

        config.USE_TENSORRT_RTX = compiler.backend == RTX  # before its TensorRT part is imported
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    profiles = profiles_to_compile(bundle, chosen, stage)
    plan, _ = compiler.compile(stage, graph, bundle.graphs_folder, profiles, lambda *_: None)
    # TensorRT for RTX is compiled to leave the memory of activations to its caller.
    engine = TrtRunner(EngineFromBytes(bytes(plan)), allocation_strategy="profile")
    session = load_graph(graph, bundle.graphs_folder)
    inputs = stage_inputs(bundle, chosen, stage)
    bundle.check_stands()  # its weights were read by their path
    try:
        least = EXACT_SNR if precision.exact else ROUNDED_SNR
        return first_wrong(graph, inputs, OnnxrtRunner(session), engine, least)
    except PolygraphyException as error:
        raise BackendError(
            f"Polygraphy cannot run {stage}'s engine ({error}): run `varedit-export doctor`"
        ) from error


def with_all_outputs(graph: bytes) -> bytes:
    """Return an ONNX graph whose outputs are all floating-point values that its nodes compute."""
    with needs_extra("polygraphy"):
        from polygraphy.backend.onnx import ModifyOutputs
    model = onnx.load_model_from_string(graph)
    # Polygraphy looks types up here alone, and TensorRT reads no output without one.
    infos = model.graph.value_info
    infos.extend(model.graph.output)
    floats = {info.name for info in infos if info.type.tensor_type.elem_type in FLOATS}
    names = [name for node in model.graph.node for name in node.output if name in floats]
    return ModifyOutputs(model, outputs=names)().SerializeToString()


def first_wrong(
    graph: bytes,
    inputs: Mapping[str, np.ndarray],
    expected: "BaseRunner",
    other: "BaseRunner",
    least: float,
) -> Layer | None:
    """Run a graph on two Polygraphy runners; return the first layer that differs, None if none.

    graph: what `with_all_outputs` returned. least: signal-to-noise ratio in dB that is accepted.
    """
    from polygraphy.comparator import Comparator, SnrCompareFunc
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        runs = Comparator.run([expected, other], data_loader=[inputs])
        Comparator.postprocess(runs, _without_infinities)
        (accuracy,) = Comparator.compare_accuracy(runs, compare_func=SnrCompareFunc(least))
    ((_, (results,)),) = accuracy.items()
    for node in onnx.load_model_from_string(graph).graph.node:
        for output in node.output:
            if output in results and not (result := results[output]):
                return Layer(node.name, node.op_type, output, result.snr)
    return None


def _without_infinities(outputs: Any) -> Any:
    """Zero what is infinite, as masks are: infinity minus itself would be no number."""
    for name, array in outputs.items():
        outputs[name] = np.where(np.isinf(array), np.zeros_like(array), array)
    return outputs


def stage_inputs(bundle: Bundle, variant: Variant, stage: str) -> dict[str, np.ndarray]:
    """Edit a picture of noise on ONNX Runtime; return what a stage's static graph reads in it."""
    recorder, instructions = _Recorder(bundle, variant, stage), None
    if TEXT in variant.graphs:
        instructions = read_instructions(bundle, variant.text_tokens)
    with Editor(bundle, variant, recorder, instructions) as editor:
        pictures = [synthetic_picture(variant)] * variant.batch
        guidance = 1.0 if stage.endswith(UNGUIDED) else None
        with_any_text(editor).edit(pictures, INSTRUCTION, guidance_scale=guidance, seed=0)
    if recorder.inputs is None:
        raise ExportError(f"an edit runs no stage {stage}")
    return recorder.inputs


class _Recorder(OnnxBackend):
    """Runs edits, and keeps what the static graph of one stage would read."""

    def __init__(self, bundle: Bundle, variant: Variant, stage: str) -> None:
        super().__init__(bundle, variant, OnnxRuntimeOptions())
        static = wire(variant, bundle.manifest.model, symbolic=False)
        self._wanted = next(step for step in static if step.stage == stage)
        self.inputs: dict[str, np.ndarray] | None = None

    @property
    def text_lengths(self) -> Sequence[int]:
        return [self.variant.text_tokens]  # which static graphs take

    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if step.name == self._wanted.name and self.inputs is None:
            self.inputs = {}
            for name, view in self._wanted.inputs.items():
                value = view.value
                array = given[value] if value in given else self._values[value].read()
                start = view.first * prod(view.shape[1:])
                flat = array.reshape(-1)[start : start + prod(view.shape)]
                self.inputs[name] = flat.reshape(view.shape)
        return super()._run(step, given)

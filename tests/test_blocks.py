"""Graphs grown from a few traced blocks: the same as traced whole."""

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from bundles import bundle_config, random_weights, request
from msgspec import structs

from varedit_export.components import Component
from varedit_export.errors import ExportError
from varedit_export.graphs.model import GraphTransformer
from varedit_export.graphs.scales import ScaleStage, SymbolicScaleStage
from varedit_export.graphs.stages import ConditionStage, Stage, TextEncoderStage
from varedit_export.graphs.text import GraphTextEncoder
from varedit_export.graphs.trace import Tracer
from varedit_export.graphs.variant_graphs import GraphPlan
from varedit_export.plan import BundlePlan
from varedit_runtime.manifest import StoredWeight

DEPTH = 6


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BundlePlan:
    config = bundle_config()
    config = replace(config, transformer=replace(config.transformer, depth=DEPTH))
    weights = random_weights()
    assert weights.text is not None
    text = replace(weights.text, config=structs.replace(weights.text.config, depth=DEPTH))
    wanted = replace(request(tmp_path_factory.mktemp("bundle")), config=config)
    return BundlePlan([wanted], replace(weights, text=text))


@pytest.fixture(scope="module")
def stored(plan: BundlePlan) -> dict[str, StoredWeight]:
    return {
        name: weight
        for component in plan.components
        for name, weight in _consecutive(component).items()
    }


def _consecutive(component: Component) -> dict[str, StoredWeight]:
    prefix = f"{component.attribute}." if component.attribute else ""
    stored, offset = {}, 0
    for name, tensor in component.module.state_dict().items():
        stored[prefix + name] = StoredWeight(name, component.file, offset, tensor.nbytes)
        offset += tensor.nbytes
    return stored


def whole(plan: BundlePlan, graph: GraphPlan) -> Stage:
    """Return the stage of a graph with all of its blocks."""
    shapes = replace(plan.request.shapes, any_batch=graph.stage.shapes.any_batch)
    modules = {component.name: component.module for component in plan.components}
    model, table = modules["transformer"], modules[f"positions_{plan.request.name}"]
    stage, text = graph.stage, modules["text_encoder"]
    assert isinstance(model, GraphTransformer) and isinstance(text, GraphTextEncoder)
    if isinstance(stage, TextEncoderStage):
        return TextEncoderStage(shapes, text)
    if isinstance(stage, ConditionStage):
        return ConditionStage(shapes, model)
    if isinstance(stage, ScaleStage):
        return ScaleStage(shapes, model, stage.kind)
    return type(stage)(shapes, model, table)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["text_encoder", "condition", "prefill", "scale_02"])
def test_grown_graphs_are_what_tracing_every_block_gives(
    plan: BundlePlan, stored: dict[str, StoredWeight], name: str
) -> None:
    graph = next(graph for graph in plan.variants[0].graphs if graph.name == name)
    grown = Tracer(plan.fake, stored).graph(graph.stage, graph.depth, graph.binding)
    traced = Tracer(plan.fake, stored).graph(whole(plan, graph), 0, graph.binding)
    assert DEPTH > 4 and text(grown) == text(traced)


def text(model: ir.Model) -> list[str]:
    """Replace the names of constants by their values: the optimiser chooses the names."""
    names = {
        value: f"{tensor.numpy().tolist()}"
        for value in model.graph.initializers.values()
        if not isinstance(tensor := value.const_value, ir.ExternalTensor) and tensor is not None
    }

    def named(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        return names.get(value) or f"{value.name} {value.shape} {value.dtype}"

    lines = [f"{node.name} {list(map(named, node.inputs))}" for node in model.graph]
    lines += [f"{node.name} {list(map(named, node.outputs))}" for node in model.graph]
    lines += [f"{node.name} {sorted(map(str, node.attributes.values()))}" for node in model.graph]
    weights = [
        f"{value.name} {tensor.location} {tensor.offset} {tensor.length}"
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    ]
    ends = [[named(value) for value in part] for part in (model.graph.inputs, model.graph.outputs)]
    return [*sorted(lines), *sorted(weights), str(ends)]


def test_blocks_that_differ_are_refused(
    plan: BundlePlan, stored: dict[str, StoredWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = next(graph for graph in plan.variants[0].graphs if graph.name == "scale")
    assert isinstance(graph.stage, SymbolicScaleStage)
    monkeypatch.setattr(graph.stage, "name", "odd")
    monkeypatch.setattr(graph.stage.model.blocks[2], "cross_norm", torch.nn.Identity())
    with pytest.raises(ExportError, match="alike"):
        Tracer(plan.fake, stored).graph(graph.stage, graph.depth)

"""Make a planned bundle: weights, graphs, parity, manifest, published whole or not at all."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir
from msgspec import structs

from varedit_engines.engine_cache import copy_sets
from varedit_engines.progress import OnStep
from varedit_engines.publish import Staging
from varedit_export.components import Component
from varedit_export.estimate import check_memory, needs, present
from varedit_export.graphs.side_by_side import SideBySide
from varedit_export.graphs.trace import Tracer
from varedit_export.graphs.variant_graphs import GraphPlan, VariantShapes
from varedit_export.manifest_model import manifest_of, tool_versions
from varedit_export.parity.compare_bundle import compare_bundle
from varedit_export.parity.measures import gate
from varedit_export.plan import BundlePlan, VariantPlan, VariantRequest
from varedit_reference.weights_file import check_room
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.host import available_memory
from varedit_runtime.backends.onnxruntime.integers import check_exact
from varedit_runtime.bundle import Bundle, work_folder
from varedit_runtime.manifest import (
    TOKENIZER,
    GraphSpec,
    ParityLine,
    StoredWeight,
    TensorSpec,
    Variant,
)

TYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


def assemble(plan: BundlePlan, on_step: OnStep) -> list[ParityLine]:
    """Build and publish a bundle; return the measured differences from the reference.

    Raises CheckpointError if the disk has no room or the folder cannot be made, BundleError if
    another process builds the same bundle, ExportError if memory is too small, and its ParityError
    if a graph is not as expected, BackendError if this processor computes the precision wrongly.
    Finished weights and graphs are kept for the next attempt after a failure or interrupt; an
    earlier bundle of the same name stays until the new one is complete.
    """
    target, needed = plan.request.target, needs(plan)
    check_room(target.parent, needed.disk - present(work_folder(target)))
    check_memory(needed.memory)
    check_exact(plan.request.policy)  # now, as it will be compared
    steps = len(plan.components) + plan.graph_count + 2
    spare = (available_memory() or 0) - needed.memory
    with Staging(target) as staging, SideBySide(_to_trace(plan), spare) as makers:
        work = _Work(plan, staging, makers, on_step, steps)
        shared: dict[str, StoredWeight] = {}
        for component in plan.shared:
            shared |= work.weights(component, plan.request)
        variants = tuple(work.variant(variant, shared) for variant in plan.variants)
        if plan.sources.text is not None:
            staging.file(TOKENIZER).write_bytes(plan.sources.text.tokenizer_json)
            staging.record(TOKENIZER)
        on_step("parity with the reference", steps - 2, steps)
        manifest = manifest_of(plan, variants, staging.files, ())
        unpublished = Bundle(staging.path, manifest, digest="")
        measures = compare_bundle(unpublished, plan.request.config, plan.sources)
        parity = gate(work.told(measures))
        on_step("publishing", steps - 1, steps)
        staging.publish(manifest_of(plan, variants, staging.files, tuple(parity)))
        if plan.graphs_from is not None:
            copy_sets(plan.graphs_from, Bundle.open(target))
        on_step("done", steps, steps)
    return parity


@dataclass
class _Work:
    """A running build, which makes what an earlier attempt left undone."""

    plan: BundlePlan
    staging: Staging
    makers: SideBySide
    on_step: OnStep
    steps: int
    step: int = 0

    def weights(self, component: Component, request: VariantRequest) -> dict[str, StoredWeight]:
        """Write a component; return where each of its weights lies."""
        self._next(f"weights of {component.name}")
        folder, file = self.staging.path, component.file
        key = _key(self.plan, request, component.name)
        if not self.staging.kept(file, key):
            self.staging.file(file)
            component.write(folder, partial(self._each, component))
            self.staging.record(file, key)
        return component.stored(folder)

    def variant(self, variant: VariantPlan, shared: dict[str, StoredWeight]) -> Variant:
        """Write a variant's table of positions and its graphs."""
        request = variant.request
        tracer = Tracer(self.plan.fake, shared | self.weights(variant.positions, request))
        specs = {graph.name: self._graph(variant, graph, tracer) for graph in variant.graphs}
        return Variant(name=request.name, graphs=specs, **request.fields)

    def _graph(self, variant: VariantPlan, graph: GraphPlan, tracer: Tracer) -> GraphSpec:
        several = f" of {variant.request.name}" if len(self.plan.variants) > 1 else ""
        self._next(f"graph {graph.name}{several}")
        file, key = variant.file(graph), _key(self.plan, variant.request, graph.name)
        if (other := self.plan.graphs_from) is not None:
            there = other.manifest.variant(variant.request.name)
            self.staging.file(file).write_bytes(read_graph(other, there, graph.name))
            self.staging.record(file)
            return structs.replace(there.graphs[graph.name], file=file)
        if not self.staging.kept(file, key):
            self.makers.wait(graph.stage)
            model = tracer.graph(graph.stage, graph.depth, graph.binding)
            ir.save(model, self.staging.file(file))
            self.staging.record(file, key)
        return graph_spec(self.staging.path, file)

    def told(self, measures: Iterable[ParityLine]) -> Iterator[ParityLine]:
        """Yield measures, telling which stages they are of."""
        for line in measures:
            self.on_step(f"parity with the reference, {line.stage}", self.steps - 2, self.steps)
            yield line

    def _each(self, component: Component, names: Sequence[str]) -> Iterator[str]:
        """Yield the names of a component's weights, telling how many are written."""
        for done, name in enumerate(names):
            what = f"weights of {component.name}, {done} of {len(names)}"
            self.on_step(what, self.step - 1, self.steps)
            yield name

    def _next(self, what: str) -> None:
        self.on_step(what, self.step, self.steps)
        self.step += 1


def _to_trace(plan: BundlePlan) -> list[tuple[VariantShapes, Sequence[GraphPlan]]]:
    if plan.graphs_from is not None:
        return []
    return [(variant.shapes, variant.graphs) for variant in plan.variants]


def graph_spec(folder: Path, file: str) -> GraphSpec:
    """Read the inputs and outputs of a written graph."""
    graph = ir.load(folder / file).graph
    inputs = tuple(_tensor_spec(value) for value in graph.inputs)
    return GraphSpec(file, inputs, tuple(_tensor_spec(value) for value in graph.outputs))


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype is not None and value.shape is not None
    shape = tuple(s if isinstance(s, int) else str(s.value) for s in value.shape)
    return TensorSpec(value.name, TYPE_NAMES[value.dtype], shape)  # type: ignore[arg-type]


def _key(plan: BundlePlan, request: VariantRequest, part: str) -> str:
    """Return a digest of all that a file is made from: model, request, weights, tools."""
    made_from = (
        part,
        request.config,
        request.policy,
        request.batch,
        request.guided,
        request.text_tokens,
        plan.sources.identity,
        list(tool_versions().values()),
    )
    return sha256(repr(made_from).encode()).hexdigest()

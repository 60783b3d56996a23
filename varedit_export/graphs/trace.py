"""Trace one stage into an ONNX graph whose weights are in a file beside it.

Tracing runs on fake tensors, so it needs no weights and no memory for them. The graph then refers
to the safetensors file by offset; only small constants are in the graph itself.
"""

import gc
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from varedit_export.errors import ExportError
from varedit_export.graphs.blocks import grow
from varedit_export.graphs.patterns import kept_pattern
from varedit_export.graphs.scales import Binding, WeightRows
from varedit_export.graphs.stages import BATCH, ROWS, TEXT_TOKENS, InputSpec, Stage
from varedit_runtime.geometry import LENGTHS
from varedit_runtime.manifest import StoredWeight

LARGEST_CONSTANT = 2**20  # bytes of an input that is folded: resizing matrices, no weights
# Sizes of symbolic dimensions while tracing. torch specialises 0, 1 and equal sizes: all differ.
SAMPLE_SIZES: dict[str, int] = {
    **dict(zip(LENGTHS, (3, 5, 2, 7, 4, 6, 11, 13, 17), strict=True)),
    ROWS: 4099,  # more than any batch has
    TEXT_TOKENS: 23,
    BATCH: 19,
}


def fake_tensors() -> FakeTensorMode:
    """Return the mode in which models are built and traced without memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Collect garbage rarely: walking the objects that a trace makes takes a fifth of its time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


class Tracer:
    """A maker of a bundle's graphs. stored: where each weight lies, by the stages' names."""

    def __init__(self, fake: FakeTensorMode, stored: Mapping[str, StoredWeight]) -> None:
        self._fake, self._stored = fake, stored
        self._templates: dict[str, ir.Model] = {}

    def graph(self, stage: Stage, depth: int = 0, binding: Binding | None = None) -> ir.Model:
        """Make one stage's ONNX model.

        depth: blocks of the whole model, if the stage has `TRACED_BLOCKS`. binding: what makes the
        stage a static graph, where it is a template. Raises ExportError if a value's shape is
        unknown or, except in graphs with symbolic lengths, not static.
        """
        model = self.pattern(stage, binding)
        grow(model.graph, depth)
        _refer_to_weights(model, self._stored, {} if binding is None else binding.parts)
        _strip(model, stage.name if binding is None else binding.name)
        _check_shapes(model, static=binding is not None or not _is_symbolic(stage))
        return model

    def pattern(self, stage: Stage, binding: Binding | None) -> ir.Model:
        """Return a graph of the blocks that are traced, with weights as inputs: kept, or made."""
        return kept_pattern(stage, binding, lambda: self._pattern(stage, binding))

    @_few_collections()
    def _pattern(self, stage: Stage, binding: Binding | None) -> ir.Model:
        if stage.name not in self._templates:
            self._templates[stage.name] = trace(stage, self._fake)
        model = self._templates[stage.name].clone()
        if binding is not None:
            _bind(model, binding)
        optimizer.optimize_ir(model, input_size_limit=LARGEST_CONSTANT)
        _fix_reshapes(model)
        _name_nodes(model)
        return model


def trace(stage: Stage, fake: FakeTensorMode) -> ir.Model:
    """Export a stage with torch.onnx, without optimising it."""
    specs = stage.inputs()
    with fake:
        examples = tuple(_example(spec) for spec in specs.values())
    least = {ROWS: stage.shapes.batch}  # else torch could not take the first rows, one a picture
    dynamic = {"tensors": tuple(_dynamic(spec, least) for spec in specs.values())}
    with _quiet(), _operators_kept(), fake:
        program = torch.export.export(stage, examples, dynamic_shapes=dynamic)
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=stage.opset,
            input_names=list(specs),
            output_names=list(stage.output_names),
        )
    assert exported is not None
    model = exported.model
    _name_dimensions(model, specs)
    _take_weights(model)
    return model


def _is_symbolic(stage: Stage) -> bool:
    return any(isinstance(size, str) for spec in stage.inputs().values() for size in spec.shape)


def _example(spec: InputSpec) -> Tensor:
    sizes = [SAMPLE_SIZES[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.empty(sizes, dtype=spec.dtype)


def _dynamic(spec: InputSpec, least: Mapping[str, int]) -> dict[int, Dim]:
    """Return the symbolic dimensions by axis. least: the smallest size of some."""
    sizes = {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}
    return {i: Dim(size, min=least.get(size)) for i, size in sizes.items()}


def _take_weights(model: ir.Model) -> None:
    """Turn weights into inputs while the graph is edited, so that none is folded into it."""
    weights = [
        value
        for value in model.graph.initializers.values()
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor)
    ]
    for value in weights:
        del model.graph.initializers[str(value.name)]
        value.const_value = None
        model.graph.inputs.append(value)


def _bind(model: ir.Model, binding: Binding) -> None:
    """Fill a graph's own lengths and small constants into its template."""
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        if value.shape is not None:
            value.shape = value.shape.evaluate(binding.sizes)
    for value in tuple(model.graph.inputs):
        if value.name in binding.constants:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(binding.constants[value.name], name=value.name)
            model.graph.register_initializer(value)


def _fix_reshapes(model: ir.Model) -> None:
    """Make constants of the shapes that symbolic lengths are reshaped to, where they can be.

    torch.onnx computes them, once for all blocks. A zero stands for the length that the input has
    at that place, so that no block reads what another one made, and nothing is computed.
    """
    for node in model.graph:
        if node.op_type != "Reshape":
            continue
        (given, wanted), (made,) = node.inputs, node.outputs
        assert given and wanted and given.shape is not None and made.shape is not None
        shape = _constant_shape(given.shape, made.shape)
        if wanted.const_value is None and shape.count(-1) < 2:
            name = f"shape {shape}"
            if name not in model.graph.initializers:
                constant = ir.Value(name=name, const_value=ir.tensor(shape, name=name))
                model.graph.register_initializer(constant)
            node.replace_input_with(1, model.graph.initializers[name])
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    RemoveUnusedNodesPass()(model)


def _constant_shape(given: ir.Shape, made: ir.Shape) -> list[int]:
    """Return a shape in numbers: 0 for a length at its old place, -1 for one at another place."""
    before = dict(enumerate(given))
    return [
        size if isinstance(size, int) else 0 if before.get(i) == size else -1
        for i, size in enumerate(made)
    ]


def _refer_to_weights(
    model: ir.Model, stored: Mapping[str, StoredWeight], parts: Mapping[str, WeightRows]
) -> None:
    """Turn weights from inputs into references to their files; drop those that nothing reads."""
    for value in tuple(model.graph.inputs):
        name = str(value.name)
        if name not in parts and name not in stored:
            continue
        model.graph.inputs.remove(value)
        if not value.uses():
            continue
        assert value.dtype is not None and value.shape is not None
        place = _rows(stored, parts[name], value) if name in parts else stored[name]
        value.const_value = ir.ExternalTensor(
            place.location,
            place.offset,
            place.length,
            value.dtype,
            shape=value.shape,
            name=place.name,
        )
        value.name = place.name
        model.graph.register_initializer(value)


def _rows(stored: Mapping[str, StoredWeight], part: WeightRows, value: ir.Value) -> StoredWeight:
    """Return where the rows of a weight lie that an input [.., row] stands for."""
    assert value.dtype is not None and value.shape is not None
    *count, length = value.shape.numpy()
    row = length * value.dtype.bitwidth // 8
    return stored[part.weight].part(str(value.name), part.first * row, prod(count) * row)


def _name_dimensions(model: ir.Model, specs: Mapping[str, InputSpec]) -> None:
    """Give symbolic dimensions, and expressions of them, the stage's own names.

    Expressions are simplified, as the order in which torch writes a sum changes from run to run.
    """
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, specs.values(), strict=True):
        assert value.shape is not None
        for traced, own in zip(value.shape, spec.shape, strict=True):
            if isinstance(own, str):
                names[str(traced)] = own
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")
    nodes = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *nodes):
        if value.shape is not None:
            value.shape = ir.Shape(
                size
                if isinstance(size, int)
                else ir.SymbolicDim(
                    pattern.sub(lambda match: names[match[0]], str(size))
                ).simplify()
                for size in value.shape
            )


def _name_nodes(model: ir.Model) -> None:
    """Name nodes and values for the module that computes them, as in `blocks.0.mlp_up/MatMul`."""
    seen: Counter[str] = Counter()
    scopes: dict[ir.Node | None, str] = {}
    kept = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        scope = scopes[node] = _scope(node, scopes)
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        for i, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{i}"


def _scope(node: ir.Node, scopes: Mapping[ir.Node | None, str]) -> str:
    """Return the module that a node belongs to; the optimiser's nodes join the node they read."""
    traced = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if traced is None:
        return next((scopes[v.producer()] for v in node.inputs if v and v.producer()), "")
    scope = traced.rsplit("'", 4)[1] if traced.count("'") >= 4 else ""
    return scope.removeprefix("model.").replace("model", "")


def _strip(model: ir.Model, name: str) -> None:
    """Remove metadata of the machine and code that a graph was traced with: bytes must repeat."""
    model.graph.name = name
    model.producer_name, model.producer_version = "varedit-export", None
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _check_shapes(model: ir.Model, static: bool) -> None:
    for node in model.graph:
        for value in node.outputs:
            shape = value.shape
            if shape is None or (static and not shape.is_static()):
                raise ExportError(
                    f"graph {model.graph.name}: the shape of {value.name} is {shape}; every shape "
                    "must be known"
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx, which warns of optional packages and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _operators_kept() -> Iterator[None]:
    """Let torch.onnx collect its table of operators once, not for every graph: it takes 0.7 s."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        collect = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):  # it is private, so another version may lack it
        yield
        return
    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(partial(_collected, collect))):
        yield


@cache
def _collected(collect: Callable[..., Any], opset_version: int) -> Any:
    return collect(opset_version=opset_version)

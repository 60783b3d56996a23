"""Trace one stage into an ONNX graph whose weights lie in a file beside it.

Tracing runs on fake tensors: it needs no weights and no memory for them. The graph then refers to
the safetensors file by offset, and carries only small constants of its own.
"""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from varedit_export.stages import Spec, Stage
from varedit_runtime.errors import VareditError

OPSET = 20
# Sizes that stand for symbolic dimensions while tracing: no two alike, none 0 or 1.
SAMPLE_SIZES = {
    "h": 3,
    "w": 5,
    "next_h": 4,
    "next_w": 6,
    "reference": 11,
    "past_0": 13,
    "past": 17,
}


class ExportError(VareditError):
    """A graph did not come out as it must; the message names it."""


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies: its name, its file relative to the graph, and its bytes there."""

    name: str
    location: str
    offset: int
    length: int


def fake_tensors() -> FakeTensorMode:
    """The mode in which models are built and traced without memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace(stage: Stage, fake: FakeTensorMode, stored: Mapping[str, StoredWeight]) -> ir.Model:
    """One stage as an ONNX model. stored: where each of its weights lies, by parameter name.

    Raises ExportError if a value's shape is unknown, or, but for the symbolic twin, not static.
    """
    specs = stage.inputs()
    with fake:
        examples = tuple(_example(spec) for spec in specs.values())
    dynamic = {"tensors": tuple(_dynamic(spec) for spec in specs.values())}
    with _quiet(), fake:
        program = torch.export.export(stage, examples, dynamic_shapes=dynamic)
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(specs),
            output_names=list(stage.output_names),
        )
    assert exported is not None
    model = exported.model
    weights = _take_weights(model)
    optimizer.optimize_ir(model)
    _refer_to_weights(model, weights, stored)
    _name_dimensions(model, specs)
    _name_nodes(model)
    _strip(model, stage.name)
    _check_shapes(
        model, static=not any(isinstance(n, str) for s in specs.values() for n in s.shape)
    )
    return model


def _example(spec: Spec) -> Tensor:
    sizes = [SAMPLE_SIZES[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.empty(sizes, dtype=spec.dtype)


def _dynamic(spec: Spec) -> dict[int, Dim]:
    return {i: Dim(size) for i, size in enumerate(spec.shape) if isinstance(size, str)}


def _take_weights(model: ir.Model) -> list[ir.Value]:
    """Make inputs of the weights while the graph is simplified: nothing is to be folded in."""
    weights = [
        value
        for value in model.graph.initializers.values()
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor)
    ]
    for value in weights:
        del model.graph.initializers[str(value.name)]
        value.const_value = None
        model.graph.inputs.append(value)
    return weights


def _refer_to_weights(
    model: ir.Model, weights: list[ir.Value], stored: Mapping[str, StoredWeight]
) -> None:
    """Point every weight into its file. Constants of the stage stay in the graph."""
    for value in weights:
        model.graph.inputs.remove(value)
        if not value.uses():
            continue
        place = stored[str(value.name)]
        assert value.dtype is not None and value.shape is not None
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


def _name_dimensions(model: ir.Model, specs: Mapping[str, Spec]) -> None:
    """Call symbolic dimensions, and what is computed of them, by the names the stage gave them."""
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
                else pattern.sub(lambda match: names[match[0]], str(size))
                for size in value.shape
            )


def _name_nodes(model: ir.Model) -> None:
    """Name nodes and values for the module that computes them, as in `blocks.0.mlp_up/MatMul`."""
    seen: Counter[str] = Counter()
    kept = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']")
        scope = scopes.rsplit("'", 4)[1] if scopes.count("'") >= 4 else ""
        scope = scope.removeprefix("model.").replace("model", "")
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        for i, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{i}"


def _strip(model: ir.Model, name: str) -> None:
    """Remove all that tells of the machine and code a graph was traced on."""
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
    """torch.onnx warns of optional packages and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

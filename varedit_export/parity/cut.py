"""Cut a graph into its blocks, so that each runs alone, with its weights fed in.

A whole 8b graph needs tens of gigabytes to run; a block needs one block's memory. A block becomes
pieces, each an ONNX model of its own, whose weights and caches are inputs:

    [first] -> queries, keys, values -> [attention] -> attended -> [rest] -> the next block's input

Inputs get names without the block's number, so that blocks which differ only in it give equal
bytes: comparing those proves them alike, and they share one session.

What is in 16 bits is widened to fp32, because a CPU computes fp16 in fp32 anyway, and ONNX Runtime
has no bf16 there. Weights keep the values they were rounded to.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from torch import Tensor

from varedit_engines.network import external_weights
from varedit_export.errors import ExportError
from varedit_export.graphs.blocks import NODE_NAME
from varedit_reference.weights_file import StoredTensor
from varedit_runtime.manifest import StoredWeight

PAST = ("past_", "reference_")  # inputs that are keys and values of earlier tokens
SHARED = "memory_rounding/"  # nodes whose results the blocks read: `Rounding`, graphs/model.py
NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
Message = TypeVar("Message", NodeProto, TensorProto, ValueInfoProto)


@dataclass(frozen=True)
class Piece:
    """Some nodes of a graph as a model of their own.

    model: its bytes, equal for pieces that differ only in the block's number. inputs, outputs: the
    graph's names by the piece's.
    """

    model: bytes
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class CutAttention:
    """A block's self-attention, softmax(queries·keys)·values.

    piece: from queries [R, H, L, D], keys [R, H, D, S] and values [R, H, S, D] to attended
    [R, H, L, D]; of any L, so that it can run for some of the queries. joins: pieces that append
    new keys and values to the earlier ones.
    """

    joins: Sequence[Piece]
    piece: Piece
    queries: str
    keys: str
    values: str
    attended: str


@dataclass(frozen=True)
class CutBlock:
    """A block: the part before its self-attention, that, and the rest; or all of it as first."""

    first: Piece
    attention: CutAttention | None
    rest: Piece | None

    @property
    def kind(self) -> tuple[bytes, ...]:
        """The block's models: equal for blocks that differ only in their number."""
        attention = self.attention and (*self.attention.joins, self.attention.piece)
        return tuple(piece.model for piece in (self.first, *(attention or ()), self.rest) if piece)


class CutGraph:
    """A graph, cut into the part before its blocks, the blocks, and the part after them.

    places: its weights by name. shapes: of its values. carried: the value that each block hands to
    the next, by block; the last block's, if any, goes to the part after.
    """

    def __init__(self, name: str, content: bytes) -> None:
        model = onnx.load_model_from_string(content)
        graph, self._versions = model.graph, (model.opset_import, model.ir_version)
        self.name = name
        self.places: dict[str, StoredTensor] = {}
        self._constants: dict[str, TensorProto] = {}
        weights = external_weights(graph)
        for tensor in graph.initializer:
            if tensor.name in weights:
                self.places[tensor.name] = _typed(weights[tensor.name], tensor)
            else:
                self._constants[tensor.name] = _widened(tensor)
        infos = (*graph.input, *graph.output, *graph.value_info)
        self._infos = {info.name: _widened_info(info) for info in infos}
        self.shapes = {name: _shape(info) for name, info in self._infos.items()}
        self.inputs = [info.name for info in graph.input]
        self._outputs = {info.name for info in graph.output}
        self._nodes = [_widened_node(node) for node in graph.node]
        self._block_of = {v: _block(node) for node in self._nodes for v in node.output}
        self._readers: dict[str, set[str]] = {name: set() for name in self._block_of}
        for node in self._nodes:
            for name in node.input:
                if name in self._readers:
                    self._readers[name].add(node.output[0])
        self.blocks = sorted({b for b in self._block_of.values() if b is not None})
        late = _descendants(self._nodes, {v for v, b in self._block_of.items() if b is not None})
        outer = [node for node in self._nodes if _block(node) is None and not _shared(node)]
        self.before = self._piece([node for node in outer if node.output[0] not in late])
        self.after = self._piece([node for node in outer if node.output[0] in late])
        self.carried: dict[int, str] = {}
        for value, block in self._block_of.items():
            following = block + 1 if block is not None and block + 1 in self.blocks else None
            readers = {self._block_of[reader] for reader in self._readers[value]}
            if block is not None and following in readers:
                self.carried.setdefault(block, value)

    def block(self, number: int) -> CutBlock:
        nodes = self._of_block(number)
        core = _attention_core(nodes)
        if core is None:
            return CutBlock(self._piece(nodes, number), None, None)
        (queries, keys), values = core[0].input, core[-1].input[1]
        attended = core[-1].output[0]
        past = {name for name in self.inputs if name.startswith(PAST)}
        late = _descendants(nodes, past)
        needed = [_ancestors(nodes, [name]) for name in (keys, values)]
        joins = [[n for n in nodes if n.output[0] in found & late] for found in needed]
        own = {name for node in core for name in node.output}
        entering = {name for node in core for name in node.input} - own
        before = _ancestors(nodes, entering) - late
        taken = before.union(n.output[0] for part in (*joins, core) for n in part)
        attention = CutAttention(
            [self._piece(join, number) for join in joins if join],
            self._piece(core, number, any_length={queries, attended}),
            queries,
            keys,
            values,
            attended,
        )
        first = [node for node in nodes if node.output[0] in before]
        rest = [node for node in nodes if node.output[0] not in taken]
        return CutBlock(self._piece(first, number), attention, self._piece(rest, number))

    def entering(self, number: int) -> str:
        """Return the input of a block that the previous one, or the part before, hands to it."""
        if number != self.blocks[0]:
            return self.carried[number - 1]
        left = self.carried.get(number)
        return next(
            name
            for node in self._of_block(number)
            for name in node.input
            if self._block_of.get(name, number) is None
            and (left is None or self.shapes[name] == self.shapes[left])
        )

    def _of_block(self, number: int) -> list[NodeProto]:
        """Return the nodes of a block, and those that all blocks share: each computes them."""
        return [node for node in self._nodes if _block(node) == number or _shared(node)]

    def part(self, nodes: slice) -> Piece:
        """Return a slice of the nodes, in the graph's order, as a piece."""
        return self._piece(self._nodes[nodes])

    def _piece(
        self,
        nodes: Sequence[NodeProto],
        block: int | None = None,
        any_length: Collection[str] = (),
    ) -> Piece:
        """Make a piece of nodes. any_length: its inputs and outputs [R, H, L, D] of any L."""
        produced = {name for node in nodes for name in node.output}
        names: dict[str, str] = {}  # the graph's -> the piece's
        inputs, constants = [], []
        for node in nodes:
            for name in node.input:
                if not name or name in names:
                    continue
                if name in self._constants:
                    names[name] = f"constant{len(constants)}"
                    constants.append(name)
                elif name not in produced:
                    names[name] = self._alias(name, block, len(names))
                    inputs.append(name)
            for name in node.output:
                names[name] = f"value{len(names)}"
        outputs = [
            name
            for node in nodes
            for name in node.output
            if name in self._outputs or not self._readers[name] <= produced
        ]
        if len({names[name] for name in inputs}) < len(inputs):
            raise ExportError(f"graph {self.name}: two inputs of a block have one name")
        opset, ir_version = self._versions
        model = helper.make_model(
            helper.make_graph(
                [_renamed_node(node, names) for node in nodes],
                "piece",
                [self._info(name, names[name], name in any_length) for name in inputs],
                [self._info(name, names[name], name in any_length) for name in outputs],
                [_named(self._constants[name], names[name]) for name in constants],
            ),
            opset_imports=opset,
            ir_version=ir_version,
        )
        return Piece(
            model.SerializeToString(deterministic=True),
            {names[name]: name for name in inputs},
            {names[name]: name for name in outputs},
        )

    def _alias(self, name: str, block: int | None, place: int) -> str:
        """Return a piece's name for an input, which does not depend on the block's number."""
        if block is None:
            return name
        maker = self._block_of.get(name)
        if maker in (block, block - 1):
            return f"{'own' if maker == block else 'carried'}{place}"
        if name in self.places:
            own = f"blocks.{block}."
            return "blocks." + name.removeprefix(own) if name.startswith(own) else name
        return name.removesuffix(f".{block}") + ".#" if name.endswith(f".{block}") else name

    def _info(self, name: str, alias: str, any_length: bool) -> ValueInfoProto:
        if name in self.places:
            place = self.places[name]
            kind = from_torch_dtype(fed(torch.empty(0, dtype=place.dtype)).dtype)
            return helper.make_tensor_value_info(alias, kind, place.shape)
        info = _named(self._infos[name], alias)
        if any_length:
            info.type.tensor_type.shape.dim[2].dim_param = "any"
        return info


class CutCoder:
    """An image coder's graph for smaller pictures; the part after its last convolution is kept.

    In a coder only the shapes that maps are given back after a norm depend on the picture's size.
    Raises ExportError if those are not the shapes that the maps had before it. maps: the name of
    the last convolution's output.
    """

    def __init__(self, name: str, content: bytes, factor: int) -> None:
        """Shrink a coder's graph. factor: divides the sides of pictures, and of all maps."""
        self.whole = CutGraph(name, content)
        model = onnx.load_model_from_string(content)
        last = max(i for i, n in enumerate(model.graph.node) if n.op_type == "Conv")
        _shrink(model.graph, last, factor)
        self.small = CutGraph(name, model.SerializeToString())
        self.small.before = self.small.part(slice(last + 1))
        (self.maps,) = self.small.before.outputs.values()
        self.tail = self.whole.part(slice(last + 1, None))


def fed(weight: Tensor) -> Tensor:
    """Return a weight in the type that pieces take it in: fp32, or one of 8 bits."""
    return weight.float() if weight.is_floating_point() and weight.itemsize > 1 else weight


def _typed(place: StoredWeight, tensor: TensorProto) -> StoredTensor:
    """Return a weight's place with the type and shape that the graph gives it."""
    dtype = to_torch_dtype(ir.DataType(tensor.data_type))
    if place.length != prod(tensor.dims) * dtype.itemsize:
        raise ExportError(f"the weight {tensor.name} has another length than its shape and type")
    return StoredTensor(place, dtype, tuple(tensor.dims))


def _block(node: NodeProto) -> int | None:
    match = NODE_NAME.search(node.name)
    return int(match[1]) if match else None


def _shared(node: NodeProto) -> bool:
    return node.name.startswith(SHARED)


def _attention_core(nodes: Sequence[NodeProto]) -> list[NodeProto] | None:
    """Return the nodes from the product before the first softmax to the one after it."""
    makers = {name: node for node in nodes for name in node.output}
    softmax = next((node for node in nodes if node.op_type == "Softmax"), None)
    if softmax is None:
        return None
    core = [softmax]
    while core[0].op_type != "MatMul":
        core.insert(0, makers[core[0].input[0]])
    while core[-1].op_type != "MatMul":
        (reader,) = [node for node in nodes if core[-1].output[0] in node.input]
        core.append(reader)
    return core


def _ancestors(nodes: Sequence[NodeProto], names: Iterable[str]) -> set[str]:
    """Return the first outputs of the nodes that these values depend on."""
    found, queue = set[str](), set(names)
    for node in reversed(nodes):
        if queue.intersection(node.output):
            found.add(node.output[0])
            queue.update(node.input)
    return found


def _descendants(nodes: Sequence[NodeProto], names: Collection[str]) -> set[str]:
    """Return these values and all that depend on them."""
    reached = set(names)
    for node in nodes:
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached


def _shrink(graph: onnx.GraphProto, last: int, factor: int) -> None:
    """Divide the sides of all maps up to a node, the last convolution."""
    makers = {name: node for node in graph.node for name in node.output}
    infos = {info.name: info for info in (*graph.input, *graph.output, *graph.value_info)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node)[: last + 1]:
        normed = makers.get(node.input[0])
        if normed is None or normed.op_type != "InstanceNormalization":
            continue
        grouped = makers[normed.input[0]]
        if node.input[1] in makers:  # where the number of pictures is symbolic
            read = makers[node.input[1]]
            if (read.op_type, list(read.input)) != ("Shape", [grouped.input[0]]):
                raise ExportError(f"{node.name} makes another shape than was normalised")
            continue
        shape = numpy_helper.to_array(constants[node.input[1]])
        if tuple(shape) != _shape(infos[grouped.input[0]]):
            raise ExportError(f"{node.name} makes another shape than was normalised")
        small = np.array([*shape[:2], *(shape[2:] // factor)])
        node.input[1] = f"{node.name}/shape"
        graph.initializer.append(numpy_helper.from_array(small, node.input[1]))
    for info in infos.values():
        dims = info.type.tensor_type.shape.dim
        for dim in list(dims)[2:] if len(dims) == 4 else ():
            dim.dim_value //= factor


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in NARROW:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _widened_info(info: ValueInfoProto) -> ValueInfoProto:
    if info.type.tensor_type.elem_type in NARROW:
        info.type.tensor_type.elem_type = TensorProto.FLOAT
    return info


def _widened_node(node: NodeProto) -> NodeProto:
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in NARROW:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t"):
            attribute.t.CopyFrom(_widened(attribute.t))
    return node


def _shape(info: ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim)


def _renamed_node(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    renamed = _named(node, "")
    renamed.input[:] = [names.get(name, name) for name in node.input]
    renamed.output[:] = [names[name] for name in node.output]
    return renamed


def _named(message: Message, name: str) -> Message:
    """Copy a message under another name."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.name = name
    return copy

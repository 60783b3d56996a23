"""Grow a graph that was traced with a few blocks to the model's depth.

Blocks between the first and the last differ only in their weights, inputs and outputs. So only four
are traced, 0 .. 3, and block 2 is copied:

    traced          0   1   2   3          0: the first (SAR); 1, 2: two inner blocks; 3: the last
    grown to 6      0   1   2   2'  2''  3     renamed to 0 .. 5

So a trace costs the same for 12 blocks and for 40. What a copy has to change is not assumed: blocks
1 and 2 are compared node by node. Everything equal stays; what block 2 reads of block 1 is carried
from copy to copy; inputs and weights named for a block get their own copies. Any other difference
is an error.
"""

import re
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from varedit_export.errors import ExportError

TRACED_BLOCKS = 4
ONE, TWO, LAST = 1, 2, 3
NODE_NAME = re.compile(r"\bblocks\.(\d+)[./]")

# A value that a block makes: its node's index in the block, and which of the node's outputs it is.
Place = tuple[int, int]


@dataclass
class Pattern:
    """The block to copy.

    carried: values that it reads of the block before, and where that block makes them. own: the
    graph's inputs, weights and outputs that are this block's; each with its copies by block.
    """

    nodes: Sequence[ir.Node]
    carried: dict[ir.Value, Place] = field(default_factory=dict)
    own: dict[ir.Value, dict[int, ir.Value]] = field(default_factory=dict)


def grow(graph: ir.Graph, depth: int) -> None:
    """Copy the inner block of a graph traced with `TRACED_BLOCKS` until there are `depth`.

    Weights must still be inputs, and nodes named for their modules. Copied inputs and outputs
    follow their originals. Raises ExportError if the inner blocks are not alike.
    """
    if depth <= TRACED_BLOCKS:
        return
    pattern = _compare(_nodes(graph, ONE), _nodes(graph, TWO))
    last = _nodes(graph, LAST)
    _rename(graph, last, depth - 1)
    previous = pattern.nodes
    for block in range(LAST, depth - 1):
        previous = _copy(pattern, previous, block)
        graph.insert_before(last[0], previous)
    _hand_over(pattern, previous, depth - 1)
    _insert_copies(graph.inputs, pattern)
    _insert_copies(graph.outputs, pattern)


def _nodes(graph: ir.Graph, block: int) -> list[ir.Node]:
    return [node for node in graph if _block(node) == block]


def _block(node: ir.Node) -> int | None:
    match = NODE_NAME.search(str(node.name))
    return int(match[1]) if match else None


def _renamed(name: str | None, old: int, new: int) -> str:
    """Return the name of a module (`blocks.2.qkv`), input or output (`new_key.2`) in block new."""
    return re.sub(rf"(?<=\bblocks\.){old}(?=[./])|(?<=\.){old}$", str(new), str(name))


def _compare(one: Sequence[ir.Node], two: Sequence[ir.Node]) -> Pattern:
    """Compare two inner blocks; return the second as a pattern. Raises ExportError if unlike."""
    pattern = Pattern(two)
    made_by_one, made_by_two = _places(one), _places(two)
    if len(one) != len(two):
        raise ExportError(f"inner blocks have {len(one)} and {len(two)} nodes: they are not alike")
    for a, b in zip(one, two, strict=True):
        alike = _same_operation(a, b)
        for x, y in zip(a.inputs, b.inputs, strict=alike):
            if x is y or x is None or y is None:
                alike &= x is y
            elif y in made_by_two:
                alike &= made_by_one.get(x) == made_by_two[y]
            elif y in made_by_one:
                pattern.carried[y] = made_by_one[y]
            elif y.is_graph_input():
                alike &= y.name == _renamed(x.name, ONE, TWO)
                pattern.own[y] = {}
            else:
                alike &= _same_constant(x, y)
        if not alike:
            raise ExportError(f"{a.name} and {b.name} differ: inner blocks must be alike")
    pattern.own |= {value: {} for value in made_by_two if value.is_graph_output()}
    return pattern


def _places(nodes: Sequence[ir.Node]) -> dict[ir.Value, Place]:
    return {value: (i, o) for i, node in enumerate(nodes) for o, value in enumerate(node.outputs)}


def _same_operation(a: ir.Node, b: ir.Node) -> bool:
    return (
        (a.domain, a.op_type, len(a.inputs), len(a.outputs))
        == (b.domain, b.op_type, len(b.inputs), len(b.outputs))
        and {name: _comparable(attr) for name, attr in a.attributes.items()}
        == {name: _comparable(attr) for name, attr in b.attributes.items()}
    )  # fmt: skip


def _comparable(attribute: ir.Attr) -> object:
    value = attribute.value
    return value.tobytes() if isinstance(value, ir.TensorProtocol) else value


def _same_constant(x: ir.Value, y: ir.Value) -> bool:
    if x.const_value is None or y.const_value is None:
        return False
    a, b = x.const_value, y.const_value
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _copy(pattern: Pattern, previous: Sequence[ir.Node], block: int) -> list[ir.Node]:
    """Copy the pattern as another block, which reads the previous one."""
    values = {value: previous[i].outputs[o] for value, (i, o) in pattern.carried.items()}
    for value, copies in pattern.own.items():
        if value.is_graph_input():
            copies[block] = values[value] = _copied_value(value, block)
    nodes = []
    for node in pattern.nodes:
        outputs = [_copied_value(value, block) for value in node.outputs]
        inputs = [None if value is None else values.get(value, value) for value in node.inputs]
        name = _renamed(node.name, TWO, block)
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                outputs=outputs,
                name=name,
            )
        )
        values |= zip(node.outputs, outputs, strict=True)
    for value, copies in pattern.own.items():
        copies.setdefault(block, values[value])
    return nodes


def _copied_value(value: ir.Value, block: int) -> ir.Value:
    name = _renamed(value.name, TWO, block)
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _rename(graph: ir.Graph, nodes: Sequence[ir.Node], block: int) -> None:
    """Rename the last block to its number in the full model."""
    outputs = [value for node in nodes for value in node.outputs]
    for named in (*graph.inputs, *nodes, *outputs):
        named.name = _renamed(named.name, LAST, block)


def _hand_over(pattern: Pattern, final: Sequence[ir.Node], last: int) -> None:
    """Let the last block read the final copy instead of the pattern."""
    carried = set(pattern.carried.values())
    for value, (i, o) in _places(pattern.nodes).items():
        for use in tuple(value.uses()):
            if _block(use.node) in (TWO, TWO + 1):
                continue
            if _block(use.node) != last or (i, o) not in carried:
                raise ExportError(f"{use.node.name} reads {value.name}, out of an inner block")
            use.node.replace_input_with(use.idx, final[i].outputs[o])


def _insert_copies(values: MutableSequence[ir.Value], pattern: Pattern) -> None:
    """Insert copies of the graph's inputs or outputs after each run of their originals."""
    ordered: list[ir.Value] = []
    run: list[dict[int, ir.Value]] = []
    for value in values:
        if value not in pattern.own:
            ordered += _by_block(run)
            run = []
        else:
            run.append(pattern.own[value])
        ordered.append(value)
    ordered += _by_block(run)
    values.clear()
    values.extend(ordered)


def _by_block(copies: Sequence[dict[int, ir.Value]]) -> list[ir.Value]:
    blocks = sorted(copies[0]) if copies else []
    return [of_value[block] for block in blocks for of_value in copies]

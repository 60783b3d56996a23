"""What a compiled engine consists of: its kernels, and the scratch memory of a run.

An engine tells this on a GPU that can load it alone, and the log of its compilation anywhere. So a
report is made from the log, and kept beside the plan.
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from math import prod

import msgspec
from msgspec import Struct

from varedit_runtime.backends.engines.engine_set import EngineSet
from varedit_runtime.backends.engines.import_tensorrt import TYPES
from varedit_runtime.errors import BundleError, one_line, readable_size

MOST = 2**28  # bytes of an unpacked report
SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")  # one line for each profile
# What an engine holds while it is loaded: once, and for each profile that is in use.
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
PERSISTENT = re.compile(r"Total Device Persistent Memory: (\d+) bytes")
KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: .*?, StreamId: (?P<stream>\d+), Metadata: (?P<nodes>.*)"
)
NO_KERNEL = ", LayerType: ShapeHostToDevice, "  # copies a length, where the graph computes with it
TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([\d,]*)\], Strides: .*?, Datatype: (\w+),")
NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
BITS = {
    **{"Bool": 8, "Int4": 4, "Int8": 8, "UInt8": 8, "Int32": 32, "Int64": 64},
    **{"FP4": 4, "FP8": 8, "E8M0": 8, "Half": 16, "BFloat16": 16, "Float": 32},
}


class Kernel(Struct, frozen=True):
    """A kernel of an engine, in the order in which they run.

    kind: TensorRT's, such as gemm or kgen. nodes: those of the graph that it computes, if TensorRT
    tells. types: of its inputs, then of its outputs. read, written: bytes of its inputs and
    constants, and of its outputs, each counted once.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    types: tuple[tuple[str, ...], tuple[str, ...]]
    read: int
    written: int
    stream: int

    @property
    def attends(self) -> bool:
        """Whether it computes a whole attention: both products and the softmax between them."""
        operators = [re.sub(r"_\d+$", "", node.rpartition("/")[2]) for node in self.nodes]
        fused = "Softmax" in operators and operators.count("MatMul") >= 2
        return fused or "Attention" in operators


class EngineReport(Struct, frozen=True):
    """An engine's report.

    plan: bytes of the plan. profiles: how many it has. scratch: bytes that a run needs, in the
    profile that needs most. resident: bytes of GPU memory that it holds while it is loaded, for
    weights and constants inside. kernels: those of all profiles. What the log does not say, or
    says in another form, is None.
    """

    plan: int
    profiles: int = 1
    scratch: int | None = None
    resident: int | None = None
    kernels: tuple[Kernel, ...] | None = None

    def __str__(self) -> str:
        """Sum up the kernels on one line."""
        if self.kernels is None:
            return "kernels unknown"
        moved = sum(kernel.read + kernel.written for kernel in self.kernels)
        types = dict.fromkeys(t for kernel in self.kernels for own in kernel.types for t in own)
        attentions = sum(kernel.attends for kernel in self.kernels)
        profiles = f" in {self.profiles} profiles" if self.profiles > 1 else ""
        scratch = "" if self.scratch is None else f", {readable_size(self.scratch)} of scratch"
        return (
            f"{len(self.kernels)} kernels{profiles} move {readable_size(moved)}, "
            f"{attentions} fused attentions{scratch}; {', '.join(sorted(types))}"
        )


def engine_report(plan: int, messages: Iterable[str]) -> EngineReport:
    """Read a report from the messages of a compilation at its most verbose. plan: in bytes."""
    lines = [line for message in messages for line in message.splitlines()]
    scratch, weights, persistent = (
        [int(found[1]) for line in lines if (found := pattern.search(line))]
        for pattern in (SCRATCH, WEIGHTS, PERSISTENT)
    )
    resident = sum(weights + persistent) if weights else None
    named = (line for line in lines if line.startswith("Name: ") and ", LayerType: " in line)
    listed = [line for line in named if NO_KERNEL not in line]
    try:
        kernels = tuple(map(_kernel, listed)) or None
    except (KeyError, ValueError):  # a version that lists them in another form
        kernels = None
    profiles, largest = max(len(scratch), 1), max(scratch, default=None)
    return EngineReport(plan, profiles, largest, resident, kernels)


def packed(report: EngineReport) -> bytes:
    """Return the file of a report; the same report always gives the same bytes."""
    return gzip.compress(msgspec.json.encode(report), mtime=0)


def unpacked(chunks: Iterable[bytes]) -> EngineReport:
    """Read a report from its file. Raises BundleError if it is none."""
    data = b"".join(chunks)
    try:
        text = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, MOST)
        return msgspec.json.decode(text, type=EngineReport)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise BundleError(
            f"a report of engines cannot be read ({one_line(error)}): compile them with --again"
        ) from error


def engine_reports(engines: EngineSet) -> Iterator[tuple[str, EngineReport]]:
    """Yield the report of each engine of a set that was compiled here, with its stage.

    Sets of earlier versions have none. Raises BundleError if a file is damaged.
    """
    for stage, plan in engines.manifest.plans.items():
        if plan.report is not None:
            yield stage, unpacked(engines.packed_report(stage))


def _kernel(line: str) -> Kernel:
    found = KERNEL.fullmatch(line)
    if found is None:
        raise ValueError(line)
    inputs, constants, outputs = (
        _tensors(found[part]) for part in ("inputs", "constants", "outputs")
    )
    return Kernel(
        name=found["name"],
        kind=found["kind"],
        nodes=tuple(NODE.findall(found["nodes"])),
        types=(_types(inputs), _types(outputs)),
        read=_bytes([*inputs, *constants]),
        written=_bytes(outputs),
        stream=int(found["stream"]),
    )


def _tensors(text: str) -> list[tuple[str, str, str]]:
    """Return name, dimensions and type of each tensor. Raises ValueError if one cannot be read."""
    tensors = TENSOR.findall(text)
    if len(tensors) != text.count("{ Name: "):
        raise ValueError(text)
    return tensors


def _types(tensors: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
    names = (TYPES.get(dtype.upper(), dtype.lower()) for _, _, dtype in tensors)
    return tuple(dict.fromkeys(names))


def _bytes(tensors: Sequence[tuple[str, str, str]]) -> int:
    """Return the bytes of tensors; one that is listed several times is read once."""
    sizes: dict[str, int] = {}
    for name, dimensions, dtype in tensors:
        size = prod(int(n) for n in dimensions.split(",") if n) * BITS[dtype] // 8
        sizes[name] = max(size, sizes.get(name, 0))
    return sum(sizes.values())

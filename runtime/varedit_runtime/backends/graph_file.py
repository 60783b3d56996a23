"""Graphs as ONNX files, checked before a library loads them.

ONNX Runtime and compilers read whatever files and types a graph names. So its inputs, outputs and
weights are first compared with the manifest and with the headers of the weights files.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from varedit_runtime.bundle import Bundle, readable
from varedit_runtime.errors import BundleError, shown
from varedit_runtime.manifest import GRAPHS, Bytes, TensorSpec, Variant, weights_file

# The fields of ONNX's messages (onnx.proto) that lead to tensors or say what they are: number and
# type, with a star if repeated. Text is read as bytes, which cannot fail.
_FIELDS = {
    "Model": {"graph": (7, "Graph"), "training": (20, "*Training"), "functions": (25, "*Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"nodes": (7, "*Node"), "attributes": (11, "*Attribute")},
    "Graph": {
        "nodes": (1, "*Node"),
        "initializers": (5, "*Tensor"),
        "inputs": (11, "*Value"),
        "outputs": (12, "*Value"),
        "sparse_initializers": (15, "*SparseTensor"),
    },
    "Node": {"attributes": (5, "*Attribute")},
    "Attribute": {
        "tensor": (5, "Tensor"),
        "graph": (6, "Graph"),
        "tensors": (10, "*Tensor"),
        "graphs": (11, "*Graph"),
        "sparse_tensor": (22, "SparseTensor"),
        "sparse_tensors": (23, "*SparseTensor"),
    },
    "SparseTensor": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {
        "type": (2, "int64"),
        "name": (8, "bytes"),
        "external": (13, "*Entry"),
        "location": (14, "int64"),
    },
    "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
    "Value": {"name": (1, "bytes"), "type": (2, "Type")},
    "Type": {"tensor": (1, "TensorType")},
    "TensorType": {"type": (1, "int64"), "shape": (2, "Shape")},
    "Shape": {"sizes": (1, "*Size")},
    "Size": {"number": (1, "int64"), "symbol": (2, "bytes")},
}
# By ONNX's number: the manifest's name of a type, and that in safetensors files.
_TYPES = {
    1: ("float32", "F32"),
    2: ("uint8", "U8"),
    3: ("int8", "I8"),
    6: ("int32", "I32"),
    7: ("int64", "I64"),
    9: ("bool", "BOOL"),
    10: ("float16", "F16"),
    16: ("bfloat16", "BF16"),
    17: ("float8_e4m3fn", "F8_E4M3"),
    19: ("float8_e5m2", "F8_E5M2"),
}
_PLACE = [b"length", b"location", b"offset"]  # how a graph says where a weight lies
_MAX_HEADER_BYTES = 2**23  # of a weights file; those of the models take a hundredth


def read_graph(bundle: Bundle, variant: Variant, stage: str) -> bytes:
    """Return a graph's ONNX file, checked.

    Raises BundleError if it is damaged or no graph; if its inputs and outputs are not those of the
    manifest; or if a weight lies outside of the bundle's weights files, is not of the type that
    its file says, or is of a type that the bundle's precision does not have.
    """
    data = bundle.graph_bytes(variant.name, stage)
    spec, weights = variant.graph(stage), _Weights(bundle)
    try:
        model = _message_class().FromString(data)
        _compare("inputs", model.graph.inputs, spec.inputs)
        _compare("outputs", model.graph.outputs, spec.outputs)
        for tensor in _tensors(model):
            if tensor.external or tensor.location:
                weights.check(tensor)
    except DecodeError as error:
        raise BundleError(
            f"{bundle.path / spec.file} is no ONNX graph: build the bundle again"
        ) from error
    except ValueError as error:
        raise BundleError(f"{bundle.path / spec.file} {error}: build the bundle again") from error
    return data


@cache
def _message_class() -> Any:
    """Return the class of the message Model."""
    scalars = {"int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64}
    scalars["bytes"] = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", syntax="proto2")
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = described.field.add(name=name, number=number)
            one = kind.removeprefix("*")
            field.label = field.LABEL_OPTIONAL if one == kind else field.LABEL_REPEATED
            field.type = scalars.get(one, field.TYPE_MESSAGE)
            if one not in scalars:
                field.type_name = f".{one}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))


def _tensors(message: Message) -> Iterator[Any]:
    """Yield all tensors of a graph: also those in attributes, functions and inner graphs."""
    if message.DESCRIPTOR.name == "Tensor":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def _compare(what: str, values: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    found = [_described(value) for value in values]
    expected = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    different = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
    if different:
        raise ValueError(
            f"has among its {what} {shown(different[0][0])}, where the manifest has "
            f"{shown(different[0][1])}"
        )
    if len(found) != len(expected):
        raise ValueError(f"has {len(found)} {what}, where the manifest has {len(expected)}")


def _described(value: Any) -> tuple[str, str, tuple[int | str, ...]]:
    """Return the name, type and shape of an input or output; a size may be a symbol."""
    tensor = value.type.tensor
    shape = (size.symbol.decode(errors="replace") or size.number for size in tensor.shape.sizes)
    return value.name.decode(errors="replace"), _type_names(tensor.type)[0], tuple(shape)


def _type_names(number: int) -> tuple[str, str]:
    """Return a type's name in manifests and in safetensors files."""
    return _TYPES.get(number, (f"type {number}", ""))


class _Weights:
    """The tensors in a bundle's weights files, with which the weights of graphs are compared."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._read = bundle, dict[str, list[tuple[int, int, str]]]()
        self._files = list(map(weights_file, bundle.components))

    def check(self, tensor: Any) -> None:
        """Raise ValueError unless a graph's tensor lies in a tensor of its type in a file."""
        name = shown(tensor.name.decode(errors="replace"))
        entries = sorted((entry.key, entry.value) for entry in tensor.external)
        numbers = [value for key, value in entries if key != b"location"]
        if [key for key, _ in entries] != _PLACE or not all(map(_is_number, numbers)):
            raise ValueError(f"does not say where its weight {name} lies")
        length, first = map(int, numbers)
        file = f"{GRAPHS}/{entries[1][1].decode(errors='replace')}"
        if file not in self._files:
            raise ValueError(
                f"has its weight {name} in {shown(file)}, and the bundle's weights files are "
                f"{', '.join(self._files)}"
            )
        kind, stored = _type_names(tensor.type)
        if not self._holds(file, first, first + length, stored):
            raise ValueError(
                f"has {kind} {name} at bytes {first} to {first + length} of {file}, whose header "
                "has no such tensor there"
            )
        manifest = self._bundle.manifest
        if not manifest.policy.stores(kind):
            raise ValueError(f"has {kind} {name}, and {manifest.precision} has no such weights")

    def _holds(self, file: str, first: int, end: int, kind: str) -> bool:
        """Return whether a file holds a tensor of a safetensors type that has these bytes."""
        if file not in self._read:
            self._read[file] = self._tensors_of(file)
        tensors = self._read[file]
        place = bisect_right(tensors, first, key=lambda tensor: tensor[0]) - 1
        return place >= 0 and end <= tensors[place][1] and tensors[place][2] == kind

    def _tensors_of(self, name: str) -> list[tuple[int, int, str]]:
        """Return where the tensors of a file begin and end, and their types, in order."""
        file, size = self._bundle.hold(name), self._bundle.manifest.files[name].size
        with readable(file.path):
            length = int.from_bytes(file.read(8), "little")
            data = file.read(min(length, _MAX_HEADER_BYTES), 8)
        try:
            header = msgspec.json.decode(data, type=dict[str, _Stored])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BundleError(
                f"{file.path} is no safetensors file: build the bundle again"
            ) from error
        header.pop("__metadata__", None)
        start = 8 + length
        places = ((start + t.data_offsets[0], start + t.data_offsets[1]) for t in header.values())
        found = ((*place, t.dtype) for place, t in zip(places, header.values(), strict=True))
        return sorted(tensor for tensor in found if tensor[1] <= size)


class _Stored(msgspec.Struct):
    """A tensor in the header of a safetensors file, or the file's metadata, which has none."""

    dtype: str = ""
    data_offsets: tuple[Bytes, Bytes] = (0, 0)


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) < 20

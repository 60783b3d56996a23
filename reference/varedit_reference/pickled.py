"""Read what torch.save writes: a zip archive of a pickle and of the bytes of tensors.

A pickle is a program, and loading it runs the functions that it names. Here it is read as data by
an interpreter that knows no function: dicts, lists, texts and numbers are made, tensors become
views of a memory map, and whatever else the pickle would call stands as its name (`Named`).

All sizes in the file are bounded before memory is taken for them. What is read into memory is at
most LARGEST_HEADER; a tensor has no more elements than its record in the archive holds.
"""

import io
import pickletools
import sys
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from varedit_runtime.errors import CheckpointError, one_line, shown

LARGEST_HEADER = 2**21  # bytes of names, types and shapes; those of 8b take 0.1 MB
MOST_DIMENSIONS = 8
LONGEST_NAME = 200  # of classes and records; those of weights are not limited
LOCAL_HEADER = 30  # bytes before the name of a record in a zip archive
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names, or what it would make; it is never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The elements of a tensor, or of several: their type, and their bytes in the file."""

    dtype: torch.dtype
    start: int
    size: int

    def check(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        """Raise ValueError unless a tensor lies inside, and is not larger than it."""
        numbers = (offset, *shape, *stride)
        if len(shape) > MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor with an impossible shape")
        count, end = prod(shape), offset
        if count:
            end += sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) + 1
        if max(count, end) * self.dtype.itemsize > self.size:
            raise ValueError(f"a tensor of {count} elements in {self.size} bytes")


def open_pickled(path: Path) -> Any:
    """Return what was given to torch.save, tensors as views of the file; see above.

    Raises CheckpointError if the file is no such archive, is compressed, cut short or damaged.
    """
    with path.open("rb") as file:
        start = file.read(24)
    if not start.startswith(b"PK"):  # the old format is a bare pickle, a download error often text
        raise CheckpointError(
            f"{path} is not what torch.save writes, a zip archive: it starts with {shown(start)}; "
            "fetch the weights themselves, or save them again with torch.save"
        )
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(
                    f"{path} is compressed and cannot be memory-mapped: save it again with "
                    "torch.save"
                )
            return _Interpreter(path, file, archive).run()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointError(
            f"{path} is cut short or damaged ({one_line(error)}): fetch or copy it again"
        ) from error


class _Bounded(io.FileIO):
    """A file of which no more than LARGEST_HEADER bytes are read at once.

    zipfile reads an archive's directory in one go, whatever its size.
    """

    def read(self, size: int | None = -1) -> bytes:
        wanted = LARGEST_HEADER + 1
        data = super().read(wanted if size is None or size < 0 else min(size, wanted))
        if len(data) == wanted:
            raise ValueError(f"names and shapes of more than {LARGEST_HEADER} bytes")
        return data


class _Interpreter:
    """Runs the pickle of an archive as data."""

    def __init__(self, path: Path, file: _Bounded, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive
        self._size = path.stat().st_size
        self._map = torch.UntypedStorage.from_file(str(path), False, self._size)
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        (name,) = pickles
        self._root = name.removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("its numbers are stored in another byte order than this machine's")
        self._pickle = archive.read(name)
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self._pickle):
            self._step(opcode.name, argument)
        return self._stack[-1]

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in VALUES:
            self._stack.append(argument)
        elif opcode in CONSTANTS:
            self._stack.append(CONSTANTS[opcode])
        elif opcode in TUPLES:
            count = TUPLES[opcode]
            self._stack[-count:] = [tuple(self._stack[-count:])]
        else:
            match opcode:
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case "MARK":
                    self._below.append(self._stack)
                    self._stack = []
                case "BINPUT" | "LONG_BINPUT":
                    self._memo[argument] = self._stack[-1]
                case "MEMOIZE":
                    self._memo[len(self._memo)] = self._stack[-1]
                case "BINGET" | "LONG_BINGET":
                    self._stack.append(self._memo[argument])
                case _:
                    self._make(opcode, argument)

    def _make(self, opcode: str, argument: Any) -> None:
        """Do a step that makes, fills or calls something."""
        match opcode:
            case "EMPTY_DICT":
                self._stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                self._stack.append([])
            case "TUPLE":
                items = self._marked()
                self._stack.append(tuple(items))
            case "APPEND" | "SETITEM" | "BUILD":
                count = 2 if opcode == "SETITEM" else 1
                items = [self._stack.pop() for _ in range(count)][::-1]
                self._fill(self._stack[-1], items, opcode)
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items = self._marked()
                self._fill(self._stack[-1], items, opcode)
            case "GLOBAL":
                self._stack.append(Named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = _name(self._stack.pop()), _name(self._stack.pop())
                self._stack.append(Named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self._stack.pop(), self._stack.pop()
                self._stack.append(self._call(function, arguments))
            case "BINPERSID":
                self._stack.append(self._storage(*self._stack.pop()))
            case _:
                raise ValueError(f"a pickle with {opcode}, which torch.save does not write")

    def _marked(self) -> list[Any]:
        """Return what was put on the stack since the last mark."""
        marked, self._stack = self._stack, self._below.pop()
        return marked

    def _fill(self, target: Any, items: list[Any], opcode: str) -> None:
        """Fill a dict or list; the attributes of anything are left out."""
        if opcode.startswith("SETITEM") and isinstance(target, dict):
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif opcode.startswith("APPEND") and isinstance(target, list):
            target += items

    def _call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case Named("collections.OrderedDict"), ():
                return {}
            case Named("torch._utils._rebuild_tensor_v2"), (storage, offset, shape, stride, *_):
                return self._tensor(storage, offset, shape, stride)
            case (
                Named(
                    "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"
                ),
                (tensor, *_),
            ):
                return tensor
        return function if isinstance(function, Named) else Named("object")

    def _storage(self, kind: Any, element: Any, key: Any, _device: Any, _count: Any) -> Any:
        """Return the storage of a record, or its class where that is of no plain type."""
        if kind != "storage" or not isinstance(element, Named):
            raise ValueError("a reference to something other than a storage")
        if element.name not in STORAGES:
            return element
        record = self._archive.getinfo(f"{self._root}data/{_name(key)}")
        self._file.seek(record.header_offset)
        header = self._file.read(LOCAL_HEADER)
        name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        start = record.header_offset + LOCAL_HEADER + name + extra
        if not header.startswith(b"PK\3\4") or start + record.file_size > self._size:
            raise ValueError(f"the record {key} lies past the end")
        return _Storage(STORAGES[element.name], start, record.file_size)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> Any:
        if not isinstance(storage, _Storage):
            return Named("torch.Tensor") if storage is None else storage
        storage.check(offset, shape, stride)
        if not prod(shape):
            return torch.empty(shape, dtype=storage.dtype)
        elements = self._map[storage.start : storage.start + storage.size]
        return torch.empty(0, dtype=storage.dtype).set_(elements, offset, shape, stride)  # type: ignore[call-overload]


def _name(name: Any) -> str:
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        raise ValueError("a class or record without a name")
    return name


def _key(key: Any) -> str | Named:
    """Return a dict's key as a text, or its type's name; no other kind names a weight.

    Hashing is what makes this matter: of texts alone it cannot be made slow.
    """
    if isinstance(key, str):
        return key
    if type(key) is int and key.bit_length() <= 64:
        return str(key)
    return key if isinstance(key, Named) else Named(type(key).__name__)

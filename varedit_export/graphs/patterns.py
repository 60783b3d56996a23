"""Keep graphs of a few blocks, named and optimised, in the user's cache: tracing takes minutes.

Such a pattern, from which `blocks.py` makes a graph of any depth, depends on neither weights nor
depth. Its file is named for all that it does depend on: the stage and what it is shaped by, what
binds it, our code, and the versions of the tools. A file that is missing, damaged or of other
inputs counts for none: the pattern is then made again. A fresh one is read from the bytes that are
kept, too, so that a graph is the same to the byte with and without the cache.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

import onnx
import onnx_ir as ir

from varedit_export.graphs.scales import Binding
from varedit_export.graphs.stages import Stage
from varedit_runtime.files import keep, read_kept
from varedit_runtime.locate import cache_folder
from varedit_runtime.precision import Storage

LARGEST_CACHE = 256 * 2**20  # bytes; a pattern has 0.25 MB, a model one for each graph
DIGEST_SIZE = sha256().digest_size
PACKAGES = ("varedit_export", "varedit_reference", "varedit_runtime")
TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy", "sympy")


def kept_pattern(stage: Stage, binding: Binding | None, make: Callable[[], ir.Model]) -> ir.Model:
    """Return the pattern of a graph: from the cache, or made and kept.

    One that a storage of somebody else's code takes part in is not kept: it may change.
    """
    if (path := _place(stage, binding)) is None:
        return make()
    constants = () if binding is None else binding.constants
    inputs = [name for name in stage.inputs() if name not in constants]
    if model := _read(read_kept(path), inputs):
        with suppress(OSError):  # another build deleted it
            path.touch()
        return model
    data = ir.to_proto(make()).SerializeToString()
    keep(path, with_digest(data))
    _delete_oldest()
    return ir.from_proto(onnx.load_from_string(data))


def is_missing(stage: Stage, binding: Binding | None) -> bool:
    """Return whether a pattern could be kept and is not."""
    path = _place(stage, binding)
    return path is not None and not path.is_file()


def with_digest(data: bytes) -> bytes:
    """Return a file's content: what is kept, behind its digest."""
    return sha256(data).digest() + data


def _place(stage: Stage, binding: Binding | None) -> Path | None:
    """Return the path of a pattern in the cache; None if it is not kept."""
    if not all(map(_is_ours, stage.shapes.precision.stored)):
        return None
    return _folder() / f"{_key(stage, binding)}.onnx"


def _is_ours(stored: tuple[str, Storage]) -> bool:
    return type(stored[1]).__module__.partition(".")[0] in PACKAGES


def _folder() -> Path:
    return cache_folder() / "patterns"


def _read(content: bytes, inputs: list[str]) -> ir.Model | None:
    """Return the pattern in a file if it begins with these inputs and refers to no other file."""
    data = content[DIGEST_SIZE:]
    if content != with_digest(data):
        return None
    try:
        model = ir.from_proto(onnx.load_from_string(data))
    except Exception:  # whatever parsers raise on what no build wrote
        return None
    tensors = model.graph.initializers.values()
    fits = [value.name for value in model.graph.inputs][: len(inputs)] == inputs
    inside = not any(isinstance(value.const_value, ir.ExternalTensor) for value in tensors)
    return model if fits and inside else None


def _key(stage: Stage, binding: Binding | None) -> str:
    text, bound = getattr(stage, "text_encoder", None), None
    if binding is not None:
        arrays = {n: (a.dtype, a.shape, a.tobytes()) for n, a in binding.constants.items()}
        bound = (binding.sizes, arrays, binding.parts)
    made_from = (stage.name, stage.opset, stage.shapes, text and text.config, bound, _code())
    return sha256(repr(made_from).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a digest of all code that takes part in tracing, and the versions of its tools."""
    digest = sha256(repr([python_version(), *map(version, TOOLS)]).encode())
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _delete_oldest() -> None:
    """Delete what was not used for longest, until the folder has no more bytes than it may."""
    files = []
    for path in _folder().glob("*.onnx"):
        with suppress(OSError):  # another build deleted it
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > LARGEST_CACHE:
            with suppress(OSError):
                path.unlink(missing_ok=True)

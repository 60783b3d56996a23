"""Weight files as mappings from name to tensor: .pth, a folder of shards, safetensors.

Tensors are views of a memory map, whatever the file: opening one reads no weights, and what is read
is page cache that the system may drop. So a 34 GB checkpoint needs no 34 GB of memory.

Nothing in a file is run, and no size in a header is trusted: `pickled.py` reads a .pth as data.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from varedit_reference.pickled import LARGEST_HEADER, Named, open_pickled
from varedit_runtime.errors import CheckpointError, one_line, readable_size, shown
from varedit_runtime.files import atomic_file
from varedit_runtime.manifest import StoredWeight

PICKLED = (".pth", ".pt", ".bin")
INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.pth.index.json", "*.pt.index.json")
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Of weights that a precision keeps as values and scales; no checkpoint may have them.
PACKED_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
# What training code puts before or into the names of a model that it wraps.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PREFIXES = ("module.", "model.", "_forward_module.")  # left out where all names begin so
MOST_PREFIXES = 4
# Where a file keeps its state dict, if not at the top: the first of these that it has. The released
# tokenizers' is the first of all. AVERAGED: the average of a training's weights (EMA).
WEIGHTS = ("gpt_fsdp", "gpt", "state_dict", "module", "model")
AVERAGED = ("gpt_ema_fsdp", "ema")
Branch = tuple[str, ...]
TOKENIZER_BRANCH: Branch = ("vae",)
BRANCHES: tuple[Branch, ...] = (
    TOKENIZER_BRANCH,
    *(
        (*outer, key)
        for keys in (WEIGHTS, AVERAGED)
        for outer in (("trainer",), ())
        for key in keys
    ),
)
MOST_LISTED = 3


class Weights(dict[str, Tensor]):
    """Tensors by name. notes: what was chosen from the file, or left out of names, for people."""

    def __init__(self, tensors: Mapping[str, Tensor], notes: Sequence[str] = ()) -> None:
        super().__init__(tensors)
        self.notes = tuple(notes)


def open_weights(path: str | Path, prefer_ema: bool = False) -> Weights:
    """Open a weights file or folder as tensors by name, memory-mapped.

    Reads .safetensors; .pth, .pt and .bin as torch.save writes them; and folders with one such
    file, or with shards and an index. What wraps a state dict or its names is left out, and noted.
    The file must not change while its tensors are in use. prefer_ema: read the average of a
    training's weights, which some files keep beside the weights. Raises CheckpointError if the file
    is missing, cut short, not of the format that its name says, holds anything but tensors, or has
    no average if that is preferred.
    """
    path = Path(path)
    try:
        open_path = _open_folder if path.is_dir() else _open_file
        return _unwrapped(open_path(path, prefer_ema))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror or error}): give a readable file or folder"
        ) from error


def _open_file(path: Path, prefer_ema: bool) -> Weights:
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}: give an existing file or folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: download or copy it again")
    if path.suffix == ".safetensors":
        return _state_dict(path, _open_safetensors(path), prefer_ema)
    if path.suffix in PICKLED:
        return _state_dict(path, open_pickled(path), prefer_ema)
    raise CheckpointError(
        f"{path} is no known kind of weights: expected .safetensors, {', '.join(PICKLED)}, "
        "or a folder of such files"
    )


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if LARGEST_HEADER < length < path.stat().st_size:
            raise ValueError(f"names and shapes of more than {LARGEST_HEADER} bytes")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({one_line(error)}): fetch or copy it again"
        ) from error


def _state_dict(path: Path, content: Any, prefer_ema: bool) -> Weights:
    """Return the state dict in what a file holds, from the branch that it is in."""
    branch, notes = _branch(path, content, prefer_ema)
    content = _at(content, branch)
    where = f" under {_quoted(branch)}" if branch else ""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {_kind(content)}, not tensors by name: expected a state dict"
        )
    odd = (
        f"{shown(name)} is {_kind(value)}" if isinstance(name, str) else f"a name is {_kind(name)}"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    )
    if told := _listed(odd):
        raise CheckpointError(
            f"{path} holds more than tensors{where} ({told}): expected a state dict of dense "
            f"tensors, alone or under one of {_either(WEIGHTS + AVERAGED)}; nothing in it was run"
        )
    return Weights(content, notes)


def _branch(path: Path, content: Any, prefer_ema: bool) -> tuple[Branch, list[str]]:
    """Return where the state dict is in what a file holds, and a note if there is something to say.

    Raises CheckpointError if an average is preferred and there is none.
    """
    found = [b for b in BRANCHES if isinstance(inner := _at(content, b), dict) and inner]
    averages = [branch for branch in found if branch[-1] in AVERAGED]
    if prefer_ema and not averages:
        raise CheckpointError(
            f"{path} has no average of its weights (EMA): expected it under one of "
            f"{_either(AVERAGED)}; there is {_listed(map(_quoted, found)) or 'nothing like it'}; "
            "leave out --prefer-ema"
        )
    branch = next(iter(averages if prefer_ema else found), ())
    if branch in ((), TOKENIZER_BRANCH):
        return branch, []
    other = next((b for b in found if (b in averages) != (branch in averages)), None)
    instead = f", not from {_quoted(other)}" if other else ""
    return branch, [f"read from {_quoted(branch)}{instead}"]


def _at(content: Any, branch: Branch) -> Any:
    """Return what lies under these keys of nested dicts; None if nothing does."""
    for key in branch:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _either(keys: Branch) -> str:
    return f"{', '.join(map(repr, keys))}, at the top or in 'trainer'"


def _quoted(branch: Branch) -> str:
    return repr(".".join(branch))


def _listed(texts: Iterable[str]) -> str:
    """Return the first few texts; of hostile files there may be very many."""
    first = [*islice(texts, MOST_LISTED + 1)]
    return ", ".join([*first[:MOST_LISTED], *["..."] * (len(first) > MOST_LISTED)])


def _kind(value: object) -> str:
    if isinstance(value, dict) and value:
        return f"a dict of {_listed(map(shown, value))}"
    return f"a {value.name if isinstance(value, Named) else type(value).__name__}"


def _unwrapped(weights: Weights) -> Weights:
    """Leave out of names what training code adds to them, unless two would become one."""
    names, left_out = {name: name for name in weights}, []
    for wrapper in WRAPPERS:
        if any(wrapper in name for name in names.values()):
            names = {name: short.replace(wrapper, "") for name, short in names.items()}
            left_out.append(wrapper)
    for _ in range(MOST_PREFIXES):
        for prefix in PREFIXES:
            if names and all(name.startswith(prefix) for name in names.values()):
                names = {name: short.removeprefix(prefix) for name, short in names.items()}
                left_out.append(prefix)
    if not left_out or len(set(names.values())) < len(names):
        return weights
    tensors = {short: weights[name] for name, short in names.items()}
    return Weights(tensors, [*weights.notes, f"names without {', '.join(map(repr, left_out))}"])


def _open_folder(folder: Path, prefer_ema: bool) -> Weights:
    index = next((found for kind in INDEXES for found in sorted(folder.glob(kind))), None)
    if index is not None:
        return _open_shards(folder, index, prefer_ema)
    for suffix in (".safetensors", *PICKLED):
        match sorted(folder.glob(f"*{suffix}")):
            case [file]:
                return _open_file(file, prefer_ema)
            case [_, _, *_]:
                raise CheckpointError(
                    f"{folder} holds several {suffix} files and no index: name one of them, or "
                    "add the *.index.json that came with them"
                )
    raise CheckpointError(
        f"{folder} holds no weights: expected an *.index.json with its shards, or one file of "
        f"weights (.safetensors, {', '.join(PICKLED)})"
    )


def _open_shards(folder: Path, index: Path, prefer_ema: bool) -> Weights:
    weight_map = _read_index(index)
    _check_shards(folder, index, set(weight_map.values()))
    names = sorted(set(weight_map.values()))
    shards = {shard: _open_file(folder / shard, prefer_ema) for shard in names}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index} places {name} in {shard}, which does not hold it: the index and the "
                "shards belong to different checkpoints; fetch all of them again"
            )
    notes = dict.fromkeys(note for weights in shards.values() for note in weights.notes)
    return Weights({name: shards[shard][name] for name, shard in weight_map.items()}, [*notes])


def read_header_file(path: Path, most: int = LARGEST_HEADER) -> bytes:
    """Return a small file's content. Raises CheckpointError if it is larger, OSError as reading."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path} is not a file: copy it again")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{path} has more than {most} bytes: copy it again")
    return content


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(read_header_file(index))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON: fetch or copy it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(
            f"{index} has no weight_map from tensor names to shard files: fetch or copy it again"
        )
    return weight_map


def _check_shards(folder: Path, index: Path, shards: set[str]) -> None:
    """Raise CheckpointError unless every shard is a file of the folder itself.

    An index from a stranger could otherwise name any file on this machine.
    """
    missing = sorted(shards - {file.name for file in folder.iterdir()})
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that {index.name} names "
            f"({', '.join(missing[:3])}): fetch them as well"
        )
    # In the Hugging Face cache a snapshot's files are links into the same repository's blobs.
    root = folder.resolve()
    snapshots = (path.parent for path in (root, *root.parents) if path.parent.name == "snapshots")
    roots = [root, *(path.parent / "blobs" for path in snapshots)]
    for shard in sorted(shards):
        if not any((folder / shard).resolve().is_relative_to(path) for path in roots):
            raise CheckpointError(
                f"{folder / shard} links to a file outside the folder: refused; copy it there"
            )


@dataclass(frozen=True)
class StoredTensor:
    """A weight in a file, and what its bytes are: their type and shape."""

    place: StoredWeight
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Return where the tensors of a safetensors file below a bundle's folder lie, by name.

    Raises CheckpointError when the file is missing or not whole.
    """
    path = folder / file
    open_weights(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in (SAFETENSORS_DTYPES | PACKED_DTYPES).items()}
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] not in dtypes:
            raise CheckpointError(
                f"{path}: {shown(name)} is of type {entry['dtype']}: expected one of "
                f"{', '.join(dtypes)}"
            )
        place = StoredWeight(name, file, 8 + length + start, end - start)
        tensors[name] = StoredTensor(place, dtypes[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write named tensors as a safetensors file, one at a time, all or nothing.

    Shows its progress where stderr is a terminal. Raises CheckpointError, and writes nothing, if
    the disk has no room or a tensor is of no accepted float type.
    """
    # Without an estimate of the time left: tensors differ a thousandfold.
    form = "{desc} |{bar}| {n_fmt} of {total_fmt} tensors, {elapsed}"
    bar = partial(tqdm, desc=path.name, disable=None, bar_format=form)
    with whole_file(path, sum(tensor.nbytes for tensor in tensors.values())) as whole:
        write_tensors(whole, tensors, tensors.__getitem__, metadata, bar)


def write_tensors(
    path: Path,
    layout: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    watch: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> None:
    """Write named tensors to a safetensors file in place, one at a time.

    layout: types and shapes by name, on the meta device or not; make: the tensor of a name, which
    is dropped once written; watch: wraps the names in the order of writing, as tqdm does. Raises
    OSError if the file cannot be written, CheckpointError if a tensor is of no accepted float type
    or has numbers that are not finite.
    Format: https://huggingface.co/docs/safetensors#format.
    """
    names, header = _in_order(layout), planned_header(layout, metadata)
    made = _ahead(lambda name: check_finite(name, make(name).contiguous()), names)
    with path.open("wb") as file:
        file.write(header)
        for name in watch(names):
            tensor = next(made)
            assert (tensor.dtype, tensor.shape) == (layout[name].dtype, layout[name].shape)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _ahead(make: Callable[[str], Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    """Yield the tensors in order; two more are made in threads while the caller writes one.

    A caller that ends early does not wait for those that are being made, which can take seconds.
    """
    pool, pending = ThreadPoolExecutor(2), deque[Future[Tensor]]()
    try:
        for name in names:
            pending.append(pool.submit(make, name))
            if len(pending) == 3:  # the one that is used and two more: memory stays bounded
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_order(layout: Mapping[str, Tensor]) -> list[str]:
    """Return the names in an order in which every tensor is aligned to its own type.

    Wide types come first. But before them come packed bytes, where the rest stays aligned behind
    those: what is made together with them, such as scales, is small enough to wait for its turn.
    """
    widest = max((tensor.itemsize for tensor in layout.values()), default=1)
    aligned = all(tensor.itemsize > 1 or tensor.nbytes % widest == 0 for tensor in layout.values())
    first = 1 if aligned else 0
    return sorted(layout, key=lambda n: (layout[n].itemsize != first, -layout[n].itemsize))


def planned_header(layout: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header of the file that `write_tensors` writes, which says where tensors lie."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in _in_order(layout):
        tensor = layout[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": PACKED_DTYPES.get(tensor.dtype)
            or SAFETENSORS_DTYPES[check_float(name, tensor).dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors behind it are aligned
    return len(text).to_bytes(8, "little") + text


def check_float(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor. Raises CheckpointError if its type is no accepted float type."""
    if tensor.dtype not in SAFETENSORS_DTYPES:
        accepted = ", ".join(_dtype_name(dtype) for dtype in SAFETENSORS_DTYPES)
        raise CheckpointError(
            f"the weight {name} is stored as {_dtype_name(tensor.dtype)}: expected one of "
            f"{accepted}; convert the checkpoint to one of them"
        )
    return tensor


def check_finite(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor. Raises CheckpointError, naming a number, unless all are finite.

    dtype: the type that the tensor will be converted to, in which they must be finite as well.
    """
    dtype = dtype or tensor.dtype
    if tensor.numel():
        # float8 has no minimum. NaN makes both bounds NaN, and rounding keeps their order.
        ordered = tensor.float() if tensor.itemsize == 1 else tensor
        bounds = torch.stack(ordered.aminmax())
        if not (bounds.isfinite().all() and bounds.to(dtype).double().isfinite().all()):
            raise CheckpointError(_not_finite(name, tensor, dtype))
    return tensor


def _not_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    index = tensor.to(dtype).double().isfinite().logical_not().nonzero()[0].tolist()
    number = tensor[tuple(index)].item()
    if isfinite(number):
        return (
            f"the weight {name} is {number:g} at {index}, past the range of {_dtype_name(dtype)} "
            f"(at most {torch.finfo(dtype).max:g}): choose a precision of wider range"
        )
    return (
        f"the weight {name} is {number} at {index}: expected finite numbers; the weights are "
        "damaged, or their training diverged: use others"
    )


@contextmanager
def whole_file(path: Path, size: int) -> Iterator[Path]:
    """Give a temporary name to write to; rename it to path on success, remove it on failure.

    size: bytes to be written. Raises CheckpointError if the disk has no room for them or
    the folder cannot be written.
    """
    try:
        check_room(path.parent, size)
        with atomic_file(path) as whole:
            yield whole
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def check_there(paths: Iterable[Path]) -> None:
    """Raise CheckpointError, which names all of them, if files or folders do not exist."""
    missing = [str(path) for path in paths if not os.path.exists(path)]
    if missing:
        raise CheckpointError(f"there is no {' and no '.join(missing)}: name where weights are")


def check_room(folder: Path, size: int) -> None:
    """Make the folder. Raises CheckpointError if that fails or it has no room for size bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(
            f"cannot make the folder {folder} ({error.strerror or error}): choose another"
        ) from error
    if free < size:
        raise CheckpointError(
            f"{folder} has {readable_size(free)} free and {readable_size(size)} are to be written: "
            "free some room or choose another folder"
        )


def torch_dtype(name: str) -> torch.dtype:
    """Return the type that a precision names, such as "float16"."""
    return getattr(torch, name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

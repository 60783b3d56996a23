"""The weights files of a bundle, read in place."""

import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from varedit_export.errors import ExportError
from varedit_reference.weights_file import StoredTensor, read_header


class WeightFiles:
    """The weights files of a bundle's folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        self._layouts: dict[str, dict[str, StoredTensor]] = {}

    def layout(self, file: str) -> Mapping[str, StoredTensor]:
        """Return where a file's own header says that its tensors are, by name."""
        if file not in self._layouts:
            self._layouts[file] = read_header(self._folder, file)
        return self._layouts[file]

    def read(self, tensor: StoredTensor) -> Tensor:
        """Return a view of the file, in its own type."""
        place, name = tensor.place, tensor.place.file
        if name not in self._maps:
            with (self._folder / name).open("rb") as file:
                # Copy on write: torch takes no read-only memory.
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if place.offset + place.length > len(self._maps[name]):
            raise ExportError(f"a weight lies past the end of {name}")
        return torch.frombuffer(
            self._maps[name], dtype=tensor.dtype, count=prod(tensor.shape), offset=place.offset
        ).view(tensor.shape)

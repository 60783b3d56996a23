"""The components of a bundle: graphs' weights, one file each, shared by all graphs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from varedit_export.graphs.layout import GraphWeight, make_weight, pack
from varedit_export.graphs.model import Packed
from varedit_export.graphs.stages import PositionTable
from varedit_reference.config import TransformerConfig
from varedit_reference.rotary import full_rotation
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.weights_file import planned_header, read_header, write_tensors
from varedit_runtime.errors import CheckpointError
from varedit_runtime.manifest import StoredWeight, positions, weights_file


@dataclass(frozen=True)
class Component:
    """Weights that go into one file.

    module: their types and shapes, as fake tensors. make: makes a weight by name. attribute: the
    stages' name of the module, "" if they use its parts.
    """

    name: str
    module: nn.Module
    make: Callable[[str], Tensor]
    attribute: str

    @property
    def file(self) -> str:
        """Return the path of its file in the bundle's folder."""
        return weights_file(self.name)

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in self.module.state_dict().values())

    @property
    def header(self) -> bytes:
        """Return the header of its file, which says where its weights lie."""
        return planned_header(self.module.state_dict(), self._metadata)

    @property
    def _metadata(self) -> Mapping[str, str]:
        return {"component": self.name}

    def write(
        self,
        folder: Path,
        watch: Callable[[Sequence[str]], Iterable[str]] = iter,
    ) -> None:
        """Write the file into the bundle's folder, tensor by tensor; watch: wraps their names.

        Raises CheckpointError when it cannot be written.
        """
        path, layout = folder / self.file, self.module.state_dict()
        try:
            write_tensors(path, layout, self.make, self._metadata, watch)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    def stored(self, folder: Path) -> dict[str, StoredWeight]:
        """Return where each weight of the written file lies, by the name that stages know it by."""
        prefix = f"{self.attribute}." if self.attribute else ""
        layout = read_header(folder, self.file)
        return {prefix + name: tensor.place for name, tensor in layout.items()}


def laid_out(
    name: str,
    module: nn.Module,
    layout: Mapping[str, GraphWeight],
    state: Mapping[str, Tensor],
    attribute: str,
) -> Component:
    """Return a component whose weights a layout makes from the reference's parameters by name.

    The parts of a packed weight are made at once: the smaller ones wait until they are asked for.
    """
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    packed = {name: m.storage for name, m in module.named_modules() if isinstance(m, Packed)}
    waiting: dict[str, Tensor] = {}

    def make(name: str) -> Tensor:
        whole, _, part = name.rpartition(".")
        if whole not in packed:
            return make_weight(layout[name], state, dtypes[name])
        if name in waiting:
            return waiting.pop(name)
        parts = pack(packed[whole], make_weight(layout[whole], state, torch.float32))
        made = parts.pop(part)
        waiting.update((f"{whole}.{n}", p) for n, p in parts.items() if p.nbytes < made.nbytes)
        return made

    return Component(name, module, make, attribute)


def tokenizer_component(module: Tokenizer, state: Mapping[str, Tensor]) -> Component:
    """Return the picture tokenizer's component: fp32, in the reference's own names."""
    return Component("tokenizer", module, lambda name: state[name].float(), "")


def positions_component(name: str, config: TransformerConfig, fake: FakeTensorMode) -> Component:
    """Return the component of a variant's rotary table."""
    with fake:
        module = PositionTable(config)
    table = full_rotation(config, torch.device("cpu"))
    return Component(
        positions(name), module, {"cos": table.cos, "sin": table.sin}.__getitem__, "table"
    )

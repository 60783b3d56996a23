"""What the comparisons block by block share: weights as a bundle rounded them, and errors.

`RoundedWeights` gives the reference the values that the graphs have; `ComparedGraph` is one graph
at given lengths, and gathers the largest error of its blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor, nn

from varedit_export.errors import ParityError
from varedit_export.graphs.layout import GraphWeight
from varedit_export.parity.cut import CutGraph
from varedit_export.parity.rounding import round_weight
from varedit_export.parity.runner import Arrays
from varedit_export.parity.weight_files import WeightFiles
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.wiring import FUSED, SYMBOLIC
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import ParityLine, Variant, weights_file
from varedit_runtime.precision import Precision, product_of

DRAWING = 2  # parameters that are read or drawn at a time


class ExactWeights(Mapping[str, Tensor]):
    """The reference's parameters by name, in fp32."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def load(self, module: nn.Module, rename: Callable[[str], str]) -> None:
        """Give a module on the meta device its parameters. rename: its own name -> a name here."""
        types = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        # Drawing random weights, or reading them from a disk, takes longer than computing.
        with ThreadPoolExecutor(DRAWING) as pool:
            # Contiguous: 16-bit products of transposed weights are a hundred times slower.
            tensors = pool.map(lambda n: self[rename(n)].to(types[n]).contiguous(), types)
            state = dict(zip(types, tensors, strict=True))
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False).eval()


class RoundedWeights(ExactWeights):
    """The reference's parameters by name, rounded as the bundle's weights are."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        layout: Mapping[str, GraphWeight],
        files: WeightFiles,
        component: str,
        precision: Precision,
    ) -> None:
        super().__init__(state)
        places = files.layout(weights_file(component))
        self._stored = {
            source: places[name].dtype
            if name in places
            else precision.format(component, product_of(name)).storage
            for name, weight in layout.items()
            for source in weight.sources
        }

    def __getitem__(self, name: str) -> Tensor:
        made, stored = super().__getitem__(name), self._stored[name]
        if stored is None:
            raise ParityError(f"the bundle's files hold no weight made from {name}")
        return made.to(stored) if isinstance(stored, torch.dtype) else round_weight(stored, made)


@dataclass
class ComparedGraph:
    """A graph with blocks, at given lengths, and its comparison.

    scale: the one it predicts, None for others. values: all that it reads except keys and values
    of the past. every: run all of its blocks, each on x_RLC, the reference's stream so far. rows:
    of one picture.
    """

    graph: CutGraph
    scale: int | None
    sizes: Mapping[str, int]
    values: Arrays
    every: bool
    rows: int = 1
    x_RLC: Tensor | None = None
    largest: float = 0.0
    rms: float = 0.0

    def compare(self, actual: Tensor, expected: Tensor, given: Tensor | None = None) -> None:
        """Keep the largest errors, relative to the rms of what was added to the given stream."""
        added = expected if given is None else expected - given
        error, rms = (actual - expected).abs(), added.square().mean().sqrt()
        self.largest = _larger(self.largest, float(error.max() / rms))
        self.rms = _larger(self.rms, float(error.square().mean().sqrt() / rms))


def open_cut_graph(bundle: Bundle, variant: Variant, stage: str) -> CutGraph:
    return CutGraph(stage, read_graph(bundle, variant, stage))


def blocks_to_run(stage: ComparedGraph) -> list[int]:
    """Return the blocks to run: one of each kind, or all."""
    kinds: dict[tuple[bytes, ...], int] = {}
    for i in stage.graph.blocks:
        kinds.setdefault(stage.graph.block(i).kind, i)
    return list(stage.graph.blocks if stage.every else kinds.values())


def blocks_line(stage: ComparedGraph, count: int, precision: Precision) -> ParityLine:
    blocks = f"all {count} blocks" if stage.every else f"{count} unlike blocks"
    at = f" at scale {stage.scale}" if stage.graph.name in (SYMBOLIC, FUSED) else ""
    # What is rounded to steps may come out a step apart, which is much of one value of few.
    kind, error = ("rms", stage.rms) if precision.rounds_inputs else ("largest", stage.largest)
    measure = f"{blocks}{at}, {kind} error over what they add"
    return ParityLine(stage.graph.name, measure, error, precision.gates.blocks)


def _larger(one: float, other: float) -> float:
    """Return the larger number, or NaN where the second is."""
    return other if isnan(other) else max(one, other)


def random_values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

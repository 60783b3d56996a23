"""Tell what memory a training takes before it starts, from one step that computes no numbers.

The step runs on tensors without content (on PyTorch's meta device), with all widths and two and
three blocks; the sizes of all tensors that live at the same time are added up. All further blocks
take what the third one takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varedit_export.training.learner import Example, Learner, PairTokens
from varedit_reference.config import ModelConfig
from varedit_reference.kv_cache import source_length
from varedit_reference.quantisation import positions
from varedit_reference.transformer import CrossAttention, SelfAttention, fused_attention
from varedit_runtime.errors import readable_size

ADAM = 2  # fp32 numbers of AdamW for each that is trained
TEXT_TOKENS = 64  # a long instruction
OVERHEAD = 1.1  # what an allocator loses between tensors
PROGRAM = 10**9  # PyTorch with its kernels

NewLearner = Callable[[ModelConfig], Learner]  # on the meta device


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training takes of each process's device.

    weights: of all parameters. gradients, optimiser: of those that are trained. activations: all
    else that lives at the peak of a step, or of drawing a pair for a sheet. processes: that share
    all but the activations.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    processes: int = 1

    @property
    def total(self) -> int:
        shared = (self.weights + self.gradients + self.optimiser) / self.processes
        return int(OVERHEAD * (shared + self.activations)) + PROGRAM

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimiser,
            "activations": self.activations,
        }
        told = ", ".join(f"{readable_size(size)} of {name}" for name, size in parts.items())
        among = f" among {self.processes} processes" if self.processes > 1 else ""
        whole, program = readable_size(self.total), readable_size(PROGRAM)
        return f"{whole} of memory{among and ' each'}: {told}{among}, {program} of the program"


def plan_memory(
    config: ModelConfig, new: NewLearner, pictures: int, processes: int = 1
) -> MemoryPlan:
    """Return what training takes. new: makes the learner of a configuration, as it is trained.

    pictures: that are computed at a time.
    """
    whole = new(config)
    block = sum(p.nbytes for p in whole.transformer.blocks[0].parameters())
    with torch.enable_grad():
        step = _peak_of_whole(config, partial(_step_peak, new=new, pictures=pictures))
    trained = [p for p in whole.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    weights = sum(p.nbytes for p in whole.parameters())
    drawing = _peak_of_whole(config, partial(_draw_peak, new=new)) - weights
    gathered = 2 * block if processes > 1 else 0  # the one that runs, and the next one
    activations = max(step - weights - gradients, drawing, 0) + gathered
    return MemoryPlan(weights, gradients, ADAM * gradients, activations, processes)


def _peak_of_whole(config: ModelConfig, peak: Callable[[ModelConfig], int]) -> int:
    """Return a peak of all blocks by that of two and of three."""
    two, three = (peak(_shallow(config, depth)) for depth in (2, 3))
    return two + (config.transformer.depth - 2) * (three - two)


def _step_peak(config: ModelConfig, new: NewLearner, pictures: int) -> int:
    """Return the most bytes that live during a step, but for the optimiser's."""
    with peak_of_tensors() as peak:
        learner = _without_scores(new(config))
        learner([example_without_content(config)] * pictures)["loss"].backward()
    return peak()


def _draw_peak(config: ModelConfig, new: NewLearner) -> int:
    """Return the most bytes that live while one pair is drawn, without any gradients."""
    with peak_of_tensors() as peak:
        _without_scores(new(config)).draw(pair_without_content(config), 0)
    return peak()


def _without_scores(learner: Learner) -> Learner:
    for module in learner.modules():
        if isinstance(module, CrossAttention) or (
            isinstance(module, SelfAttention) and module.attend is fused_attention
        ):
            module.attend = _attend
    return learner


def _attend(q_RHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend by a kernel that keeps no scores; without a device, PyTorch would choose another."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q_RHLD, k_RHSD, v_RHSD)[0]


def example_without_content(config: ModelConfig) -> Example:
    """Return an example of zeros, with a long instruction."""
    sizes = config.transformer
    channels = sizes.token_channels
    return Example(
        torch.zeros(source_length(sizes), channels),
        torch.zeros(sum(sizes.lengths[1:]), channels),
        torch.zeros(sum(sizes.lengths), channels, dtype=torch.bool),
        torch.zeros(TEXT_TOKENS, sizes.text_channels),
        False,
        1.0,
    )


def pair_without_content(config: ModelConfig) -> PairTokens:
    """Return the tokens of a pair as zeros, with a long instruction."""
    sizes, patch = config.transformer, config.tokenizer.patch
    height, width = positions(sizes.finest, patch)
    features = torch.zeros(config.tokenizer.bits, height, width)
    return PairTokens(features, features, torch.zeros(TEXT_TOKENS, sizes.text_channels))


def _shallow(config: ModelConfig, depth: int) -> ModelConfig:
    return replace(config, transformer=replace(config.transformer, depth=depth))


class _Watch(TorchDispatchMode):
    """Add up the sizes of all memory of tensors that is made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self.known:
            return
        self.known.add(place)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._forget, place, storage.nbytes())

    def _forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


@contextmanager
def peak_of_tensors() -> Iterator[Callable[[], int]]:
    """Watch the block's tensors; yield what returns the most bytes at once."""
    watch = _Watch()
    with watch:
        yield lambda: watch.peak

"""Estimate what a build needs: disk, memory, time. A build says so first, and checks that it fits.

Constants were measured with `tests/measure_build.py` on builds of 2b at 512 px and 8b at 1024 px
in fp16 with random weights, on two cores of an x86 server, PyTorch 2.13 and ONNX Runtime 1.31.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from varedit_export.errors import ExportError
from varedit_export.graphs.patterns import is_missing
from varedit_export.graphs.side_by_side import others
from varedit_export.graphs.stages import (
    ROWS,
    TEXT_TOKENS,
    Shapes,
    has_references,
    text_input_specs,
)
from varedit_export.parity.compare_bundle import is_large
from varedit_export.plan import BundlePlan
from varedit_reference.kv_cache import source_length
from varedit_runtime.backends.engines.memory import Budget, with_offload
from varedit_runtime.backends.host import available_memory
from varedit_runtime.backends.onnxruntime.memory import SCORES, HostBudget, activations
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.errors import readable_size
from varedit_runtime.precision import named

GRAPH = 2 * 10**6  # bytes of the largest graph; most have less than one million
# Bytes of the program with PyTorch, onnxscript and transformers, and of what tracing leaves behind.
PROGRAM = 450 * 10**6
DRAWN = 4  # fp32 tensors of the largest weight: drawn, converted, waiting, written
WHOLE = 3  # fp32 copies of a small model's weights, in the reference and ONNX Runtime's sessions
ROUNDED = 1  # one more of a reference whose products are rounded
KEYS_VALUES = 4  # fp32 arrays of all keys, or values, that the last scale sees
HIDDEN = 3  # fp32 arrays of the last scale's MLP
# Seconds of one core of that server:
TEMPLATE, LONGEST = 6.0, 20.0  # to trace a template, on average; the one that takes longest, bound
PATTERN = 0.8  # to bind and optimise a pattern
REST = 12.0  # to grow the graphs and compare a small model, whatever the model
WEIGHT = 70e-9  # per parameter: drawn, written, hashed, drawn again, run
LOOP, TURNS = 0.0083, 200_000  # of Python's loop that tells how fast another machine is
PRODUCTS = 5e10  # multiplications and additions per second
CORES = 2  # more cores help little


@dataclass(frozen=True)
class Needs:
    """Bytes of disk, bytes of anonymous memory at the peak, and seconds."""

    disk: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{readable_size(self.disk)} of disk, {readable_size(self.memory)} of memory, about "
            f"{max(self.seconds / 60, 1):.0f} min"
        )


def needs(plan: BundlePlan) -> Needs:
    """Return what building a plan takes."""
    variants = [variant.request.shapes for variant in plan.variants]
    sizes = [t.numel() for c in plan.components for t in c.module.state_dict().values()]
    parameters = sum(sizes)
    memory = PROGRAM + DRAWN * 4 * max(sizes)
    if is_large(parameters):
        memory = max(memory, PROGRAM + max(map(_block_by_block, variants)))
    else:
        copies = WHOLE if named(plan.request.precision).exact else WHOLE + ROUNDED
        memory += copies * 4 * parameters + max(map(_attention, variants))
    cores = min(os.cpu_count() or 1, CORES)
    work = sum(parameters * WEIGHT + _products(shapes) / PRODUCTS for shapes in variants)
    disk = plan.weight_bytes + plan.graph_count * GRAPH
    seconds = _tracing(plan) + REST * len(variants) + work / cores
    return Needs(disk, memory, _slowness() * seconds)


def _tracing(plan: BundlePlan) -> float:
    """Return the seconds that making the patterns takes that are not kept."""
    if plan.graphs_from is not None:
        return 0.0
    graphs = [graph for variant in plan.variants for graph in variant.graphs]
    lacking = [graph.stage for graph in graphs if is_missing(graph.stage, graph.binding)]
    templates = len(set(lacking))
    work = TEMPLATE * templates + PATTERN * len(lacking)
    return max(work / (1 + others(templates)), min(work, LONGEST))


@cache
def _slowness() -> float:
    """Return how many times as long as on that server all takes here, as busy as this one is."""
    start = time.perf_counter()
    for _ in range(3):
        sum(number * number for number in range(TURNS))
    return (time.perf_counter() - start) / (3 * LOOP)


def _products(shapes: Shapes) -> int:
    """Count the operations of parity: two blocks at every scale, and three at the prefill's."""
    config = shapes.config.transformer
    tokens = sum(config.lengths) + source_length(config) + config.lengths[-1]
    return 2 * 2 * sum(shapes.forms.values()) * tokens * _block_parameters(shapes)


def _block_parameters(shapes: Shapes) -> int:
    width, mlp = shapes.config.transformer.width, shapes.config.transformer.mlp_width
    return 8 * width * width + 2 * width * mlp


def _block_by_block(shapes: Shapes) -> int:
    """Return the bytes of one block's parity: weights stored and in fp32, the last scale's data."""
    config, block = shapes.config.transformer, _block_parameters(shapes)
    seen = (source_length(config) + sum(config.lengths)) * max(shapes.forms.values()) * config.width
    hidden = max(shapes.forms.values()) * config.lengths[-1] * config.mlp_width
    return (shapes.dtype.itemsize + 4) * block + 4 * (KEYS_VALUES * seen + HIDDEN * hidden)


def _attention(shapes: Shapes) -> int:
    """Return the bytes of a whole model's caches, and of the last scale's attention."""
    config = shapes.config.transformer
    seen = source_length(config) + sum(config.lengths)
    caches = 2 * config.depth * seen * max(shapes.forms.values()) * config.width
    scores = max(shapes.forms.values()) * config.heads * config.lengths[-1] * seen
    return int(4 * (caches + SCORES * scores))


def editing(plan: BundlePlan) -> Iterator[str]:
    """Yield what editing with each variant will take, as `inspect` says it of the bundle."""
    for variant in plan.variants:
        shapes = variant.request.shapes
        gpu, cpu = gpu_editing(plan, shapes), cpu_editing(plan, shapes)
        if shapes.precision.no_gpu is None:
            yield f"{variant.request.name} edits with {gpu[0]}{with_offload(gpu[1])}"
        if shapes.precision.onnxruntime:
            yield f"{variant.request.name} edits with {cpu}"


def gpu_editing(plan: BundlePlan, shapes: Shapes) -> tuple[Budget, Budget]:
    """Return what editing takes of a GPU's memory, and what with the text encoder offloaded."""
    text, weights = _weights(plan)
    caches, between = _caches(shapes), _between(shapes)
    whole = Budget(weights + text, caches, between)
    return whole, Budget(weights, max(caches, text), between)


def cpu_editing(plan: BundlePlan, shapes: Shapes) -> HostBudget:
    """Return what editing takes on a CPU."""
    text, weights = (size * shapes.precision.cpu_growth for size in _weights(plan))
    config = shapes.config.transformer
    rows = max(shapes.forms.values())
    running = activations(
        shapes.batch,
        rows,
        config.heads,
        source_length(config),
        config.lengths,
        shapes.config.picture_size,
    )
    return HostBudget(text, weights, _caches(shapes), _between(shapes), running)


def _weights(plan: BundlePlan) -> tuple[int, int]:
    """Return the bytes of the text encoder's weights, and of all others."""
    text = sum(component.size for component in plan.components if component.name == TEXT)
    return text, plan.weight_bytes - text


def _caches(shapes: Shapes) -> int:
    """Return the bytes of all keys and values; with SAR the first block has none of the source."""
    config, rows = shapes.config.transformer, max(shapes.forms.values())
    own, source = sum(config.lengths), source_length(config)
    seen = config.depth * (own + source) - source * has_references(shapes)
    return 2 * seen * rows * config.width * shapes.dtype.itemsize


def _between(shapes: Shapes) -> int:
    """Return the bytes of what else passes between graphs."""
    config, rows = shapes.config.transformer, max(shapes.forms.values())
    lengths = {ROWS: rows, TEXT_TOKENS: shapes.text_tokens}
    text = sum(
        spec.dtype.itemsize
        * prod(lengths[size] if isinstance(size, str) else size for size in spec.shape)
        for spec in text_input_specs(shapes, head=True).values()
    )
    own, source = sum(config.lengths), source_length(config)
    # Of SAR: the first block's keys and values of the source, and those averaged to each grid.
    references = 2 * has_references(shapes) * (own + source) * rows * config.width
    features = rows * shapes.text_tokens * config.text_channels
    # Of a bit: two logits, its noise, three bools. Of a token: itself.
    tokens = shapes.batch * (own * (8 + 4 + 3 + 4) + source * 4) * config.token_channels
    bits, (height, width) = shapes.config.tokenizer.bits, shapes.positions
    sums = (len(config.grids) + 1) * shapes.batch * bits * height * width
    pictures = 2 * 3 * shapes.batch * prod(shapes.config.picture_size)
    return text + references * shapes.dtype.itemsize + tokens + 4 * (features + sums + pictures)


def check_memory(needed: int) -> None:
    """Raise ExportError if the system has fewer bytes of memory available than needed."""
    available = available_memory()
    if available is not None and available < needed:
        raise ExportError(
            f"{readable_size(available)} of memory are available and the build needs "
            f"{readable_size(needed)}: end other programs, or build on a larger machine"
        )


def present(folder: Path) -> int:
    """Return the bytes that an interrupted build left in a folder; 0 if it cannot be read."""
    with suppress(OSError):
        return sum(512 * path.lstat().st_blocks for path in folder.rglob("*") if path.is_file())
    return 0

"""Measure a bundle on this machine: the time of every stage and scale, start-up, and memory.

The yardstick is one large fp32 matrix product on the same provider and threads of ONNX Runtime,
measured in the same turns; on a GPU after them, as its matrices may find no room beside a bundle. A
stage that reaches the product's rate in its own products has a share of 1. So a share says how much
a faster implementation could gain.
"""

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, get_args

import msgspec
import numpy as np
from PIL import Image

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AUTO, AutoBackend
from varedit_runtime.backends.detect import installed
from varedit_runtime.backends.host import return_freed_memory
from varedit_runtime.backends.onnxruntime.backend import Buffer, Session
from varedit_runtime.backends.spec import BackendSpec
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.bench_report import (
    BatchCost,
    Dial,
    Measurement,
    MemoryUse,
    Process,
    Processor,
    Report,
    Spread,
    StageMeasurement,
)
from varedit_runtime.bundle import Bundle, digest_line
from varedit_runtime.editing.arguments import Settings
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.prepared import guided_scales
from varedit_runtime.editing.random_text import with_any_text
from varedit_runtime.editing.results import EditResult, OnScale
from varedit_runtime.editing.run import WHOLE_EDIT
from varedit_runtime.errors import ConfigError, printable
from varedit_runtime.geometry import scale_sizes
from varedit_runtime.manifest import MANIFEST, Model, Variant, scale_of, weights_file

INSTRUCTION = "add a hat"
DIALS: tuple[Dial, ...] = get_args(Dial)
PRODUCT_SIZES = {"cpu": 1024, "cuda": 8192}
PRODUCT_RUNS = 10
# ONNX: c = a @ b on square fp32 matrices of any size; tests/product_graph.py writes it.
PRODUCT = Path(__file__).with_name("product.onnx")
SAMPLE_SECONDS = 0.02  # between two samples of the memory in use
ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Contestant:
    """An editor to measure.

    dials: the ways to make an edit faster that are measured besides a whole edit. "further": a
    further result of the picture and instruction before; "fast": `Editor.edit(fast=True)`;
    "unguided": no guidance at any scale. first: the first results of each kind.
    """

    name: str
    editor: Editor
    precision: str
    dials: Sequence[Dial] = ()
    first: dict[Dial | None, list[EditResult]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Dial | None]:
        """The dials to measure; None first, as a further result begins with what that edit left."""
        return [None, *(dial for dial in DIALS if dial in self.dials)]

    def edit(
        self, dial: Dial | None = None, on_scale: OnScale | None = None, count: int | None = None
    ) -> EditResult:
        """Edit a batch of different synthetic pictures, by default the largest; return one."""
        if dial != "further":
            self.editor.forget()
        batch = count or self.editor.variant.batch
        results = self.editor.edit(
            [synthetic_picture(self.editor.variant, place) for place in range(batch)],
            INSTRUCTION,
            seed=list(range(batch)),
            guidance_scale=1 if dial == "unguided" else None,
            fast=dial == "fast",
            on_scale=on_scale,
        )
        self.first.setdefault(dial, results)
        return results[0]


@dataclass(frozen=True)
class Taken:
    """The edits of one kind, and the same ones stage by stage."""

    contestant: Contestant
    dial: Dial | None
    edits: list[EditResult] = field(default_factory=list)
    stages: list[EditResult] = field(default_factory=list)

    def again(self) -> None:
        """Edit once more, and by stages if that differs."""
        result = self.contestant.edit(self.dial)
        self.edits.append(result)
        if WHOLE_EDIT in result.timings:
            result = self.contestant.edit(self.dial, on_scale=lambda progress: None)
        self.stages.append(result)

    def rows(self, stage: str) -> int:
        """Return the rows that a stage needs: without guidance, one for each picture."""
        manifest, variant = self.contestant.editor.bundle.manifest, self.contestant.editor.variant
        guidance = Settings(manifest, variant, self.dial == "fast").guidance(
            1 if self.dial == "unguided" else None
        )
        guided = (scale_of(stage) or 0) < guided_scales(guidance)
        return variant.rows if guided else variant.batch


def measure_bundle(
    bundle: str | os.PathLike[str],
    repeat: int,
    backend: str | ChosenBackend | AutoBackend = AUTO,
    variant: str | None = None,
    dials: Sequence[Dial] = (),
) -> Report:
    """Open a bundle and edit a synthetic picture: once to warm up, then `repeat` times.

    backend, variant: as for `Editor.open`. If an edit is one launch, as many edits run stage by
    stage as well. Raises what `Editor.open` raises, and ConfigError if repeat is less than 1.
    """
    check_repeat(repeat)
    before = memory_in_use()
    start = perf_counter()
    with Editor.open(bundle, backend=backend, variant=variant) as editor:
        open_seconds, opened = perf_counter() - start, memory_in_use()
        precision = editor.bundle.manifest.precision
        name = printable(str(editor.bundle.path))
        one = Contestant(name, with_any_text(editor), precision, dials)
        start = perf_counter()
        with peak_memory() as samples:
            one.edit()
        first_seconds = perf_counter() - start
        return_freed_memory()
        after = memory_in_use()
        turns = take_turns([one], repeat)
        gpu, buffers = editor.backend.gpu_memory, editor.backend.buffer_bytes
    peak = max(samples, default=None)
    first, *others = summarise(*turns)
    own_buffers = 0 if gpu else buffers
    memory = _memory(editor.bundle, first.offload, before, opened, peak, after, own_buffers)
    process = Process(open_seconds, first_seconds, memory, gpu)
    return Report(
        machine=Processor.detect(),
        threads=_option(editor, "threads"),
        versions=versions_of([editor.chosen.spec] if editor.chosen else []),
        repeat=repeat,
        measurements=(msgspec.structs.replace(first, process=process), *others),
    )


def measure_batches(
    bundle: str | os.PathLike[str],
    repeat: int,
    backend: str | ChosenBackend | AutoBackend = AUTO,
    variant: str | None = None,
) -> tuple[BatchCost, ...]:
    """Edit 1, 2, 4, ... pictures at a time and the most, in turns, after one of each to warm up.

    backend, variant: as for `Editor.open`. Raises what that raises, and ConfigError if repeat is
    less than 1.
    """
    check_repeat(repeat)
    with Editor.open(bundle, backend=backend, variant=variant) as editor:
        most = editor.variant.batch
        sizes = [*(2**i for i in range((most - 1).bit_length())), most]
        one = Contestant("", with_any_text(editor), editor.bundle.manifest.precision)
        turns = [[one.edit(count=size) for size in sizes] for _ in range(repeat + 1)]
    return tuple(map(_batch_cost, sizes, zip(*turns[1:], strict=True)))


def _batch_cost(pictures: int, results: Sequence[EditResult]) -> BatchCost:
    clocks = [one.timings for one in results], [one.cpu_timings for one in results]
    return BatchCost(
        pictures, *(Spread.of([sum(of.values()) / pictures for of in clock]) for clock in clocks)
    )


def take_turns(contestants: Sequence[Contestant], repeat: int) -> tuple[list[Taken], list[float]]:
    """Let each make edits of each kind, in turns, after one of each to warm up.

    Returns these, and the CPU's rates of the yardstick if the last contestant computes on it.
    """
    everything = [Taken(one, dial) for one in contestants for dial in one.kinds]
    for taken in everything:
        if taken.dial not in taken.contestant.first:
            taken.contestant.edit(taken.dial)
    rates, last = [], contestants[-1].editor
    for _ in range(repeat):
        if last.provider == "cpu":
            rates.append(product_rate("cpu", _option(last, "threads")))
        for taken in everything:
            taken.again()
    return everything, rates


def summarise(everything: Sequence[Taken], rates: Sequence[float]) -> list[Measurement]:
    """Return the measurements of `take_turns`, whose editors must be closed by now.

    Raises BackendError if the yardstick of a GPU fails.
    """
    if everything[-1].contestant.editor.provider == "cuda":
        rates = [product_rate("cuda")]
    rate = statistics.median(rates) if rates else None
    return [_measurement(taken, everything[0], rate) for taken in everything]


def versions_of(backends: Iterable[BackendSpec[Any]]) -> dict[str, str]:
    """Return the versions of the installed packages that backends run with."""
    found = installed()
    return {name: found[name] for spec in backends for name in spec.packages if name in found}


def _option(editor: Editor, name: str) -> Any:
    """Return an option that an editor's backend was opened with; None if it has none such."""
    return getattr(editor.chosen and editor.chosen.options, name, None)


def _times(base: Spread, own: Spread) -> float | None:
    """Return how many times as fast; None if the clock saw no time pass, as coarse ones do."""
    return base.median / own.median if own.median else None


def _measurement(taken: Taken, base: Taken, rate: float | None) -> Measurement:
    editor = taken.contestant.editor
    variant = editor.variant
    wall, cpu = _seconds(taken.edits)
    base_wall, base_cpu = _seconds(base.edits)
    is_base = taken is base
    stages = (name for name in taken.stages[0].timings if name != TEXT or name in variant.graphs)
    return Measurement(
        name=taken.contestant.name,
        dial=taken.dial,
        variant=variant.name,
        digest=editor.bundle.digest,
        precision=taken.contestant.precision,
        provider=editor.provider,
        offload=_option(editor, "offload"),
        batch=variant.batch,
        random_text=TEXT not in variant.graphs,
        product_rate=rate,
        wall=wall,
        cpu=cpu,
        faster=None if is_base else _times(base_wall, wall),
        faster_cpu=None if is_base else _times(base_cpu, cpu),
        differing=None if is_base else _share_differing(taken, base),
        stages=tuple(_stage(name, taken, base, rate) for name in stages),
        process=None,
    )


def _stage(name: str, taken: Taken, base: Taken, rate: float | None) -> StageMeasurement:
    editor = taken.contestant.editor
    wall, cpu = _seconds(taken.stages, name)
    flops = product_flops(name, editor.bundle.manifest.model, editor.variant, taken.rows(name))
    speed = None if flops is None else flops / wall.median
    compared = taken is not base and name in base.stages[0].timings
    return StageMeasurement(
        name=name,
        wall=wall,
        cpu=cpu,
        flops=flops,
        rate=speed,
        share=None if speed is None or rate is None else speed / rate,
        faster=_times(_seconds(base.stages, name)[0], wall) if compared else None,
    )


def _seconds(results: Sequence[EditResult], stage: str | None = None) -> tuple[Spread, Spread]:
    """Return the seconds of a stage, or of whole edits: of the wall clock, and of all threads."""
    clocks = [one.timings for one in results], [one.cpu_timings for one in results]
    wall, cpu = (
        Spread.of([sum(of.values()) if stage is None else of[stage] for of in clock])
        for clock in clocks
    )
    return wall, cpu


def _share_differing(taken: Taken, base: Taken) -> float | None:
    """Return the share of the pictures' values that differ; None if their sizes do."""
    ours, theirs = (
        np.array([np.asarray(result.image) for result in one.contestant.first[one.dial]])
        for one in (taken, base)
    )
    return float(np.mean(ours != theirs)) if ours.shape == theirs.shape else None


def check_repeat(repeat: int) -> None:
    """Raise ConfigError unless a number of edits is at least 1."""
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}; it must be at least 1")


def memory_in_use() -> int | None:
    """Return this process's proportional set size in bytes; None if the system does not report it.

    A page that several processes share counts in proportion in each.
    """
    try:
        lines = ROLLUP.read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample `memory_in_use` during the context; the list is complete when it has ended."""
    samples: list[int] = []
    ended = Event()

    def sample() -> None:
        while (used := memory_in_use()) is not None:
            samples.append(used)
            if ended.wait(SAMPLE_SECONDS):
                break

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def product_rate(provider: str, threads: int | None = None) -> float:
    """Measure the median rate of a large square fp32 matrix product, in operations per second."""
    size = PRODUCT_SIZES[provider]
    session = Session("matrix product", PRODUCT.read_bytes(), Path(), provider, threads or 0)
    buffers = {name: Buffer((size, size), "float32", provider) for name in "abc"}
    for name in "ab":
        buffers[name].fill(0.5)
    inputs = {name: buffers[name].part() for name in "ab"}
    seconds = []
    for _ in range(PRODUCT_RUNS + 1):
        start = perf_counter()
        session.run(inputs, {"c": buffers["c"].part()})
        seconds.append(perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def product_flops(stage: str, model: Model, variant: Variant, rows: int) -> int | None:
    """Count the operations in matrix products of the prefill or a scale; None for other stages.

    They are those of the model, however its graphs compute it, with texts of the full length.

    Per token and block: 2 · (weights of the linear layers) + 4 · C · (keys seen, text included).
    """
    scale, width = scale_of(stage), model.width
    if scale is None and stage != "prefill":
        return None
    sizes = scale_sizes(variant.grids, scale, model.conditioning)
    tokens = sizes["h"] * sizes["w"]
    seen = [sizes["past"] + tokens] * model.depth
    if model.conditioning == "sar":
        seen[0] = sizes["reference"] + sizes["past_0"] + tokens
    mlp = round(4 * width / 256) * 256
    linear = 2 * (6 * width**2 + 2 * width * mlp)
    blocks = sum(linear + 4 * width * (keys + variant.text_tokens) for keys in seen)
    return rows * tokens * blocks


def synthetic_picture(variant: Variant, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*variant.picture, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _memory(
    bundle: Bundle,
    offload: str | None,
    before: int | None,
    opened: int | None,
    peak: int | None,
    after: int | None,
    buffers: int,
) -> MemoryUse:
    """Say what memory is used for. after: what is held after the edit."""
    files = bundle.manifest.files
    stored = {name: files[weights_file(name)].size for name in bundle.components}
    weights = sum(stored.values()) - (stored.get(TEXT, 0) if offload else 0)
    disk = sum(entry.size for entry in files.values())
    disk += bundle.held[MANIFEST].size + len(digest_line(bundle.digest))
    activations = None if peak is None or after is None else max(peak - after, 0)
    held = None if peak is None or activations is None else peak - buffers - activations
    return MemoryUse(
        before,
        opened,
        peak,
        activations,
        weights,
        buffers,
        disk,
        peak_ratio=None if peak is None else peak / weights,
        held_ratio=None if held is None else held / weights,
        disk_ratio=disk / sum(stored.values()),
    )

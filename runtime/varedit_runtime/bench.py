"""Measure a bundle on this machine: the time of every stage and scale, start-up, and memory.

The yardstick is one large fp32 matrix product, measured in the same run on the same provider and
threads of ONNX Runtime: a stage that reaches the product's rate in its own products has a share
of 1. So a share says how much a faster implementation could gain.
"""

import json
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AUTO, AutoBackend
from varedit_runtime.backends.machine import return_freed_memory
from varedit_runtime.backends.onnxruntime.backend import Buffer, Session
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.bundle import Bundle, digest_line
from varedit_runtime.editing.editor import WHOLE_EDIT, Editor, OnScale
from varedit_runtime.editing.random_text import SAID, with_any_text
from varedit_runtime.errors import ConfigError, readable_size
from varedit_runtime.files import atomic_file, unwritable
from varedit_runtime.geometry import scale_sizes
from varedit_runtime.manifest import MANIFEST, Model, Variant, scale_of, weights_file

INSTRUCTION = "add a hat"
PRODUCT_SIZES = {"cpu": 1024, "cuda": 8192}
PRODUCT_RUNS = 10
# ONNX: c = a @ b on square fp32 matrices of any size; tests/product_graph.py writes it.
PRODUCT = Path(__file__).with_name("product.onnx")
SAMPLE_SECONDS = 0.02  # between two samples of the memory in use
ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and their lower and upper quartile."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, lower, upper)


@dataclass(frozen=True)
class StageMeasurement:
    """A stage's measurements.

    seconds: per batch, including the host's work for the stage. flops: floating-point operations of
    its matrix products, if counted. share: its rate, relative to the yardstick's.
    """

    name: str
    seconds: Spread
    flops: int | None
    share: float | None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of the process: its proportional set size, None if the system does not report it.

    before: with Python and libraries alone. opened: with the bundle. peak: during an edit.
    activations: the peak minus what is held after the edit; graphs free their activations after a
    run, and the allocator is asked to return them. weights: their files. buffers: caches and
    tensors between graphs, by their shapes. disk: all files of the bundle.

    Ratios are relative to weights. peak_ratio: of the peak. held_ratio: of the peak without buffers
    and activations. disk_ratio: of the disk.
    """

    before: int | None
    opened: int | None
    peak: int | None
    activations: int | None
    weights: int
    buffers: int
    disk: int
    peak_ratio: float | None
    held_ratio: float | None
    disk_ratio: float


@dataclass(frozen=True)
class BenchReport:
    """The result of `measure_bundle`, in seconds, bytes, and floating-point operations per second.

    memory: of the process, on the host. gpu_memory: what engines take of the GPU's memory.
    random_text: whether the bundle has no text encoder, and random features took its place.
    """

    bundle: str
    digest: str
    variant: str
    random_text: bool
    precision: str
    batch: int
    provider: str
    threads: int | None
    cores: int | None
    onnxruntime: str
    repeat: int
    open_seconds: float
    first_edit_seconds: float
    edit_seconds: Spread
    stages: tuple[StageMeasurement, ...]
    product_rate: float | None
    memory: MemoryUse
    gpu_memory: int | None


def measure_bundle(
    bundle: str | os.PathLike[str],
    repeat: int,
    backend: str | ChosenBackend | AutoBackend = AUTO,
    variant: str | None = None,
) -> BenchReport:
    """Open a bundle and edit a synthetic picture: once to warm up, then `repeat` times.

    backend, variant: as for `Editor.open`. If an edit is one launch, as many edits run stage by
    stage as well. Raises what `Editor.open` raises, and ConfigError if repeat is less than 1.
    """
    check_repeat(repeat)
    before = memory_in_use()
    start = perf_counter()
    with Editor.open(bundle, backend=backend, variant=variant) as editor:
        opened_seconds, opened = perf_counter() - start, memory_in_use()
        runs = _run(with_any_text(editor), repeat)
        gpu, buffers = editor.backend.gpu_memory, editor.backend.buffer_bytes
    provider = editor.provider
    threads = getattr(editor.chosen and editor.chosen.options, "threads", None)
    rate = product_rate(provider, threads) if provider in PRODUCT_SIZES else None
    manifest, measured = editor.bundle.manifest, editor.variant
    return BenchReport(
        bundle=str(editor.bundle.path),
        digest=editor.bundle.digest,
        variant=measured.name,
        random_text=TEXT not in measured.graphs,
        precision=manifest.precision,
        batch=measured.batch,
        provider=provider,
        threads=threads,
        cores=os.cpu_count(),
        onnxruntime=ort.__version__,
        repeat=repeat,
        open_seconds=opened_seconds,
        first_edit_seconds=runs.first_seconds,
        edit_seconds=Spread.of([sum(timings.values()) for timings in runs.edits]),
        stages=tuple(
            _stage(name, [timings[name] for timings in runs.stages], manifest.model, measured, rate)
            for name in stages_of(runs.stages[0], measured)
        ),
        product_rate=rate,
        memory=_memory(editor.bundle, before, opened, runs, 0 if gpu else buffers),
        gpu_memory=gpu,
    )


@dataclass(frozen=True)
class _Runs:
    """The edits of a measurement.

    samples: `memory_in_use` during the first edit. after: the same when it had ended. edits,
    stages: seconds by stage of every later edit, and of every edit that ran stage by stage.
    """

    first_seconds: float
    samples: Sequence[int]
    after: int | None
    edits: Sequence[Mapping[str, float]]
    stages: Sequence[Mapping[str, float]]


def _run(editor: Editor, repeat: int) -> _Runs:
    """Edit once to warm up, then `repeat` times, and as often by stages if they differ."""
    pictures = [synthetic_picture(editor.variant)] * editor.variant.batch

    def edit(on_scale: OnScale | None = None) -> Mapping[str, float]:
        editor.forget()
        return editor.edit(pictures, INSTRUCTION, seed=0, on_scale=on_scale)[0].timings

    start = perf_counter()
    with peak_memory() as samples:
        edit()
    first_seconds = perf_counter() - start
    return_freed_memory()
    after = memory_in_use()
    edits = stages = [edit() for _ in range(repeat)]
    if WHOLE_EDIT in edits[0]:
        stages = [edit(on_scale=lambda progress: None) for _ in range(repeat)]
    return _Runs(first_seconds, samples, after, edits, stages)


def report_table(report: BenchReport) -> str:
    """Format a report as a table for people."""
    cores = f"{report.cores} cores" if report.threads is None else f"{report.threads} threads"
    lines = [
        f"{report.bundle}: {report.variant}, {report.precision}, batch {report.batch}",
        f"onnxruntime {report.onnxruntime}, {report.provider}, {cores}; median of {report.repeat}",
        *([SAID] if report.random_text else []),
        "",
        f"{'stage':<16}{'median ms':>12}{'quartiles ms':>22}{'of product rate':>18}",
    ]
    for stage in report.stages:
        share = "" if stage.share is None else f"{stage.share:.0%}"
        lines.append(f"{stage.name:<16}{milliseconds(stage.seconds)}{share:>18}")
    lines += [
        f"{'edit':<16}{milliseconds(report.edit_seconds)}",
        "",
        f"start-up         {report.open_seconds:.2f} s, the first edit "
        f"{report.first_edit_seconds:.2f} s",
    ]
    if report.product_rate is not None:
        lines.append(f"matrix product   {report.product_rate / 1e9:.1f} GFLOP/s in fp32")
    lines += memory_lines(report.memory)
    if report.gpu_memory is not None:
        lines.append(
            f"GPU memory       {readable_size(report.gpu_memory)}, and what the driver takes"
        )
    return "\n".join(lines)


def memory_lines(memory: MemoryUse) -> list[str]:
    """Describe memory and disk for people, by use."""
    lines = [f"memory           {_process(memory)}"]
    if memory.peak_ratio is not None and memory.held_ratio is not None:
        lines.append(
            f"                 peak {memory.peak_ratio:.2f} x weights, without caches and "
            f"activations {memory.held_ratio:.2f} x"
        )
    lines.append(
        f"disk             {readable_size(memory.disk)}, {memory.disk_ratio:.3f} x weights"
    )
    return lines


def check_repeat(repeat: int) -> None:
    """Raise ConfigError unless a number of edits is at least 1."""
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}; it must be at least 1")


def check_report(path: Path) -> None:
    """Raise ConfigError, before work is spent, if a report cannot be written there.

    A report replaces a file only if its name ends in .json, so never a picture or a text.
    """
    why = unwritable(path)
    if why is None and os.path.lexists(path) and not _is_json(path):
        why = "it exists, and a report replaces only files that end in .json; choose another name"
    if why is not None:
        raise ConfigError(f"{path} cannot be written: {why}")


def write_report(report: Any, path: Path) -> None:
    """Write a report of JSON values, whole or not at all. Raises ConfigError if that fails."""
    try:
        with atomic_file(path, replace=_is_json(path)) as whole:
            whole.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


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


def product_flops(stage: str, model: Model, variant: Variant) -> int | None:
    """Count the operations in matrix products of the prefill or a scale; None for other stages.

    Per token and block: 2 · (weights of the linear layers) + 4 · C · (keys seen, text included).
    """
    scale, width = scale_of(stage), model.width
    if scale is None and stage != "prefill":
        return None
    sizes = scale_sizes(variant.grids, scale)
    tokens = sizes["h"] * sizes["w"]
    seen = [sizes["past"] + tokens] * model.depth
    if model.conditioning == "sar":
        seen[0] = sizes["reference"] + sizes["past_0"] + tokens
    mlp = round(4 * width / 256) * 256
    linear = 2 * (6 * width**2 + 2 * width * mlp)
    blocks = sum(linear + 4 * width * (keys + variant.text_tokens) for keys in seen)
    return variant.rows * tokens * blocks


def _stage(
    name: str, seconds: Sequence[float], model: Model, variant: Variant, rate: float | None
) -> StageMeasurement:
    spread, flops = Spread.of(seconds), product_flops(name, model, variant)
    share = None if flops is None or rate is None else flops / spread.median / rate
    return StageMeasurement(name, spread, flops, share)


def stages_of(timings: Iterable[str], variant: Variant) -> list[str]:
    """Return the stages among an edit's timings, without a text encoder that does not exist."""
    return [name for name in timings if name != TEXT or name in variant.graphs]


def synthetic_picture(variant: Variant) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*variant.picture, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def milliseconds(seconds: Spread) -> str:
    quartiles = f"{seconds.lower * 1e3:.1f} - {seconds.upper * 1e3:.1f}"
    return f"{seconds.median * 1e3:>12.1f}{quartiles:>22}"


def _memory(
    bundle: Bundle, before: int | None, opened: int | None, runs: _Runs, buffers: int
) -> MemoryUse:
    files = bundle.manifest.files
    weights = sum(files[weights_file(name)].size for name in bundle.components)
    disk = sum(entry.size for entry in files.values())
    disk += bundle.held[MANIFEST].size + len(digest_line(bundle.digest))
    peak = max(runs.samples, default=None)
    activations = None if peak is None or runs.after is None else max(peak - runs.after, 0)
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
        disk_ratio=disk / weights,
    )


def _process(memory: MemoryUse) -> str:
    parts = f"weights {readable_size(memory.weights)}, caches {readable_size(memory.buffers)}"
    if memory.peak is None or memory.activations is None or memory.before is None:
        return f"{parts}; this system does not report the process's memory"
    parts += f", activations {readable_size(memory.activations)}"
    known = memory.before + memory.weights + memory.buffers + memory.activations
    return (
        f"peak {readable_size(memory.peak)}: before opening {readable_size(memory.before)}, "
        f"{parts}, all else {readable_size(max(memory.peak - known, 0))}"
    )

"""What a benchmark measured: one tree of structs, written as JSON and shown as tables.

docs/bench.schema.json is the JSON Schema of `Report`.
"""

import inspect
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from varedit_runtime.editing.random_text import SAID
from varedit_runtime.errors import readable_size

CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that decide how fast matrix products are, on x86 and on ARM.
SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")

Dial = Literal["further", "fast", "unguided"]


class Spread(Struct, frozen=True):
    """The median of repeated measurements, and their lower and upper quartile."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, lower, upper)


class Processor(Struct, frozen=True):
    """The processor, its instruction sets among `SETS`, and its number of cores.

    load: how many processes ran or waited in the minute before, on average; None if the system does
    not report it.
    """

    processor: str
    instruction_sets: tuple[str, ...]
    cores: int | None
    load: float | None

    @classmethod
    def detect(cls) -> "Processor":
        facts = {}
        with suppress(OSError):  # it is Linux's, and may be closed to this user
            text = CPUINFO.read_text(encoding="utf-8", errors="replace")
            lines = (line.partition(":") for line in text.splitlines())
            facts = {name.strip(): value.strip() for name, _, value in lines}
        name = facts.get("model name") or platform.processor() or platform.machine()
        flags = (facts.get("flags") or facts.get("Features") or "").split()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls(name, tuple(s for s in SETS if s in flags), os.cpu_count(), load)


class StageMeasurement(Struct, frozen=True, kw_only=True):
    """A stage's measurements.

    wall, cpu: seconds per batch, including the host's work for the stage; cpu: of all threads
    together. flops: floating-point operations of the model's matrix products, if counted. rate:
    flops per second of the wall clock. share: the rate relative to the product's. faster: how many
    times as fast as in the first measurement of the variant, in seconds of the wall clock.
    """

    name: str
    wall: Spread
    cpu: Spread
    flops: int | None
    rate: float | None
    share: float | None
    faster: float | None


class MemoryUse(Struct, frozen=True):
    """Bytes of the process: its proportional set size, None if the system does not report it.

    before: with Python and libraries alone. opened: with the bundle. peak: during an edit.
    activations: the peak minus what is held after the edit; graphs free their activations after a
    run, and the allocator is asked to return them. weights: their files, without the text encoder's
    if it is offloaded. buffers: caches and tensors between graphs, by their shapes. disk: all files
    of the bundle.

    Ratios are relative to weights. peak_ratio: of the peak. held_ratio: of the peak without buffers
    and activations. disk_ratio: of the disk, to all weights.
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


class Process(Struct, frozen=True):
    """A process that opened a bundle and edited.

    memory: of the process, on the host. gpu_memory: bytes that engines take of the GPU's memory.
    """

    open_seconds: float
    first_edit_seconds: float
    memory: MemoryUse
    gpu_memory: int | None


class Measurement(Struct, frozen=True, kw_only=True):
    """Edits of one kind, by a bundle or by the reference.

    name: the bundle as it was named, or "reference", which has the bundle's weights. dial: how an
    edit was made faster; None for a whole edit with the model's own guidance. offload: "text" if
    the text encoder's weights were held only while it ran. random_text: whether the bundle has no
    text encoder, and random features took its place. product_rate: operations per second of a large
    fp32 matrix product, measured in the same turns; on a GPU once, after them. wall, cpu: seconds
    per batch; cpu: of all threads together. faster, faster_cpu: how many times as fast as the first
    measurement of the variant, by either clock; None if that clock is too coarse to tell.
    differing: the share of the pictures' values that differ from that one's. process: measured in a
    process of its own; None for the reference.
    """

    name: str
    dial: Dial | None
    variant: str
    digest: str
    precision: str
    provider: str
    offload: str | None
    batch: int
    random_text: bool
    product_rate: float | None
    wall: Spread
    cpu: Spread
    faster: float | None
    faster_cpu: float | None
    differing: float | None
    stages: tuple[StageMeasurement, ...]
    process: Process | None


class Growth(Struct, frozen=True):
    """How an edit's time grows with its tokens over a bundle's variants: tokens to the exponent."""

    name: str
    dial: Dial | None
    exponent: float


class BatchCost(Struct, frozen=True):
    """Edits of a number of pictures at a time. wall, cpu: seconds a picture."""

    pictures: int
    wall: Spread
    cpu: Spread


class Report(Struct, frozen=True, kw_only=True):
    """The result of a benchmark.

    threads: of each; None for one per core. versions: of the packages that computed. repeat: how
    often each measurement was repeated. growth: empty without variants of several resolutions.
    batches: of the first bundle, where they were asked for.
    """

    schema_version: Literal[1] = 1
    machine: Processor
    threads: int | None
    versions: dict[str, str]
    repeat: int
    measurements: tuple[Measurement, ...]
    growth: tuple[Growth, ...] = ()
    batches: tuple[BatchCost, ...] = ()


def schema() -> bytes:
    """Return the JSON Schema of `Report`."""
    described = msgspec.json.schema(Report)
    for struct in described["$defs"].values():  # Python before 3.13 keeps docstrings' indentation
        struct["description"] = inspect.cleandoc(struct["description"])
    return msgspec.json.format(msgspec.json.encode(described), indent=1) + b"\n"


def report_table(report: Report) -> str:
    """Format a report as tables for people."""
    machine, threads = report.machine, report.threads or "all"
    sets = f" ({', '.join(machine.instruction_sets)})" if machine.instruction_sets else ""
    load = "" if machine.load is None else f", load {machine.load:.1f}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    how = (versions, f"{threads} threads", f"median of {report.repeat}, in turns")
    lines = [
        f"{machine.processor}{sets}, {machine.cores} cores{load}",
        "; ".join(filter(None, how)),
    ]
    for measured in report.measurements:
        lines += ["", *_measurement(measured)]
    if len(report.measurements) > 1:
        lines += ["", *_comparison(report.measurements)]
    lines += [f"{_title(g.name, g.dial)} grows with tokens^{g.exponent:.2f}" for g in report.growth]
    if report.batches:
        lines += ["", f"{'pictures at once':<16}{'ms a picture':>13}{'CPU ms a picture':>18}"]
    for one in report.batches:
        wall, cpu = (clock.median * 1e3 for clock in (one.wall, one.cpu))
        lines.append(f"{one.pictures:<16}{wall:>13.1f}{cpu:>18.1f}")
    return "\n".join(lines)


def _title(name: str, dial: Dial | None) -> str:
    return name if dial is None else f"{name}, {dial}"


def _measurement(measured: Measurement) -> Iterator[str]:
    yield (
        f"{_title(measured.name, measured.dial)}: {measured.variant}, {measured.precision}, "
        f"{measured.provider}, batch {measured.batch}"
        + (f", offload {measured.offload}" if measured.offload else "")
    )
    if measured.random_text:
        yield SAID
    yield (
        f"{'stage':<16}{'ms':>10}{'quartiles':>19}{'CPU ms':>10}{'GFLOP/s':>9}"
        f"{'of product rate':>17}{'faster':>9}"
    )
    for stage in measured.stages:
        rate = "" if stage.rate is None else f"{stage.rate / 1e9:.1f}"
        share = "" if stage.share is None else f"{stage.share:.0%}"
        yield f"{_times(stage.name, stage)}{rate:>9}{share:>17}{_faster(stage.faster)}"
    yield f"{_times('edit', measured)}{'':26}{_faster(measured.faster)}"
    if measured.product_rate is not None:
        yield f"{'matrix product':<16}{measured.product_rate / 1e9:>48.1f}"
    if measured.process is not None:
        yield from _process(measured.process)


def _times(name: str, taken: StageMeasurement | Measurement) -> str:
    wall, quartiles = taken.wall, f"{taken.wall.lower * 1e3:.1f} - {taken.wall.upper * 1e3:.1f}"
    return f"{name:<16}{wall.median * 1e3:>10.1f}{quartiles:>19}{taken.cpu.median * 1e3:>10.1f}"


def _faster(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:>8.2f}x"


def _comparison(measurements: Sequence[Measurement]) -> Iterator[str]:
    titles = [f"{_title(m.name, m.dial)}, {m.variant}" for m in measurements]
    wide = max(map(len, titles))
    yield f"{'':<{wide}}{'s':>9}{'CPU s':>9}{'faster':>9}{'by CPU s':>10}{'pictures differ':>17}"
    for title, one in zip(titles, measurements, strict=True):
        differing = "" if one.differing is None else f"{one.differing:.2%}"
        yield (
            f"{title:<{wide}}{one.wall.median:>9.2f}{one.cpu.median:>9.2f}"
            f"{_faster(one.faster):>9}{_faster(one.faster_cpu):>10}{differing:>17}"
        ).rstrip()


def _process(process: Process) -> Iterator[str]:
    yield (
        f"start-up         {process.open_seconds:.2f} s, the first edit "
        f"{process.first_edit_seconds:.2f} s"
    )
    memory = process.memory
    yield f"memory           {_uses(memory)}"
    if memory.peak_ratio is not None and memory.held_ratio is not None:
        yield (
            f"                 peak {memory.peak_ratio:.2f} x weights, without caches and "
            f"activations {memory.held_ratio:.2f} x"
        )
    if process.gpu_memory is not None:
        yield f"GPU memory       {readable_size(process.gpu_memory)}, and what the driver takes"
    yield f"disk             {readable_size(memory.disk)}, {memory.disk_ratio:.3f} x weights"


def _uses(memory: MemoryUse) -> str:
    parts = f"weights {readable_size(memory.weights)}, caches {readable_size(memory.buffers)}"
    if memory.peak is None or memory.activations is None or memory.before is None:
        return f"{parts}; this system does not report the process's memory"
    parts += f", activations {readable_size(memory.activations)}"
    known = memory.before + memory.weights + memory.buffers + memory.activations
    return (
        f"peak {readable_size(memory.peak)}: before opening {readable_size(memory.before)}, "
        f"{parts}, all else {readable_size(max(memory.peak - known, 0))}"
    )

"""Measure a bundle against the reference, in turns: time, memory and disk.

Both edit one picture with the same weights, seeds and noise, on as many threads. The memory is of
the runtime alone, in a process of its own, as the process of the reference holds PyTorch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from varedit_export.manifest_model import sources_of
from varedit_export.parity.reference_backend import Reference, ReferenceBackend
from varedit_runtime.backends import choose
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.bench import (
    INSTRUCTION,
    MemoryUse,
    Spread,
    check_repeat,
    memory_lines,
    milliseconds,
    stages_of,
    synthetic_picture,
)
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor, EditResult, read_instructions
from varedit_runtime.editing.random_text import SAID, with_any_text
from varedit_runtime.errors import BackendError

# Results of the same edits, the reference's first.
Turn = tuple[Sequence[EditResult], Sequence[EditResult]]
RUNTIME = "from varedit_runtime.cli import main; main()"


@dataclass(frozen=True)
class TimeComparison:
    """Seconds per batch of both. ratio: the reference's median over the bundle's."""

    name: str
    reference: Spread
    bundle: Spread
    ratio: float


@dataclass(frozen=True)
class ComparisonReport:
    """The result of `measure_both`.

    differing: the share of the pictures' values that differ. random_text: whether the bundle has no
    text encoder, and random features took its place in both.
    """

    bundle: str
    digest: str
    variant: str
    random_text: bool
    precision: str
    batch: int
    threads: int
    cores: int | None
    onnxruntime: str
    torch: str
    repeat: int
    edit: TimeComparison
    stages: tuple[TimeComparison, ...]
    differing: float
    memory: MemoryUse


def measure_both(
    path: Path, repeat: int, threads: int | None = None, variant: str | None = None
) -> ComparisonReport:
    """Edit a synthetic picture with both: once to warm up, then `repeat` times in turns.

    Raises what `Editor.open` raises, BackendError if the runtime fails in the process that measures
    its memory, and ConfigError on repeat or threads out of range.
    """
    check_repeat(repeat)
    count = (os.cpu_count() or 1) if threads is None else threads
    choose("onnxruntime", threads=count)
    bundle = Bundle.open(path)
    chosen = bundle.manifest.variant(variant)
    # Measured before this process holds pages of the same files.
    memory = measure_memory(path, count, chosen.name)
    with Editor.open(path, threads=count, variant=chosen.name) as editor, torch_threads(count):
        turns = list(_turns(editor, repeat))
    bundle.check_stands()  # it was opened several times, and read by its path
    warm, *timed = turns
    return ComparisonReport(
        bundle=str(bundle.path),
        digest=bundle.digest,
        variant=editor.variant.name,
        random_text=TEXT not in chosen.graphs,
        precision=bundle.manifest.precision,
        batch=editor.variant.batch,
        threads=count,
        cores=os.cpu_count(),
        onnxruntime=ort.__version__,
        torch=torch.__version__,
        repeat=repeat,
        edit=_compare("edit", timed, lambda seconds: sum(seconds.values())),
        stages=tuple(
            _compare(name, timed, lambda seconds, name=name: seconds[name])
            for name in stages_of(warm[0][0].timings, chosen)
        ),
        differing=_share_differing(*warm),
        memory=memory,
    )


def comparison_table(report: ComparisonReport) -> str:
    """Format a report as a table for people."""
    lines = [
        f"{report.bundle}: {report.variant}, {report.precision}, batch {report.batch}",
        f"PyTorch {report.torch}, eager, fp32, and onnxruntime {report.onnxruntime}; "
        f"{report.threads} threads; median of {report.repeat}, in turns",
        *([SAID] if report.random_text else []),
        "",
        f"{'stage':<16}{'reference ms':>12}{'quartiles ms':>22}{'bundle ms':>12}"
        f"{'quartiles ms':>22}{'ratio':>8}",
    ]
    for row in (*report.stages, report.edit):
        seconds = f"{milliseconds(row.reference)}{milliseconds(row.bundle)}"
        lines.append(f"{row.name:<16}{seconds}{row.ratio:>7.2f}x")
    lines += [
        "",
        f"pictures         {report.differing:.2%} of values differ",
        *memory_lines(report.memory),
    ]
    return "\n".join(lines)


def measure_memory(path: Path, threads: int, variant: str) -> MemoryUse:
    """Measure memory with `varedit-run bench`, in a process without PyTorch.

    Raises BackendError, with its message, if it fails.
    """
    with TemporaryDirectory(prefix="varedit-bench-") as folder:
        file = Path(folder) / "report.json"
        options = ["--repeat", "1", "--threads", str(threads), "--json", str(file)]
        options += ["--variant", variant]
        done = subprocess.run(
            [sys.executable, "-c", RUNTIME, "bench", os.path.abspath(path), *options],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise BackendError(f"`varedit-run bench {path}` failed: {said[-1]}")
        return MemoryUse(**json.loads(file.read_bytes())["memory"])


def open_reference(editor: Editor) -> Editor:
    """Open a bundle a second time, for PyTorch to edit with: the same weights, eager, in fp32."""
    reference = Reference.from_sources(*sources_of(editor.bundle)).of(editor.variant)
    backend, instructions = ReferenceBackend(reference, editor.variant), None
    _lay_out(reference.transformer)
    _lay_out(reference.tokenizer)
    if reference.text is not None:
        _lay_out(backend.text_encoder)
        instructions = read_instructions(editor.bundle, editor.variant.text_tokens)
    return Editor(editor.bundle, editor.variant, backend, instructions)


def _turns(editor: Editor, repeat: int) -> Iterator[Turn]:
    """Edit with both, the reference first; the first turn is a warm-up."""
    picture, batch = synthetic_picture(editor.variant), editor.variant.batch
    with open_reference(editor) as reference:
        both = with_any_text(reference), with_any_text(editor)
        for _ in range(repeat + 1):
            for one in both:
                one.forget()
            theirs, ours = (
                one.edit([picture] * batch, INSTRUCTION, seed=list(range(batch))) for one in both
            )
            yield theirs, ours


def _compare(
    name: str, turns: Sequence[Turn], seconds: Callable[[Mapping[str, float]], float]
) -> TimeComparison:
    theirs, ours = (
        Spread.of([seconds(results[0].timings) for results in side])
        for side in zip(*turns, strict=True)
    )
    return TimeComparison(name, theirs, ours, theirs.median / ours.median)


def _share_differing(one: Sequence[EditResult], other: Sequence[EditResult]) -> float:
    pairs = zip(one, other, strict=True)
    return float(np.mean([np.asarray(a.image) != np.asarray(b.image) for a, b in pairs]))


def _lay_out(module: nn.Module) -> None:
    """Copy weights into rows: restored ones are transposed views of the graphs', which are slow."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

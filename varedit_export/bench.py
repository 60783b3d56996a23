"""Measure a bundle against the reference, other bundles or other backends: all in turns.

They edit one picture with the same seeds and noise, in one process. The memory is of the runtime
alone, in processes of its own, as the process of the reference holds PyTorch.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch

from varedit_export.manifest_model import sources_of
from varedit_export.parity.reference_backend import Reference, ReferenceBackend, make_contiguous
from varedit_runtime.backends import DEFAULT, find_backend
from varedit_runtime.bench import Contestant, check_repeat, summarise, take_turns, versions_of
from varedit_runtime.bench_report import Dial, Growth, Measurement, Process, Processor, Report
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.random_text import with_any_text
from varedit_runtime.errors import BackendError, BundleError, ConfigError, printable
from varedit_runtime.geometry import source_grid
from varedit_runtime.grids import Conditioning
from varedit_runtime.manifest import Variant

REFERENCE = "reference"
ALL = "all"
RUNTIME = "from varedit_runtime.cli import main; main()"


@dataclass(frozen=True)
class Entrant:
    """A bundle, and the backend that runs it, or REFERENCE."""

    bundle: Path
    backend: str = DEFAULT

    @property
    def name(self) -> str:
        """What a report calls it."""
        if self.backend == REFERENCE:
            return REFERENCE
        return printable(str(self.bundle)) + f", {self.backend}" * (self.backend != DEFAULT)


def entrants(bundle: Path, against: Sequence[str | Path]) -> list[Entrant]:
    """Return what is compared, the bundle last.

    against: a backend or REFERENCE, which take this bundle, or the folder of another bundle.
    """
    others = (
        Entrant(bundle, other) if isinstance(other, str) else Entrant(other) for other in against
    )
    return [*others, Entrant(bundle)]


def measure_all(
    compared: Sequence[Entrant],
    repeat: int,
    threads: int | None = None,
    variant: str | None = None,
    dials: Sequence[Dial] = (),
) -> Report:
    """Edit a synthetic picture with all of them: once to warm up, then `repeat` times in turns.

    variant: a name that all bundles have, by default the last one's first; ALL for all of that one.
    dials: see `Contestant`; the reference is measured without. Raises what `Editor.open` raises,
    BackendError if the runtime fails in a process that measures memory, and ConfigError on repeat
    or threads out of range, or if something is compared twice.
    """
    check_repeat(repeat)
    _check_names([one.name for one in compared])
    machine = Processor.detect()
    count = (os.cpu_count() or 1) if threads is None else threads
    bundles = [Bundle.open(one.bundle) for one in compared]
    variants = _variants(bundles, variant)
    measurements: list[Measurement] = []
    for one in variants:
        measurements += _measure_variant(compared, repeat, count, one.name, dials)
    for bundle in bundles:
        bundle.check_stands()  # it was opened several times, and read by its path
    versions = versions_of(find_backend(x.backend) for x in compared if x.backend != REFERENCE)
    if any(one.backend == REFERENCE for one in compared):
        versions["torch"] = str(torch.__version__)
    return Report(
        machine=machine,
        threads=count,
        versions=versions,
        repeat=repeat,
        measurements=tuple(measurements),
        growth=tuple(_growths(measurements, variants, bundles[-1].manifest.model.conditioning)),
    )


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{name} is compared with itself: name each bundle and backend once; a bundle runs "
                f"in {DEFAULT} unless another is named"
            )


def _variants(bundles: Sequence[Bundle], wanted: str | None) -> Sequence[Variant]:
    """Return the variants to measure. Raises BundleError if one of the bundles lacks any."""
    last = bundles[-1].manifest
    variants = last.variants if wanted == ALL else (last.variant(wanted),)
    for bundle in bundles:
        for one in variants:
            try:
                bundle.manifest.variant(one.name)
            except BundleError as error:
                raise BundleError(f"{bundle.path}: {error}") from error
    return variants


def _measure_variant(
    compared: Sequence[Entrant], repeat: int, threads: int, variant: str, dials: Sequence[Dial]
) -> Iterator[Measurement]:
    # Measured before this process holds pages of the same files.
    processes = {
        one.name: measure_process(one, threads, variant)
        for one in compared
        if one.backend != REFERENCE
    }
    with ExitStack() as stack, torch_threads(threads):
        opened = [stack.enter_context(_open(one, threads, variant)) for one in compared]
        contestants = [
            Contestant(REFERENCE, with_any_text(editor), "fp32")
            if one.backend == REFERENCE
            else Contestant(
                one.name, with_any_text(editor), editor.bundle.manifest.precision, dials
            )
            for one, editor in zip(compared, opened, strict=True)
        ]
        turns = take_turns(contestants, repeat)
    for measured in summarise(*turns):
        process = processes.get(measured.name) if measured.dial is None else None
        yield msgspec.structs.replace(measured, process=process)


def _open(one: Entrant, threads: int, variant: str) -> Editor:
    if one.backend == REFERENCE:
        bundle = Bundle.open(one.bundle)
        return open_reference(bundle, bundle.manifest.variant(variant))
    own = threads if one.backend == DEFAULT else None
    return Editor.open(one.bundle, backend=one.backend, threads=own, variant=variant)


def _growths(
    measurements: Sequence[Measurement], variants: Sequence[Variant], conditioning: Conditioning
) -> Iterator[Growth]:
    """Fit a power of the tokens of a picture, the source's included, to the seconds of its edit."""
    tokens = {
        one.name: sum(h * w for h, w in (*one.grids, source_grid(one.grids, conditioning)))
        for one in variants
    }
    if len(set(tokens.values())) < 2:
        return
    kinds: dict[tuple[str, Dial | None], list[Measurement]] = {}
    for one in measurements:
        kinds.setdefault((one.name, one.dial), []).append(one)
    for (name, dial), own in kinds.items():
        counts = [log(tokens[one.variant]) for one in own]
        seconds = [log(one.wall.median / one.batch) for one in own]
        yield Growth(name, dial, float(np.polyfit(counts, seconds, 1)[0]))


def measure_process(one: Entrant, threads: int, variant: str) -> Process:
    """Measure start-up and memory with `varedit-run bench`, in a process without PyTorch.

    Raises BackendError, with its message, if it fails.
    """
    with TemporaryDirectory(prefix="varedit-bench-") as folder:
        file = Path(folder) / "report.json"
        options = ["--repeat", "1", "--variant", variant, "--json", str(file)]
        options += ["--backend", one.backend]
        if one.backend == DEFAULT:
            options += ["--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, "-c", RUNTIME, "bench", os.path.abspath(one.bundle), *options],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise BackendError(f"`varedit-run bench {one.bundle}` failed: {said[-1]}")
        (measured,) = msgspec.json.decode(file.read_bytes(), type=Report).measurements
        assert measured.process is not None
        return measured.process


def open_reference(bundle: Bundle, variant: Variant) -> Editor:
    """Open a bundle for PyTorch to edit with: the same weights, eager, in fp32."""
    reference = Reference.from_sources(*sources_of(bundle)).of(variant)
    backend, instructions = ReferenceBackend(reference, variant), None
    make_contiguous(reference.transformer)
    make_contiguous(reference.tokenizer)
    if reference.text is not None:
        make_contiguous(backend.text_encoder)
        instructions = read_instructions(bundle, variant.text_tokens)
    return Editor(bundle, variant, backend, instructions)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

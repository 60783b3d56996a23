"""Builds, verifies and times nano and a full-size 2b on this machine's GPU, and leaves a report.

    python tests/check_gpu.py -o gpu-report            # some minutes, 25 GB of disk
    python tests/check_gpu.py -o gpu-report --model nano
    python tests/check_gpu.py -o gpu-report --part device --part onnxruntime  # without TensorRT

What an earlier call left there is kept: its bundles are used again, and its results stay in the
report unless they are found anew. So the parts can be tried one by one.

The part `device` tries the engines' device under engines that copy: see `check_device.py`. Every
way to run a model is tried in a process of its own, beside eager PyTorch in the same run. What
fails is a line of the report, with its reason and what was found before, and keeps nothing else
from being tried.
"""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from check_device import CHECKS

from varedit_runtime.backends.host import nvidia

MODELS = {
    "nano": ("--size", "nano", "--precision", "fp16"),
    "nano-fp32": ("--size", "nano", "--precision", "fp32"),
    "nano-bf16": ("--size", "nano", "--precision", "bf16"),
    "2b-512": ("--size", "2b", "--res", "512", "--random-weights", "0", "--precision", "fp16"),
}
PROVIDERS = {"nano": ("cuda", "cpu"), "nano-fp32": ("cuda", "cpu"), "2b-512": ("cuda",)}
PARTS = ("device", "onnxruntime", "tensorrt", "tensorrt-rtx")
LAYOUTS = ("external", "profiles", "baked")
REASON = 300  # characters of what a failure said
EAGER = """\
Eager is PyTorch on the GPU; where it has no CUDA, it is not timed. The transformer's attention and
matrix products are in fp16; in fp32 are its residual stream, norms, AdaLN and head, the text
encoder and the picture tokenizer, whose convolutions cuDNN may round to TF32."""


@dataclass
class Way:
    """A way to run a model, and what was found.

    compiling, opening, opening_again (with what the first kept), eager, edit, by_steps: seconds, of
    edits the medians; ratio: eager's to the edit's. Of eager there is nothing where PyTorch has no
    CUDA. plans: bytes; gpu_memory: bytes that the device had less free once it was open. verified:
    whether every measure of parity was within its tolerance; worst: of them. steps: seconds of an
    edit's steps, run one by one. failed: why not, though what was found before is there.
    """

    model: str
    name: str
    compiling: float | None = None
    plans: dict[str, int] = field(default_factory=dict)
    memory: str = ""
    verified: bool | None = None
    worst: str = ""
    opening: float | None = None
    opening_again: float | None = None
    gpu_memory: int | None = None
    eager: float | None = None
    edit: float | None = None
    by_steps: float | None = None
    ratio: float | None = None
    steps: dict[str, float] = field(default_factory=dict)
    failed: str = ""


@click.group(invoke_without_command=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("gpu-report"))
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only these.")
@click.option("--repeat", default=20, show_default=True, help="Edits of each.")
@click.option("--limit", default=1800, show_default=True, help="Seconds of one way at most.")
@click.pass_context
def main(
    context: click.Context,
    output: Path,
    models: tuple[str, ...],
    parts: tuple[str, ...],
    repeat: int,
    limit: int,
) -> None:
    if context.invoked_subcommand is not None:
        return
    output.mkdir(parents=True, exist_ok=True)
    ways = {(way.model, way.name): way for way in _earlier(output)}
    for way in _all(models or tuple(MODELS), parts or PARTS, Trial(output, repeat, limit)):
        times = "holds" if way.edit is None else f"{way.edit:.3f} s an edit"
        click.echo(f"{way.model} {way.name}: {way.failed or times}")
        ways[way.model, way.name] = way
        _write(output, list(ways.values()))  # whatever comes after


def _earlier(output: Path) -> list[Way]:
    """Return the results that are in a folder; none if there is no report of this version."""
    try:
        return [Way(**way) for way in json.loads((output / "report.json").read_text())["ways"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _all(models: Sequence[str], parts: Sequence[str], trial: "Trial") -> Iterator[Way]:
    if "device" in parts:
        script = str(Path(__file__).with_name("check_device.py"))
        for name in CHECKS:
            yield _found(Way("device", name), _run([sys.executable, script, name], trial.limit))
    if parts != ("device",):
        for model in models:
            yield from _ways(model, parts, trial)


@dataclass(frozen=True)
class Trial:
    """Where bundles and the report are, how many edits are timed, and seconds of one way."""

    output: Path
    repeat: int
    limit: int


def _ways(model: str, parts: Sequence[str], trial: Trial) -> Iterator[Way]:
    bundle = trial.output / model
    if not bundle.exists():
        build = ("build", *MODELS[model], "--backend", "onnxruntime", "-o", str(bundle))
        if failed := _said(_export(*build, limit=trial.limit)):
            yield Way(model, "build", failed=failed)
            return
    for provider in PROVIDERS.get(model, ()):  # which computes no bf16
        if "onnxruntime" in parts:
            yield _tried(Way(model, f"onnxruntime {provider}"), bundle, trial)
    for backend in ("tensorrt", "tensorrt-rtx"):
        for layout in LAYOUTS if backend in parts else ():
            yield _compiled(Way(model, f"{backend} {layout}"), bundle, trial)


def _compiled(way: Way, bundle: Path, trial: Trial) -> Way:
    backend, layout = way.name.split()
    start = perf_counter()
    options = ("--backend", backend, "--layout", layout)
    done = _export("engines", str(bundle), *options, limit=trial.limit)
    way.compiling = perf_counter() - start
    if failed := _said(done):
        way.failed = failed
        return way
    return _tried(way, bundle, trial, Path(done.stdout.strip().splitlines()[-1]))


def _tried(way: Way, bundle: Path, trial: Trial, engines: Path | None = None) -> Way:
    """Run one way in its own process, and read what it found."""
    own = [] if engines is None else ["--engines", str(engines)]
    backend = way.name.split()[0]
    provider = ["--provider", way.name.split()[1]] if engines is None else []
    command = [sys.executable, __file__, "one", str(bundle), "--backend", backend]
    command += [*provider, *own, "--repeat", str(trial.repeat)]
    return _found(way, _run(command, trial.limit))


def _found(way: Way, done: "subprocess.CompletedProcess[str]") -> Way:
    """Add what a process found to a way: its last whole line of JSON, and why it failed."""
    lines = done.stdout.rpartition("\n")[0].splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return Way(**{**asdict(way), **(found or [{}])[-1], "failed": _said(done)})


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", required=True)
@click.option("--provider")
@click.option("--engines", type=click.Path(path_type=Path))
@click.option("--repeat", type=int, required=True)
def one(
    bundle: Path, backend: str, provider: str | None, engines: Path | None, repeat: int
) -> None:
    """Verify and time one way to run a bundle; print all results so far as lines of JSON."""
    from varedit_export.parity.compare_bundle import compare_backend
    from varedit_runtime.backends.engines.engine_set import EngineSet
    from varedit_runtime.bench import INSTRUCTION, synthetic_picture
    from varedit_runtime.editing.editor import Editor

    found: dict[str, Any] = {}

    def tell(**more: Any) -> None:
        found.update(more)
        click.echo(json.dumps(found))

    digest, free = None, _free_gpu_memory()
    if engines is not None:
        own = EngineSet.open(engines)
        digest = own.digest
        found["plans"] = {stage: plan.size for stage, plan in own.manifest.plans.items()}
    start = perf_counter()
    with Editor.open(bundle, backend=backend, provider=provider, engines_digest=digest) as editor:
        found["opening"] = perf_counter() - start
        found["gpu_memory"] = None if free is None else free - (_free_gpu_memory() or 0)
        found["memory"] = str(getattr(editor.backend, "budget", ""))
        lines = list(compare_backend(editor.bundle, editor.variant, editor.backend))
        failed = [line for line in lines if not line.value <= line.tolerance]  # NaN does
        worst = max(failed or lines, key=lambda line: line.value / (line.tolerance or 1))
        told = f"{worst.stage}: {worst.measure}, {worst.value:.3g} ({worst.tolerance:g})"
        tell(verified=not failed, worst=told)
        picture = synthetic_picture(editor.variant)

        def edit() -> Any:
            return editor.edit(picture, INSTRUCTION, seed=0)

        def by_steps() -> Any:
            return editor.edit(picture, INSTRUCTION, seed=0, on_scale=lambda progress: None)

        for whole, stepped in _in_turns((edit, by_steps), 1):  # whatever becomes of eager
            tell(edit=whole, by_steps=stepped, steps=dict(by_steps().timings))
        eager = _eager(editor)
        edits = (edit, by_steps) if eager is None else (edit, by_steps, eager)
        for whole, stepped, *theirs in _in_turns(edits, repeat):
            tell(edit=whole, by_steps=stepped)
            for seconds in theirs:
                tell(eager=seconds, ratio=seconds / whole)
        found["steps"] = dict(by_steps().timings)
    start = perf_counter()
    with Editor.open(bundle, backend=backend, provider=provider, engines_digest=digest):
        tell(opening_again=perf_counter() - start)


def _free_gpu_memory() -> int | None:
    """Return the first GPU's memory in bytes; None without a GPU."""
    gpus = nvidia().gpus
    return gpus[0].free if gpus else None


def _eager(editor: Any) -> Callable[[], Any] | None:
    """Time an edit with the eager reference, see `EAGER`; None if PyTorch has no CUDA."""
    import torch
    from torch import nn

    from varedit_export.bench import open_reference
    from varedit_runtime.bench import INSTRUCTION, synthetic_picture

    if not torch.cuda.is_available():
        return None
    eager = open_reference(editor.bundle, editor.variant)
    backend: Any = eager.backend
    model = backend.reference
    compute_in_fp16(model.transformer)
    for module in (model.transformer, model.tokenizer, backend.text_encoder):
        nn.Module.to(module, "cuda")
    pictures = [synthetic_picture(editor.variant)] * editor.variant.batch

    def edit() -> Any:
        return eager.edit(pictures, INSTRUCTION, seed=list(range(len(pictures))))

    return edit


def compute_in_fp16(transformer: Any) -> None:
    """Compute products in fp16, casting weights once; the reference casts at every product."""
    import torch

    from varedit_export.training.attention import compute_in
    from varedit_reference.transformer import Linear

    compute_in(transformer, torch.float16, "cuda")
    for module in transformer.modules():
        if isinstance(module, Linear):
            module.to(torch.float16)


def _in_turns(edits: Sequence[Callable[[], Any]], repeat: int) -> Iterator[list[float]]:
    """Yield the medians so far in seconds, after every round except the first (warm-up)."""
    seconds: list[list[float]] = [[] for _ in edits]
    for turn in range(repeat + 1):
        for edit, own in zip(edits, seconds, strict=True):
            start = perf_counter()
            edit()
            own.append(perf_counter() - start)
        if turn > 0:
            yield [statistics.median(own[1:]) for own in seconds]


def _export(*arguments: str, limit: int = 60) -> "subprocess.CompletedProcess[str]":
    code = "from varedit_export.cli import main; main()"
    return _run([sys.executable, "-c", code, *arguments], limit)


def _run(command: Sequence[str], limit: int) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""  # bytes, though text was asked for
        said = said if isinstance(said, str) else said.decode(errors="replace")
        return subprocess.CompletedProcess(command, 1, said, f"given up after {limit} s")


def _said(done: "subprocess.CompletedProcess[str]") -> str:
    """Return why a process failed; empty if it did not."""
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix("Error: ")[:REASON]


def _machine() -> str:
    """Return the lines of `varedit-export doctor`."""
    return _export("doctor").stdout


def _write(output: Path, ways: Sequence[Way]) -> None:
    command = shlex.join(["python", *sys.argv])
    report = {
        "date": date.today().isoformat(),
        "command": command,
        "machine": _machine(),
        "ways": [asdict(way) for way in ways],
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "report.md").write_text("\n".join(_markdown(report, ways)) + "\n")


def _markdown(report: dict[str, Any], ways: Sequence[Way]) -> Iterator[str]:
    yield f"# On a GPU, {report['date']}\n"
    yield f"    {report['command']}\n"
    yield from (f"    {line}" for line in report["machine"].splitlines())
    yield "\n| model | run by | parity | edit ms | by steps ms | eager ms | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for way in ways:
        parity = {None: "", True: "holds", False: "**fails**"}[way.verified]
        said = "; ".join(filter(None, (parity, way.failed)))
        times = " | ".join(_ms(seconds) for seconds in (way.edit, way.by_steps, way.eager))
        ratio = "" if way.ratio is None else f"{way.ratio:.2f}x"
        yield f"| {way.model} | {way.name} | {said} | {times} | {ratio} |"
    yield f"\n{EAGER}"
    yield "\n| model | run by | compiled s | largest plan MB | opened s | GPU MB | worst measure |"
    yield "|---|---|---|---|---|---|---|"
    for way in ways:
        if way.opening is not None:
            largest = f"{max(way.plans.values()) / 1e6:.1f}" if way.plans else ""
            compiling = "" if way.compiling is None else f"{way.compiling:.0f}"
            again = "" if way.opening_again is None else f", again {way.opening_again:.1f}"
            taken = "" if way.gpu_memory is None else f"{way.gpu_memory / 1e6:.0f}"
            yield (
                f"| {way.model} | {way.name} | {compiling} | {largest} | {way.opening:.1f}{again} "
                f"| {taken}{f' ({way.memory})' if way.memory else ''} | {way.worst} |"
            )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


if __name__ == "__main__":
    main()

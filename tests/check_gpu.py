"""Builds, verifies and times nano and a full-size 2b on this machine's GPU, and leaves a report.

    python tests/check_gpu.py -o gpu-report            # some minutes, 25 GB of disk
    python tests/check_gpu.py -o gpu-report --model nano

A bundle that an earlier call left there is used again.

Every way to run a model is tried in a process of its own, beside eager PyTorch in the same run.
What fails is a line of the report, with its reason and what was found before, and keeps nothing
else from being tried.
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

from varedit_runtime.backends.machine import nvidia

MODELS = {
    "nano": ("--size", "nano", "--precision", "fp16"),
    "nano-bf16": ("--size", "nano", "--precision", "bf16"),
    "2b-512": ("--size", "2b", "--res", "512", "--random-weights", "0", "--precision", "fp16"),
}
SECONDS = 1800  # after which a way is given up
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
@click.option("--repeat", default=20, show_default=True, help="Edits of each.")
@click.pass_context
def main(context: click.Context, output: Path, models: tuple[str, ...], repeat: int) -> None:
    if context.invoked_subcommand is not None:
        return
    output.mkdir(parents=True, exist_ok=True)
    ways: list[Way] = []
    for model in models or MODELS:
        for way in _ways(model, output, repeat):
            click.echo(f"{way.model} {way.name}: {way.failed or f'{way.edit:.3f} s an edit'}")
            ways.append(way)
            _write(output, ways)  # whatever comes after


def _ways(model: str, output: Path, repeat: int) -> Iterator[Way]:
    bundle = output / model
    if not bundle.exists():
        build = ("build", *MODELS[model], "-o", str(bundle))
        if failed := _said(_export(*build)):
            yield Way(model, "build", failed=failed)
            return
    providers = {"nano": ("cuda", "cpu"), "nano-bf16": ()}
    for provider in providers.get(model, ("cuda",)):  # which computes no bf16
        yield _tried(Way(model, f"onnxruntime {provider}"), bundle, repeat)
    for backend in ("tensorrt", "tensorrt-rtx"):
        for layout in LAYOUTS:
            yield _compiled(Way(model, f"{backend} {layout}"), bundle, repeat)


def _compiled(way: Way, bundle: Path, repeat: int) -> Way:
    backend, layout = way.name.split()
    start = perf_counter()
    done = _export("engines", str(bundle), "--backend", backend, "--layout", layout)
    way.compiling = perf_counter() - start
    if failed := _said(done):
        way.failed = failed
        return way
    return _tried(way, bundle, repeat, Path(done.stdout.strip().splitlines()[-1]))


def _tried(way: Way, bundle: Path, repeat: int, engines: Path | None = None) -> Way:
    """Run one way in its own process, and read what it found."""
    own = [] if engines is None else ["--engines", str(engines)]
    backend = way.name.split()[0]
    provider = ["--provider", way.name.split()[1]] if engines is None else []
    command = [sys.executable, __file__, "one", str(bundle), "--backend", backend]
    done = _run([*command, *provider, *own, "--repeat", str(repeat)])
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
    from varedit_runtime.editor import Editor

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
    eager = open_reference(editor)
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

    from varedit_nano.train_transformer import set_compute_dtype
    from varedit_reference.transformer import Linear

    set_compute_dtype(transformer, torch.float16)
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


def _export(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return _run([sys.executable, "-c", "from varedit_export.cli import main; main()", *arguments])


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""  # bytes, though text was asked for
        said = said if isinstance(said, str) else said.decode(errors="replace")
        return subprocess.CompletedProcess(command, 1, said, f"given up after {SECONDS} s")


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

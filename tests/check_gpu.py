"""Builds, verifies and times nano and a full-size 2b on this machine's GPU, and leaves a report.

    python tests/check_gpu.py -o gpu-report            # some minutes, 25 GB of disk
    python tests/check_gpu.py -o gpu-report --model nano

A bundle that an earlier call left there is used again.

Every way to run a model is tried in a process of its own, beside eager PyTorch in the same run.
What fails is a line of the report, with its reason, and keeps nothing else from being tried.
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

from varedit_export.machine import nvidia

MODELS = {
    "nano": ("--size", "nano", "--precision", "fp16"),
    "nano-bf16": ("--size", "nano", "--precision", "bf16"),
    "2b-512": ("--size", "2b", "--res", "512", "--random-weights", "0", "--precision", "fp16"),
}
SECONDS = 1800  # after which a way is given up
LAYOUTS = ("external", "profiles", "baked")
REASON = 300  # characters of what a failure said


@dataclass
class Way:
    """A way to run a model, and what was found.

    compiling, opening, opening_again (with what the first kept), eager, edit, by_steps: seconds, of
    edits the medians; ratio: eager's to the edit's. plans: bytes; gpu_memory: bytes that the device
    had less free once it was open. verified: whether every measure of parity was within its
    tolerance; worst: of them. steps: seconds of an edit's steps, run one by one. failed: why not.
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
    """The way as a process of its own found it."""
    own = [] if engines is None else ["--engines", str(engines)]
    backend = way.name.split()[0]
    provider = ["--provider", way.name.split()[1]] if engines is None else []
    command = [sys.executable, __file__, "one", str(bundle), "--backend", backend]
    done = _run([*command, *provider, *own, "--repeat", str(repeat)])
    if failed := _said(done):
        way.failed = failed
        return way
    return Way(**{**asdict(way), **json.loads(done.stdout.splitlines()[-1])})


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", required=True)
@click.option("--provider")
@click.option("--engines", type=click.Path(path_type=Path))
@click.option("--repeat", type=int, required=True)
def one(
    bundle: Path, backend: str, provider: str | None, engines: Path | None, repeat: int
) -> None:
    """Verify and time one way to run a bundle; a line of JSON."""
    from varedit_export.verify_engines import compare_backend
    from varedit_runtime.bench import INSTRUCTION, synthetic_picture
    from varedit_runtime.editor import Editor
    from varedit_runtime.engine_set import EngineSet

    found: dict[str, Any] = {}
    digest, free = None, _free_gpu_memory()
    if engines is not None:
        own = EngineSet.open(engines)
        digest = own.digest
        found["plans"] = {stage: plan.size for stage, plan in own.manifest.plans.items()}
    start = perf_counter()
    with Editor.open(bundle, backend=backend, provider=provider, engines_digest=digest) as editor:
        found["opening"] = perf_counter() - start
        found["gpu_memory"] = None if free is None else free - (_free_gpu_memory() or 0)
        found["memory"] = str(getattr(editor.graphs, "budget", ""))
        lines = list(compare_backend(editor.bundle, editor.variant, editor.graphs))
        failed = [line for line in lines if not line.value <= line.tolerance]  # NaN does
        worst = max(failed or lines, key=lambda line: line.value / (line.tolerance or 1))
        found["verified"] = not failed
        found["worst"] = f"{worst.stage}: {worst.measure}, {worst.value:.3g} ({worst.tolerance:g})"
        picture = synthetic_picture(editor.variant)

        def edit() -> Any:
            return editor.edit(picture, INSTRUCTION, seed=0)

        def by_steps() -> Any:
            return editor.edit(picture, INSTRUCTION, seed=0, on_scale=lambda progress: None)

        eager = _eager(editor)
        times = _in_turns((eager, edit, by_steps), repeat)
        found["eager"], found["edit"], found["by_steps"] = times
        found["ratio"] = times[0] / times[1]
        found["steps"] = dict(by_steps().timings)
    start = perf_counter()
    with Editor.open(bundle, backend=backend, provider=provider, engines_digest=digest):
        found["opening_again"] = perf_counter() - start
    click.echo(json.dumps(found))


def _free_gpu_memory() -> int | None:
    """Bytes, of the first GPU; None without one."""
    gpus = nvidia().gpus
    return gpus[0].free if gpus else None


def _eager(editor: Any) -> Callable[[], Any]:
    """An edit with the reference, eager, products in fp16: on the GPU where there is one."""
    import torch
    from torch import nn

    from varedit_export.bench import pipeline_of
    from varedit_reference.nano.train_transformer import set_compute_dtype
    from varedit_runtime.bench import INSTRUCTION, synthetic_picture

    model = pipeline_of(editor.bundle, editor.variant)
    if torch.cuda.is_available():
        set_compute_dtype(model.transformer, torch.float16)
        for module in (model.transformer, model.tokenizer, model.text_encoder.model):
            nn.Module.to(module, "cuda")
    pictures = [synthetic_picture(editor.variant)] * editor.variant.batch

    @torch.inference_mode()
    def edit() -> Any:
        return model.edit(pictures, [INSTRUCTION] * len(pictures), seed=range(len(pictures)))

    return edit


def _in_turns(edits: Sequence[Callable[[], Any]], repeat: int) -> list[float]:
    """The median seconds of each, once all are warm."""
    seconds: list[list[float]] = [[] for _ in edits]
    for _ in range(repeat + 1):
        for edit, own in zip(edits, seconds, strict=True):
            start = perf_counter()
            edit()
            own.append(perf_counter() - start)
    return [statistics.median(own[1:]) for own in seconds]


def _export(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return _run([sys.executable, "-c", "from varedit_export.cli import main; main()", *arguments])


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"given up after {SECONDS} s")


def _said(done: "subprocess.CompletedProcess[str]") -> str:
    """Why a process failed; empty where it did not."""
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix("Error: ")[:REASON]


def _machine() -> str:
    """The lines of `varedit-export doctor`."""
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
        if way.failed:
            yield f"| {way.model} | {way.name} | {way.failed} | | | | |"
            continue
        times = " | ".join(f"{1e3 * (t or 0):.1f}" for t in (way.edit, way.by_steps, way.eager))
        parity = "holds" if way.verified else "**fails**"
        yield f"| {way.model} | {way.name} | {parity} | {times} | {way.ratio:.2f}x |"
    yield "\n| model | run by | compiled s | largest plan MB | opened s | GPU MB | worst measure |"
    yield "|---|---|---|---|---|---|---|"
    for way in ways:
        if not way.failed:
            largest = f"{max(way.plans.values()) / 1e6:.1f}" if way.plans else ""
            compiling = "" if way.compiling is None else f"{way.compiling:.0f}"
            opened = f"{way.opening:.1f}, again {way.opening_again:.1f}"
            taken = "" if way.gpu_memory is None else f"{way.gpu_memory / 1e6:.0f}"
            yield (
                f"| {way.model} | {way.name} | {compiling} | {largest} | {opened} | {taken}"
                f"{f' ({way.memory})' if way.memory else ''} | {way.worst} |"
            )


if __name__ == "__main__":
    main()

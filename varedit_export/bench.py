"""How fast and how large a bundle is beside the reference: in turns, in one run.

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
from time import perf_counter
from typing import cast

import numpy as np
import onnxruntime as ort
import torch
from PIL import Image
from torch import Tensor, nn

from varedit_export.parity.verify import reference_of, t5_encoder
from varedit_reference.kv_cache import KVCache
from varedit_reference.pipeline import VAREdit
from varedit_reference.scale_loop import predict_scales, seeded
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.transformer import VAR, TextCondition
from varedit_runtime.bench import (
    INSTRUCTION,
    Memory,
    Spread,
    memory_lines,
    milliseconds,
    synthetic_picture,
)
from varedit_runtime.bundle import Bundle
from varedit_runtime.editor import Editor
from varedit_runtime.errors import BackendError, BundleError, ConfigError
from varedit_runtime.manifest import Variant, scale_name
from varedit_runtime.text import read_tokenizer

RUNTIME = "from varedit_runtime.cli import main; main()"


@dataclass(frozen=True)
class Comparison:
    """Seconds that a batch takes either; ratio: of the medians, the reference's to the bundle's."""

    name: str
    reference: Spread
    bundle: Spread
    ratio: float

    @classmethod
    def of(cls, name: str, reference: Sequence[float], bundle: Sequence[float]) -> "Comparison":
        theirs, ours = Spread.of(reference), Spread.of(bundle)
        return cls(name, theirs, ours, theirs.median / ours.median)


@dataclass(frozen=True)
class Report:
    """What `measure` found. differing: the share of the pictures' values that are not the same."""

    bundle: str
    digest: str
    variant: str
    precision: str
    batch: int
    threads: int
    cores: int | None
    onnxruntime: str
    torch: str
    repeat: int
    edit: Comparison
    stages: tuple[Comparison, ...]
    differing: float
    memory: Memory


@dataclass(frozen=True)
class Edit:
    """What came out of an edit, and the seconds of its stages."""

    pictures: Sequence[Image.Image]
    seconds: Mapping[str, float]


def measure(
    path: Path, repeat: int, threads: int | None = None, variant: str | None = None
) -> Report:
    """Edit a synthetic picture with both: once to warm up, then `repeat` times in turns.

    Raises what `Editor.open` does, BundleError on a bundle that starts at text features,
    BackendError when the runtime fails in the process that measures its memory, and ConfigError
    unless repeat and threads are at least 1.
    """
    count = (os.cpu_count() or 1) if threads is None else threads
    if repeat < 1 or count < 1:
        raise ConfigError(f"repeat is {repeat}, threads {count}; they must be at least 1")
    bundle = Bundle.open(path)
    chosen = bundle.manifest.variant(variant)
    if "text_encoder" not in chosen.graphs:
        raise BundleError(
            f"{bundle.path} was built without a text encoder, and takes no instructions: build a "
            "bundle with one"
        )
    memory = measure_memory(
        path, count, chosen.name
    )  # before this process holds pages of the same files
    with Editor.open(path, threads=count, variant=chosen.name) as editor, torch_threads(count):
        turns = list(_turns(bundle, editor, repeat))
    warm, *timed = turns
    return Report(
        bundle=str(bundle.path),
        digest=bundle.digest,
        variant=editor.variant.name,
        precision=bundle.manifest.precision,
        batch=editor.variant.batch,
        threads=count,
        cores=os.cpu_count(),
        onnxruntime=ort.__version__,
        torch=torch.__version__,
        repeat=repeat,
        edit=_compare("edit", timed, lambda edit: sum(edit.seconds.values())),
        stages=tuple(
            _compare(name, timed, lambda edit, name=name: edit.seconds[name])
            for name in warm[0].seconds
        ),
        differing=_share_differing(*warm),
        memory=memory,
    )


def table(report: Report) -> str:
    """The report for a person."""
    lines = [
        f"{report.bundle}: {report.variant}, {report.precision}, batch {report.batch}",
        f"PyTorch {report.torch}, eager, fp32, and onnxruntime {report.onnxruntime}; "
        f"{report.threads} threads; median of {report.repeat}, in turns",
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


def measure_memory(path: Path, threads: int, variant: str) -> Memory:
    """What `varedit-run bench` finds in a process without PyTorch.

    Raises BackendError, with what it said, when it fails.
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
        return Memory(**json.loads(file.read_bytes())["memory"])


def pipeline_of(bundle: Bundle, variant: Variant) -> VAREdit:
    """The reference with a bundle's own weights, the text encoder included, laid out as loaded."""
    reference = reference_of(bundle).of(variant)
    assert reference.text is not None
    tokenizer = read_tokenizer(reference.text.tokenizer_json)
    text = TextEncoder(t5_encoder(reference.text), tokenizer)
    for module in (reference.transformer, reference.tokenizer, text.model):
        _lay_out(module)
    return VAREdit(reference.config, reference.tokenizer, reference.transformer, text)


@torch.inference_mode()
def edit_timed(
    model: VAREdit, pictures: Sequence[Image.Image], guidance: float, seeds: Sequence[int]
) -> Edit:
    """`VAREdit.edit`, stage by stage."""
    seconds: dict[str, float] = {}
    transformer = model.transformer
    with _timed(seconds, "text_encoder"):
        features = model.text_encoder.encode([INSTRUCTION] * len(pictures))
    with _timed(seconds, "image_encoder"):
        source = model.read(pictures)
    with _timed(seconds, "condition"):
        text = transformer.condition(transformer.text_rows(features, guidance != 1))
    with _timed(seconds, "prefill"):
        cache = transformer.prefill(source, text)
    scales = predict_scales(
        cast("VAR", _Prefilled(transformer, cache)),
        model.config,
        source,
        text,
        seeded(seeds),
        guidance,
        model.config.temperature,
    )
    total = torch.empty(0)
    for scale in range(len(model.config.transformer.grids)):
        with _timed(seconds, scale_name(scale)):
            total = next(scales).sum
    with _timed(seconds, "image_decoder"):
        drawn = model.draw(total, [picture.size for picture in pictures])
    return Edit(drawn, seconds)


@dataclass(frozen=True)
class _Prefilled:
    """A transformer whose prefill has run and was timed, as the loop over scales calls it."""

    transformer: VAR
    cache: KVCache

    def prefill(self, source_tokens: Tensor, text: TextCondition) -> KVCache:
        return self.cache

    def predict(
        self, scale: int, tokens: Tensor | None, text: TextCondition, cache: KVCache
    ) -> Tensor:
        return self.transformer.predict(scale, tokens, text, cache)


def _turns(bundle: Bundle, editor: Editor, repeat: int) -> Iterator[tuple[Edit, Edit]]:
    """(the reference's edit, the bundle's), the first of which is to warm up."""
    model, batch = pipeline_of(bundle, editor.variant), editor.variant.batch
    pictures, seeds = [synthetic_picture(editor.variant)] * batch, list(range(batch))
    guidance = bundle.manifest.guidance_scale if editor.guided else 1.0
    for _ in range(repeat + 1):
        theirs = edit_timed(model, pictures, guidance, seeds)
        results = editor.edit(pictures, INSTRUCTION, seed=seeds)
        yield theirs, Edit([result.image for result in results], results[0].timings)


def _compare(
    name: str, turns: Sequence[tuple[Edit, Edit]], seconds: Callable[[Edit], float]
) -> Comparison:
    theirs, ours = zip(*turns, strict=True)
    return Comparison.of(name, [seconds(edit) for edit in theirs], [seconds(edit) for edit in ours])


def _share_differing(one: Edit, other: Edit) -> float:
    pairs = zip(one.pictures, other.pictures, strict=True)
    return float(np.mean([np.asarray(a) != np.asarray(b) for a, b in pairs]))


def _lay_out(module: nn.Module) -> None:
    """Weights restored from the graphs' are transposed views; loaded ones lie in order."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[stage] = perf_counter() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

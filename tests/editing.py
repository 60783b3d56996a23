"""Bundles to edit with, and the reference that edits as they must."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import torch
from agreement import compare_until_tie
from bundles import built, bundle_config, random_weights, request, small_bundle
from fake_bundles import rewrite_manifest
from PIL import Image
from torch import Tensor

from varedit_export.parity.reference_backend import Reference
from varedit_export.plan import BundlePlan
from varedit_export.sources import random_sources, text_encoder_of
from varedit_reference.config import ModelConfig
from varedit_reference.pipeline import VAREdit
from varedit_reference.scale_loop import PredictedScale
from varedit_runtime.backends.base import Sampling, ScaleOutput
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.editing.editor import Editor
from varedit_runtime.grids import Conditioning
from varedit_runtime.manifest import MANIFEST, TOKENIZER, Manifest, canonical_json, decode_manifest
from varedit_runtime.noise import uniform_noise


@cache
def pair_bundle() -> Path:
    """Build the small bundle for two pictures at a time."""
    return _built("pair", bundle_config(), batch=2, guided=True)


@cache
def plain_bundle() -> Path:
    """Build a bundle without guidance and without SAR references."""
    return _built("plain", plain_config(), batch=1, guided=False)


def plain_config() -> ModelConfig:
    return replace(conditioned("finest"), guidance_scale=1.0)


@cache
def full_bundle() -> Path:
    """Build the small bundle with all scales of the source in front of every block."""
    return _built("all-scales", conditioned("full"), batch=1, guided=True)


def conditioned(conditioning: Conditioning) -> ModelConfig:
    config = bundle_config()
    return replace(config, transformer=replace(config.transformer, conditioning=conditioning))


def _built(name: str, config: ModelConfig, batch: int, guided: bool) -> Path:
    def plan(target: Path) -> BundlePlan:
        wanted = replace(request(target), config=config, batch=batch, guided=guided)
        return BundlePlan([wanted], random_sources(config, seed=0))

    return built(name, plan)


def changed_bundle(
    folder: Path, change: Callable[[Manifest], Manifest], bundle: Callable[[], Path] = small_bundle
) -> Path:
    """Copy a bundle with another manifest."""
    target = folder / "changed"
    shutil.copytree(bundle(), target)
    manifest = decode_manifest((target / MANIFEST).read_bytes(), Manifest)
    rewrite_manifest(target, canonical_json(change(manifest)))
    return target


def without_text(folder: Path) -> Path:
    """Return a copy of the small bundle without its text encoder."""

    def change(manifest: Manifest) -> Manifest:
        (variant,) = manifest.variants
        graphs = {stage: graph for stage, graph in variant.graphs.items() if stage != TEXT}
        files = {name: entry for name, entry in manifest.files.items() if not _of_text(name)}
        model = msgspec.structs.replace(manifest.model, text_distance=None, text_epsilon=None)
        variant = msgspec.structs.replace(variant, graphs=graphs)
        return msgspec.structs.replace(manifest, variants=(variant,), files=files, model=model)

    return changed_bundle(folder, change)


def _of_text(file: str) -> bool:
    return file == TOKENIZER or f"/{TEXT}." in file or f".{TEXT}." in file


@cache
def reference(config: ModelConfig) -> VAREdit:
    """Return the PyTorch pipeline with the bundles' weights."""
    sources = random_weights()
    model, text = Reference.from_sources(config, sources), sources.text
    assert text is not None
    encoder = text_encoder_of(text)
    return VAREdit(config, model.tokenizer, model.transformer, encoder)


def picture(width: int, height: int, blue: int = 90) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    colours = np.stack((rows * 255 // height, columns * 255 // width, rows * 0 + blue), axis=2)
    return Image.fromarray(colours.astype(np.uint8))


@dataclass
class Recorder:
    """Record the outputs of an editor's scales in the reference's form."""

    steps: list[PredictedScale]
    sampled: list[Sampling]

    @classmethod
    def of(cls, editor: Editor) -> "Recorder":
        recorder, backend = cls([], []), editor.backend
        predict = backend.predict

        def recorded(scale: int, sampling: Sampling) -> ScaleOutput:
            output = predict(scale, sampling)
            recorder.steps.append(as_reference(scale, output))
            recorder.sampled.append(sampling)
            return output

        backend.predict = recorded  # type: ignore[method-assign]
        return recorder


def as_reference(scale: int, output: ScaleOutput) -> PredictedScale:
    logits = torch.from_numpy(output.logits).flatten(1, 2)
    bits = torch.from_numpy(output.bits).flatten(1, 2)
    sums = torch.from_numpy(output.running_sum)
    return PredictedScale(scale, None, logits, torch.empty(0), bits, sums)


def equal_until_tie(
    ours: list[PredictedScale], theirs: list[PredictedScale], noise: list[Tensor]
) -> bool:
    """Return whether all bits are equal; fail if any that differs is no tie."""
    compared = compare_until_tie(ours, theirs, noise)
    assert all(scale.explained for scale in compared), compared
    return not compared[-1].differing


def noise_of(seeds: list[int], grids: tuple[tuple[int, int], ...], channels: int) -> list[Tensor]:
    """Return the bits of every scale [B, L, c]."""
    return [
        torch.stack([torch.from_numpy(uniform_noise(s, k, h * w, channels)) for s in seeds])
        for k, (h, w) in enumerate(grids)
    ]

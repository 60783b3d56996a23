"""The graphs as the runtime drives them, stage by stage, against the reference."""

import shutil
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from agreement import compare_scale
from bundles import small_bundle
from editing import (
    as_reference,
    bundle_config,
    conditioned,
    full_bundle,
    pair_bundle,
    plain_bundle,
    plain_config,
    reference,
)
from fake_bundles import rewrite_manifest
from torch import Tensor

from varedit_reference.config import ModelConfig
from varedit_reference.pipeline import VAREdit
from varedit_reference.scale_loop import PredictedScale, forced, predict_scales, seeded
from varedit_runtime.backends import graph_file
from varedit_runtime.backends.base import Sampling
from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.backends.onnxruntime.backend import Buffer, OnnxBackend
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, BundleError, ConfigError
from varedit_runtime.geometry import source_grid
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import (
    MANIFEST,
    GraphSpec,
    Manifest,
    TensorSpec,
    canonical_json,
    decode_manifest,
)
from varedit_runtime.noise import uniform_noise

GUIDANCE, TEMPERATURE = 3.0, 0.7
LENGTHS = (9, 4)


def backend_of(path: Path, threads: int = 1) -> OnnxBackend:
    bundle = Bundle.open(path)
    return OnnxBackend(bundle, bundle.manifest.variants[0], OnnxRuntimeOptions(threads=threads))


class Given:
    """Draw random sources and text features, as many pictures as a bundle takes."""

    def __init__(self, config: ModelConfig, batch: int, guided: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        transformer = config.transformer
        grid = source_grid(transformer.grids, transformer.conditioning)
        shape = (batch, *grid, transformer.token_channels)
        self.config, self.guided = config, guided
        self.source = torch.randn(shape, generator=generator) / 4
        self.text = [
            torch.randn(length, transformer.text_channels, generator=generator)
            for length in LENGTHS[:batch]
        ]

    def start(self, backend: GraphBackend, guided: bool | None = None) -> None:
        """Run condition and prefill; by default with all rows that the bundle has."""
        batch, tokens = len(self.text), backend.variant.text_tokens
        features = np.zeros((batch, tokens, self.text[0].shape[1]), np.float32)
        mask = np.zeros((batch, tokens), np.bool_)
        for row, text in enumerate(self.text):
            features[row, : len(text)] = text.numpy()
            mask[row, : len(text)] = True
        inputs = {"text_features": features, "text_mask": mask}
        if self.guided if guided is None else guided:
            inputs = {name: np.concatenate((x, x)) for name, x in inputs.items()}
            inputs["learned"] = np.repeat((False, True), batch)
        backend.condition(inputs)
        backend.prefill(self.source.numpy())

    def run_reference(self, model: VAREdit, choose: Any) -> list[PredictedScale]:
        rows = model.transformer.text_rows(self.text, self.guided, None)
        condition = model.transformer.condition(rows)
        guidance = GUIDANCE if self.guided else 1.0
        source = self.source.flatten(1, 2)
        steps = predict_scales(
            model.transformer, self.config, source, condition, choose, guidance, TEMPERATURE
        )
        return list(steps)

    def noise(self, scale: int, seeds: Sequence[int]) -> Tensor:
        rows, columns = self.config.transformer.grids[scale]
        channels = self.config.transformer.token_channels
        noise = [uniform_noise(s, scale, rows * columns, channels) for s in seeds]
        return torch.from_numpy(np.stack(noise))

    def shaped(self, scale: int, tensor: Tensor) -> np.ndarray:
        """Reshape [B, L, c] to [B, h, w, c]."""
        return tensor.unflatten(1, self.config.transformer.grids[scale]).numpy()


@pytest.mark.parametrize(
    ("path", "config", "batch", "guided"),
    [
        (small_bundle, bundle_config(), 1, True),
        (pair_bundle, bundle_config(), 2, True),
        (plain_bundle, plain_config(), 1, False),
        (full_bundle, conditioned("full"), 1, True),
    ],
    ids=["small", "pair", "plain", "full"],
)
def test_teacher_forced_every_scale_equals_the_reference(
    path: Any, config: ModelConfig, batch: int, guided: bool
) -> None:
    """Half of the bits are forced to the reference's, and the others are drawn."""
    backend, given, seeds = backend_of(path()), Given(config, batch, guided), [5, 6][:batch]
    expected = given.run_reference(reference(config), seeded(seeds))
    given.start(backend)
    for k, step in enumerate(expected):
        noise = given.noise(k, seeds)
        mask = torch.arange(step.bits.numel()).view(step.bits.shape) % 2 == 0
        sampling = Sampling(
            given.shaped(k, noise),
            GUIDANCE if guided else 1.0,
            TEMPERATURE,
            given.shaped(k, step.bits),
            given.shaped(k, mask),
        )
        output = as_reference(k, backend.predict(k, sampling))
        assert step.logits.std() > 0.1
        torch.testing.assert_close(output.logits, step.logits, rtol=0, atol=1e-3)
        assert compare_scale(output, step, noise).explained
        torch.testing.assert_close(output.sum, step.sum, rtol=0, atol=1e-5)


def test_forced_bits_are_taken_where_the_mask_is_set_and_there_alone() -> None:
    backend, given = backend_of(small_bundle()), Given(bundle_config(), 1, True)
    steps = given.run_reference(reference(bundle_config()), seeded([5]))
    other = [~step.bits for step in steps]
    flipped = given.run_reference(reference(bundle_config()), forced(other))
    given.start(backend)
    for k, step in enumerate(flipped):
        everywhere = np.ones(given.shaped(k, step.bits).shape, np.bool_)
        noise = given.shaped(k, given.noise(k, [5]))
        bits = given.shaped(k, other[k])
        output = backend.predict(k, Sampling(noise, GUIDANCE, TEMPERATURE, bits, everywhere))
        assert np.array_equal(output.bits, bits)
        np.testing.assert_allclose(output.running_sum, step.sum.numpy(), rtol=0, atol=1e-5)


def logits_of(backend: OnnxBackend, given: Given) -> list[np.ndarray]:
    given.start(backend)
    noise = [given.shaped(k, given.noise(k, [3])) for k in range(len(backend.variant.grids))]
    return [backend.predict(k, Sampling(u, 3.0, 0.5)).logits for k, u in enumerate(noise)]


def test_an_edit_leaves_nothing_behind_for_the_next_one() -> None:
    backend = backend_of(small_bundle())
    one, other = (Given(bundle_config(), 1, True, seed) for seed in range(2))
    first = logits_of(backend, one)
    assert not np.array_equal(logits_of(backend, other)[-1], first[-1])
    given_up = Given(bundle_config(), 1, True, seed=2)
    given_up.start(backend)
    backend.predict(0, Sampling(given_up.shaped(0, given_up.noise(0, [1])), 3.0, 0.5))
    for before, after in zip(first, logits_of(backend, one), strict=True):
        assert np.array_equal(before, after)


def test_memory_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, given = backend_of(small_bundle()), Given(bundle_config(), 1, True)
    transformer = bundle_config().transformer
    targets, source = sum(transformer.lengths), transformer.lengths[-1]
    # Keys and values, guided, fp32: both blocks' targets, the source of all but the first block.
    caches = 2 * 2 * transformer.width * 4 * (2 * targets + source)
    assert caches < backend.buffer_bytes < 4 * caches
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", None)
    assert np.isfinite(logits_of(backend, given)[-1]).all()


def test_what_is_handed_out_does_not_change_later() -> None:
    backend = backend_of(small_bundle())
    one, other = (Given(bundle_config(), 1, True, seed) for seed in range(2))
    kept = logits_of(backend, one)
    copies = [array.copy() for array in kept]
    tokens = backend.encode_pictures(np.zeros((1, 3, 96, 96), np.float32))
    before = tokens.copy()
    logits_of(backend, other)
    backend.encode_pictures(np.ones((1, 3, 96, 96), np.float32))
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert np.array_equal(tokens, before)


def test_threads_do_not_change_what_is_computed() -> None:
    given = Given(bundle_config(), 1, True)
    one, two = (logits_of(backend_of(small_bundle(), n), given) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_an_unknown_provider_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no provider is called 'tpu'; there are cpu, cuda"):
        OnnxRuntimeOptions("tpu")


def test_an_absent_provider_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    bundle = Bundle.open(small_bundle())
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider.*onnxruntime-gpu"):
        OnnxBackend(bundle, bundle.manifest.variants[0], OnnxRuntimeOptions("cuda"))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA would start"
)
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_no_reason_to_use_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_backend, "check_provider", lambda provider: None)
    bundle = Bundle.open(small_bundle())
    with pytest.raises(BackendError, match="could not start CUDAExecutionProvider"):
        OnnxBackend(bundle, bundle.manifest.variants[0], OnnxRuntimeOptions("cuda"))


def test_a_graph_that_is_none_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_backend, "read_graph", lambda *_: b"no graph")
    with pytest.raises(BackendError, match="cannot load graph text_encoder") as caught:
        backend_of(small_bundle())
    assert "\n" not in str(caught.value)


def test_a_graph_that_fails_is_a_typed_error() -> None:
    backend = backend_of(small_bundle())
    with pytest.raises(BackendError, match="cannot run graph image_encoder") as caught:
        backend.encode_pictures(np.zeros((1, 3, 8, 8), np.float32))
    assert "\n" not in str(caught.value)
    assert np.isfinite(logits_of(backend, Given(bundle_config(), 1, True))[-1]).all()


def test_a_node_that_fails_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Only the error says so: ONNX Runtime prints nothing itself."""
    backend = backend_of(embedded())
    shape = (1, backend.variant.text_tokens)
    with pytest.raises(BackendError, match=r"cannot run graph text_encoder.*out of"):
        backend.encode_text(np.full(shape, 10**6, np.int64), np.ones(shape, np.bool_))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [(2**20, 2**30), (2**31 - 1,) * 8, (2**62, 2**20)])
def test_a_buffer_that_is_too_large_is_a_typed_error(shape: tuple[int, ...]) -> None:
    said = f"no memory on the cpu for the {prod(shape) * 4 / 1e9:.0f} GB of a buffer .*--batch"
    with pytest.raises(BackendError, match=said) as caught:
        Buffer(shape, "float32", "cpu")
    assert "\n" not in str(caught.value)


def test_too_little_memory_to_fill_a_buffer_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate")

    buffer = Buffer((2, 3), "float32", "cpu")
    monkeypatch.setattr(np, "full", full)
    with pytest.raises(BackendError, match=r"the 24 bytes of a buffer \(Unable to allocate\)"):
        buffer.fill(0)


def changed_nano(folder: Path, change: Callable[[str, GraphSpec], GraphSpec]) -> Path:
    """Copy nano's bundle with another description of its graphs."""
    bundle = Path(shutil.copytree(embedded(), folder / "bundle"))
    manifest = decode_manifest((bundle / MANIFEST).read_bytes(), Manifest)
    (variant,) = manifest.variants
    graphs = {stage: change(stage, graph) for stage, graph in variant.graphs.items()}
    variants = (msgspec.structs.replace(variant, graphs=graphs),)
    rewrite_manifest(bundle, canonical_json(msgspec.structs.replace(manifest, variants=variants)))
    return bundle


def start(**other: Any) -> Callable[[str, GraphSpec], GraphSpec]:
    """Change the tensor called start in all graphs that have it."""

    def changed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            msgspec.structs.replace(spec, **other) if spec.name == "start" else spec
            for spec in specs
        )

    return lambda _, graph: GraphSpec(graph.file, changed(graph.inputs), changed(graph.outputs))


def test_an_input_that_nothing_gives_is_found_on_opening(tmp_path: Path) -> None:
    def with_style(stage: str, graph: GraphSpec) -> GraphSpec:
        more = (TensorSpec("style", "float32", (1, 2)),) if stage == "text_encoder" else ()
        return msgspec.structs.replace(graph, inputs=(*graph.inputs, *more))

    with pytest.raises(BundleError, match="text_encoder has an input that nothing gives 'style'"):
        Editor.open(changed_nano(tmp_path, with_style))


def test_a_tensor_that_no_memory_holds_is_found_on_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph says so too."""
    monkeypatch.setattr(graph_file, "_compare", lambda *_: None)
    with pytest.raises(BackendError, match=r"no memory on the cpu for the \d+ GB"):
        Editor.open(changed_nano(tmp_path, start(shape=(2**31 - 1,) * 6)))

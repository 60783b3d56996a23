"""Parity block by block: what it proves, and that swapped tensors fail it."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from bundles import bundle_config, half_bundle, quiet, request
from editing import conditioned, full_bundle, plain_bundle, plain_config

from varedit_export.assemble import assemble
from varedit_export.errors import ParityError
from varedit_export.manifest_model import sources_of
from varedit_export.parity import compare_bundle as parity
from varedit_export.parity import measures, streamed_transformer
from varedit_export.parity.edit import scale_arrays
from varedit_export.parity.measures import gate
from varedit_export.parity.runner import Arrays
from varedit_export.parity.streamed import compare_streamed
from varedit_export.parity.weight_files import WeightFiles
from varedit_export.plan import BundlePlan
from varedit_export.sources import Sources, random_sources
from varedit_reference.config import ModelConfig
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import FileEntry, ParityLine, weights_file

DEPTH = 6  # more than are traced
TRANSFORMER, TEXT = weights_file("transformer"), weights_file("text_encoder")


def deep_config() -> ModelConfig:
    """Make a model of six blocks, and as few scales as have one of each kind."""
    config = bundle_config()
    grids = config.transformer.grids[:3]
    return replace(config, transformer=replace(config.transformer, depth=DEPTH, grids=grids))


def deep_weights() -> Sources:
    return random_sources(deep_config(), seed=0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Build an fp16 bundle that is verified block by block, as full sizes are."""
    target = tmp_path_factory.mktemp("deep") / "bundle"
    wanted = replace(request(target, "fp16"), config=deep_config(), resolution=64, batch=2)
    wanted = replace(wanted, fused_attention=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "LARGEST_WHOLE", 0)
        assemble(BundlePlan([wanted], deep_weights()), quiet)
    yield Bundle.open(target)


@pytest.fixture
def copy(built: Bundle, tmp_path: Path) -> Bundle:
    """Copy the bundle, to be damaged."""
    shutil.copytree(built.path, tmp_path / "copy")
    return Bundle.open(tmp_path / "copy")


def compared(bundle: Bundle) -> list[ParityLine]:
    """Verify without the files' digests, which would find any damage first."""
    files = dict(bundle.manifest.files)
    for name in files:
        content = (bundle.path / name).read_bytes()
        files[name] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    manifest = msgspec.structs.replace(bundle.manifest, files=files)
    return gate(compare_streamed(replace(bundle, manifest=manifest), deep_config(), deep_weights()))


def test_every_graph_was_compared(built: Bundle) -> None:
    (variant,) = built.manifest.variants
    lines = built.manifest.parity
    assert {line.stage for line in lines} == set(variant.graphs)
    measured = {line.stage: line.measure for line in lines if "over what they add" in line.measure}
    assert measured["condition"].startswith(f"all {DEPTH} blocks")
    assert measured["scale_01"].startswith(f"all {DEPTH} blocks")
    assert measured["text_encoder"].startswith("all 2 blocks")
    assert measured["prefill"].startswith("3 unlike blocks")
    assert {"scale", "fused_scale", "scale_00", "scale_02"} <= measured.keys()
    assert any("rounded to fp16" in line.measure for line in lines)


@pytest.mark.parametrize(
    ("path", "config"),
    [
        (partial(half_bundle, "bf16"), bundle_config()),
        (full_bundle, conditioned("full")),
        (plain_bundle, plain_config()),
    ],
    ids=["bf16", "full", "plain"],
)
def test_types_that_no_cpu_computes_and_other_conditionings_are_compared_alike(
    path: Callable[[], Path], config: ModelConfig
) -> None:
    lines = gate(compare_streamed(Bundle.open(path()), config, random_sources(config, seed=0)))
    assert any(line.measure.startswith("all 2 blocks") for line in lines)


@pytest.mark.parametrize(
    ("file", "one", "other"),
    [
        (TRANSFORMER, "blocks.4.qkv.weight", "blocks.3.qkv.weight"),
        (TRANSFORMER, "blocks.4.projection.weight", "blocks.4.cross_query.weight"),
        (TRANSFORMER, "blocks.5.mlp_down.weight", "blocks.1.mlp_down.weight"),
        (TRANSFORMER, "blocks.2.cross_kv.bias", "blocks.3.cross_kv.bias"),
        (TRANSFORMER, "blocks.2.cross_query.bias", "blocks.3.cross_query.bias"),
        (TRANSFORMER, "blocks.0.cross_norm.bias", "blocks.4.cross_norm.bias"),
        (TRANSFORMER, "blocks.0.modulation", "blocks.4.modulation"),
        (TRANSFORMER, "start_token", "head_modulation.bias"),
        (TEXT, "blocks.0.qkv", "blocks.1.qkv"),
        (TEXT, "blocks.0.down", "blocks.1.down"),
    ],
)
def test_swapped_weights_fail(copy: Bundle, file: str, one: str, other: str) -> None:
    layout = WeightFiles(copy.path).layout(file)
    path = copy.path / file
    content = bytearray(path.read_bytes())
    a, b = layout[one].place, layout[other].place
    length = min(a.length, b.length)
    first, second = (bytes(content[p.offset : p.offset + length]) for p in (a, b))
    content[a.offset : a.offset + length] = second
    content[b.offset : b.offset + length] = first
    path.write_bytes(content)
    with pytest.raises(ParityError, match="measures failed"):
        compared(copy)


def swapped_places(graph: onnx.GraphProto) -> None:
    """Swap where two weights of one graph lie."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    one, other = tensors["blocks.4.cross_kv.bias"], tensors["blocks.3.cross_kv.bias"]
    first, second = list(one.external_data), list(other.external_data)
    del one.external_data[:], other.external_data[:]
    one.external_data.extend(second)
    other.external_data.extend(first)


def swapped_readers(name: str) -> Callable[[onnx.GraphProto], None]:
    """Make two blocks of one graph read each other's weight."""

    def change(graph: onnx.GraphProto) -> None:
        names = {f"blocks.4.{name}": f"blocks.3.{name}", f"blocks.3.{name}": f"blocks.4.{name}"}
        for node in graph.node:
            node.input[:] = [names.get(read, read) for read in node.input]

    return change


def swapped_scales(graph: onnx.GraphProto) -> None:
    """Make a table of positions start a token early."""
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name == "cos"]
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) - 4 * tensor.dims[-1])


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("condition", swapped_places),
        ("condition", swapped_readers("cross_kv.weight")),
        ("prefill", swapped_readers("qkv.bias")),
        ("scale_00", swapped_readers("projection.weight")),
        ("scale_01", swapped_readers("mlp_up.bias")),
        ("scale_02", swapped_readers("cross_query.bias")),
        ("scale_02", swapped_scales),
        ("scale", swapped_readers("mlp_down.weight")),
        ("fused_scale", swapped_readers("qkv.weight")),
        ("fused_scale", swapped_readers("projection.weight")),
    ],
)
def test_a_graph_that_refers_to_other_weights_fails(
    copy: Bundle, stage: str, change: Callable[[onnx.GraphProto], None]
) -> None:
    path = copy.path / copy.manifest.variants[0].graphs[stage].file
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ParityError, match=f"measures failed: {stage}"):
        compared(copy)


def test_the_image_coders_of_a_large_bundle_are_compared_too(built: Bundle) -> None:
    stages = {line.stage for line in built.manifest.parity}
    assert {"image_encoder", "image_decoder"} <= stages


def test_a_large_bundle_is_verified_from_its_own_weights(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LARGEST_WHOLE", 0)
    lines = gate(parity.compare_bundle(built, *sources_of(built)))
    assert any(line.measure.startswith(f"all {DEPTH} blocks") for line in lines)


def test_a_tie_that_falls_to_the_other_side_makes_no_sum_wrong(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs draw from other noise here, and all bits count as ties."""

    def other_noise(*given: Any) -> Arrays:
        arrays = scale_arrays(*given)
        return arrays | {"noise": 1 - arrays["noise"]}

    monkeypatch.setattr(streamed_transformer, "scale_arrays", other_noise)
    monkeypatch.setattr(measures, "TIE", 1.0)
    sums = [line for line in compared(built) if line.measure.startswith("sum and next tokens")]
    assert len(sums) > len(built.manifest.variants[0].grids)

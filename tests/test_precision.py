"""What an entry of the registry of precisions decides, and that one file adds a precision."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import built, bundle_config, random_weights, request
from click.testing import CliRunner
from editing import picture
from safetensors import safe_open
from torch import Tensor

from varedit_export.cli import main
from varedit_export.graphs.layout import pack
from varedit_export.graphs.model import Packed
from varedit_export.parity.measures import gate
from varedit_export.parity.streamed import compare_streamed
from varedit_export.plan import BundlePlan
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.manifest import weights_file
from varedit_runtime.precision import (
    FLOAT32,
    PRECISIONS,
    Format,
    Gates,
    Precision,
    Storage,
    named,
    product_of,
)

# A precision of its own, in one file: the blocks' weights are 8-bit values and scales by column.


@dataclass(frozen=True)
class ToyColumns(Storage):
    """Keep 8-bit values, and a scale for each column."""

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"values": ("int8", shape), "scales": (FLOAT32, shape[1:])}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scales = weight.abs().amax(0).clamp_min(1e-12) / 127
        return {"values": (weight / scales).round(), "scales": scales}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"].float() * parts["scales"]


TOY = Precision(
    "toy8",
    gates=Gates(logits=0.2, bits=0.02),
    stored=(("transformer.blocks.*", ToyColumns()),),
    cpu_growth=4,
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRECISIONS, TOY.name, TOY)
        yield


@pytest.fixture(scope="module")
def bundle(registered: None) -> Bundle:
    """Parity with the reference is proven as it is built."""
    return Bundle.open(
        built("toy8", lambda target: BundlePlan([request(target, "toy8")], random_weights()))
    )


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_its_weights_are_values_and_scales(bundle: Bundle) -> None:
    with safe_open(bundle.path / weights_file("transformer"), "pt") as file:
        names = set(file.keys())
        values = file.get_tensor("blocks.1.mlp_up.weight.values")
        scales = file.get_tensor("blocks.1.mlp_up.weight.scales")
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert scales.shape == values.shape[1:] and values.abs().amax() == 127
    assert {"blocks.1.mlp_up.bias", "head.weight"} <= names
    assert "blocks.1.mlp_up.weight" not in names


def test_it_is_verified_from_its_own_weights(bundle: Bundle) -> None:
    output = run("verify", bundle.path)
    assert "rounded to toy8" in output and "EXCEEDED" not in output


def test_it_is_compared_block_by_block(bundle: Bundle) -> None:
    lines = gate(compare_streamed(bundle, bundle_config(), random_weights()))
    blocks = [line for line in lines if "over what they add" in line.measure]
    assert {"condition", "prefill", "scale_01", "text_encoder"} <= {line.stage for line in blocks}
    assert all(line.value < 1e-4 for line in blocks)  # the rounded weights' own products


def test_it_edits(bundle: Bundle) -> None:
    with Editor.open(bundle.path) as editor:
        edited = np.asarray(editor.edit(picture(60, 50), "a red hat", seed=3).image)
    assert edited.shape == (50, 60, 3) and edited.std() > 0


def test_the_commands_know_it(bundle: Bundle) -> None:
    assert "[auto|fp32|fp16|bf16|int8|int7|fp8|int8-gpu|toy8]" in run("build", "--help")
    inspected = run("inspect", bundle.path)
    assert "toy8; in fp32: transformer: residual stream" in inspected
    assert f"{bundle.path}: toy8, " in CliRunner().invoke(main, ["doctor", str(bundle.path)]).output


def test_a_program_without_it_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PRECISIONS, TOY.name)
    with pytest.raises(BundleError, match=r"its precision is toy8.* knows only fp32, fp16, bf16"):
        Bundle.open(bundle.path)
    with pytest.raises(ConfigError, match="'toy8'; there are fp32, fp16, bf16"):
        request(Path("x"), "toy8")


# Storages that break the rules


@pytest.mark.parametrize(
    "parts",
    [
        {"": (FLOAT32, (4,))},
        {"a.b": (FLOAT32, (4,))},
        {"a\n": (FLOAT32, (4,))},
        {3: (FLOAT32, (4,))},
        {"storage": (FLOAT32, (4,))},
        {"a": ("float33", (4,))},
        {"a": ("save", (4,))},
        {"a": (FLOAT32, (-4,))},
        {"a": FLOAT32},
        None,
    ],
    ids=str,
)
def test_parts_that_no_file_can_hold_are_refused(
    parts: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyColumns, "parts", lambda storage, shape: parts)
    with pytest.raises(ConfigError, match=r"ToyColumns cannot keep a weight of shape \(4, 4\): "):
        Packed(ToyColumns(), (4, 4))


@pytest.mark.parametrize("packed", [{}, {"values": torch.ones(4)}, {"other": torch.ones(4, 4)}])
def test_what_is_packed_must_be_the_parts(
    packed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyColumns, "pack", lambda storage, weight: packed)
    with pytest.raises(ConfigError, match="ToyColumns packs other tensors than its parts say"):
        pack(ToyColumns(), torch.ones(4, 4))


# The entries


@pytest.mark.parametrize(
    ("component", "product", "types"),
    [
        ("transformer", "blocks.qkv", "float32 float16 bfloat16"),
        ("transformer", "text_pool.kv", "float32 float16 bfloat16"),
        ("transformer", "head", "float32 float32 float32"),
        ("transformer", "head_modulation", "float32 float32 float32"),
        ("text_encoder", "blocks.gate_up", "float32 float16 bfloat16"),
        ("text_encoder", "blocks.down", "float32 float32 bfloat16"),
        ("image_encoder", "conv_in", "float32 float32 float32"),
        ("image_decoder", "conv_in", "float32 float32 float32"),
    ],
)
def test_what_is_computed_in_which_type(component: str, product: str, types: str) -> None:
    expected = [Format(name) for name in types.split()]
    assert [named(n).format(component, product) for n in ("fp32", "fp16", "bf16")] == expected


def test_manifests_list_what_stays_in_fp32() -> None:
    stream = (
        "transformer: residual stream, norms, softmax, AdaLN, head, sampling",
        "text_encoder: residual stream, norms, softmax",
        "image_encoder",
        "image_decoder",
    )
    wide = "text_encoder: MLP output projections (past fp16's range in T5-XL)"
    lists = {name: named(name).fp32_exceptions for name in ("fp32", "bf16", "fp16")}
    assert lists == {"fp32": (), "bf16": stream, "fp16": (*stream, wide)}


def test_exactness_is_that_of_fp32() -> None:
    assert [p.name for p in PRECISIONS.values() if p.exact] == ["fp32"]


def test_a_weight_is_of_a_product() -> None:
    names = ("blocks.3.qkv.weight", "text_memory.0.bias", "blocks.0.down", "head.weight")
    assert [*map(product_of, names)] == ["blocks.qkv", "text_memory", "blocks.down", "head"]

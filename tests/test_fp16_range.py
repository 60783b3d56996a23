"""The tool that finds products past fp16's range, on models whose such products are known."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from small_t5 import write_t5
from torch import nn

from varedit_export.graphs.model import GraphTransformer
from varedit_export.graphs.text import GraphTextEncoder
from varedit_nano import fp16_range
from varedit_nano.data import EVALUATION_SEEDS
from varedit_nano.fp16_range import (
    LARGEST,
    LIMIT,
    ProductRange,
    main,
    measure_model,
    measure_text_encoder,
)
from varedit_nano.model import load_nano
from varedit_nano.scenes import draw_edit
from varedit_reference.config import TextEncoderConfig
from varedit_reference.text_encoder import T5_PRODUCTS, TextEncoder
from varedit_runtime.precision import named

INSTRUCTIONS = ["make the sky red", "add a hat", "remove the dog"]
ATTENTION, MLP = "block.{}.layer.0.SelfAttention", "block.{}.layer.1.DenseReluDense"


def planted(folder: Path, factors: Mapping[str, float]) -> Path:
    """Return a small T5 with some of its encoder's weights multiplied."""
    model = write_t5(folder)
    for name, factor in factors.items():
        model.encoder.get_parameter(f"{name}.weight").data.mul_(factor)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def over(folder: Path) -> set[str]:
    products = measure_text_encoder(TextEncoder.load(folder), INSTRUCTIONS)
    return {product.name for product in products if product.over}


@pytest.mark.parametrize(
    ("factors", "found"),
    [
        ({}, set()),
        ({MLP.format(0) + ".wo": 1e5}, {MLP.format(0) + ".wo"}),
        (
            {MLP.format(1) + ".wo": 1e5, ATTENTION.format(0) + ".o": 1e5},
            {MLP.format(1) + ".wo", ATTENTION.format(0) + ".o"},
        ),
        # Neither queries nor keys, but their products.
        (
            {ATTENTION.format(1) + ".q": 300, ATTENTION.format(1) + ".k": 300},
            {ATTENTION.format(1)},
        ),
        # A product that is over, and the one that reads it.
        (
            {MLP.format(0) + ".wi_1": 1e4},
            {MLP.format(0) + ".wi_1", MLP.format(0) + ".wo"},
        ),
    ],
    ids=["none", "one", "two", "scores", "operand"],
)
def test_it_names_exactly_what_was_planted(
    tmp_path: Path, factors: dict[str, float], found: set[str]
) -> None:
    assert over(planted(tmp_path, factors)) == found


def test_the_margin_decides(tmp_path: Path) -> None:
    """The largest value is within fp16's range, but not by the margin."""
    folder = planted(tmp_path, {MLP.format(0) + ".wo": 1e4})
    products = measure_text_encoder(TextEncoder.load(folder), INSTRUCTIONS)
    largest = max(products, key=lambda product: product.largest)
    assert LIMIT < largest.largest < LARGEST and largest.over
    assert not ProductRange("text_encoder", "x", LIMIT).over
    assert ProductRange("text_encoder", "x", float("inf")).over


def test_not_a_number_is_over(tmp_path: Path) -> None:
    encoder = TextEncoder.load(planted(tmp_path, {}))
    encoder.model.get_parameter(MLP.format(0) + ".wo.weight")[0, 0] = float("nan")
    products = measure_text_encoder(encoder, INSTRUCTIONS)
    assert MLP.format(0) + ".wo" in {product.name for product in products if product.over}


@pytest.mark.parametrize(
    ("name", "said", "exit_code"),
    [
        (MLP.format(0) + ".wo", "fp32 in exported graphs", 0),
        (ATTENTION.format(0) + ".o", "FP16 IN EXPORTED GRAPHS", 1),
    ],
)
def test_the_command_tells_what_the_exporter_leaves_in_fp16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str, exit_code: int
) -> None:
    known = [SimpleNamespace(instruction=text) for text in INSTRUCTIONS]
    monkeypatch.setattr(fp16_range, "_edits", lambda count, size: known)
    result = CliRunner().invoke(main, ["--text-encoder", str(planted(tmp_path, {name: 1e5}))])
    assert result.exit_code == exit_code, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("  "))
    assert line.split()[0] == name and line.endswith(said)


def test_a_folder_that_is_no_t5_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--text-encoder", str(tmp_path)])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1


def test_every_product_of_nano_is_seen_and_none_is_over() -> None:
    model = load_nano()
    products = measure_model(model, [draw_edit(EVALUATION_SEEDS[0], 128)])
    components = {
        "text_encoder": model.text_encoder.model,
        "transformer": model.transformer,
        "image_encoder": model.tokenizer.encoder,
        "image_decoder": model.tokenizer.decoder,
    }
    kinds = (nn.Linear, nn.Conv2d)
    for component, root in components.items():
        seen = {product.name for product in products if product.component == component}
        own = {name for name, module in root.named_modules() if isinstance(module, kinds)}
        attentions = {name for name in seen - own if name.lower().endswith(("attention", "_pool"))}
        assert own and seen == own | attentions
        pools = {"text_encoder": 3, "transformer": 2 * model.config.transformer.depth + 1}
        assert len(attentions) == pools.get(component, 0)
    assert not any(product.over for product in products)


def test_the_command_measures_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp16_range, "EDITS", 1)
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines()[1:]] == [
        *("text_encoder", "image_encoder", "transformer", "image_decoder")
    ]


def test_what_is_said_to_be_fp32_is_fp32_in_the_graphs() -> None:
    """Return the matrices that an fp16 model stores in fp32, by the graphs' names."""
    text = TextEncoderConfig(32, 64, 16, 4, 64, 1, 32, 128, 1e-6)
    with torch.device("meta"):
        transformer = GraphTransformer(load_nano().config.transformer, named("fp16"))
        text_encoder = GraphTextEncoder(text, named("fp16"))
    products = {
        name.removesuffix(".weight")
        for name, weight in transformer.named_parameters()
        if name.endswith(".weight") and weight.ndim == 2
    }
    wide = {n for n in products if transformer.get_parameter(f"{n}.weight").dtype != torch.float16}
    assert {n for n in products if ProductRange("transformer", n, 0).in_fp32} == wide
    assert T5_PRODUCTS == {"wo": "blocks.down"}
    block = text_encoder.blocks[0]
    matrices = {n: p.dtype for n, p in block.named_parameters() if p.ndim == 2}
    assert {n for n, dtype in matrices.items() if dtype == torch.float32} == {"down"}

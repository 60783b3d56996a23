"""Numbers that are not finite: named, wherever weights come from and wherever they go."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from bundles import quiet, random_weights, request
from checkpoints import CONFIG, recorded_tokenizer, recorded_transformer
from fake_bundles import rewrite_manifest
from safetensors.torch import load_file, save_file
from small_t5 import write_t5
from torch import Tensor

import varedit_export
from varedit_export.assemble import assemble
from varedit_export.errors import ParityError
from varedit_export.parity.measures import check_output
from varedit_export.plan import BundlePlan
from varedit_export.sources import Sources
from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.weights_file import check_finite, write_safetensors
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import CheckpointError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import FileEntry, canonical_json

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WRONG = (float("nan"), float("inf"), -float("inf"))


def test_fuzz_any_number_in_any_tensor_is_found(cases: Callable[[int], Iterator[Random]]) -> None:
    for random in cases(300):
        shape = [random.randint(1, 40) for _ in range(random.randint(1, 3))]
        tensor = torch.randn(shape).to(random.choice(TYPES))
        if random.random() < 0.3:
            tensor = tensor.T if tensor.ndim == 2 else tensor[::2]
        assert check_finite("w", tensor, random.choice(TYPES)) is tensor
        index = tuple(random.randrange(side) for side in tensor.shape)
        tensor[index] = random.choice(WRONG)
        with pytest.raises(CheckpointError, match=re.escape(f"at {list(index)}: expected finite")):
            check_finite("w", tensor, random.choice((None, *TYPES)))


@pytest.mark.parametrize(
    ("stored", "number", "dtype"),
    [
        (torch.float32, 65520.0, torch.float16),
        (torch.bfloat16, -70144.0, torch.float16),
        (torch.float64, 1e300, torch.float32),
        (torch.float32, 3.4e38, torch.bfloat16),
    ],
)
def test_what_another_type_cannot_hold_is_named(
    stored: torch.dtype, number: float, dtype: torch.dtype
) -> None:
    tensor = torch.zeros(3, 4, dtype=stored)
    tensor[2, 1] = number
    check_finite("w", tensor)
    with pytest.raises(CheckpointError, match=r"w is .* at \[2, 1\], past the range of"):
        check_finite("w", tensor, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_types_and_empty_tensors_pass(dtype: torch.dtype) -> None:
    check_finite("w", torch.ones(3).to(dtype))
    check_finite("w", torch.ones(0, 4).to(dtype))


def test_a_number_just_within_the_range_passes() -> None:
    check_finite("w", torch.tensor([65519.0, -65519.0]), torch.float16)


# Where weights are loaded, written and converted


def planted(state: Mapping[str, Tensor], name: str, index: tuple[int, ...]) -> dict[str, Tensor]:
    edited = {**state, name: state[name].clone()}
    edited[name][index] = float("nan")
    return edited


def test_a_checkpoint_is_loaded_only_if_all_of_it_is_finite(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    transformer = recorded_transformer()
    torch.save(planted(transformer, "cfg_uncond", (511, 3)), path)
    with pytest.raises(CheckpointError, match=r"unconditional_text is nan at \[511, 3\]"):
        load_transformer(path, CONFIG.transformer)
    tokenizer = recorded_tokenizer()
    torch.save(planted(tokenizer, "decoder.conv_out.conv.weight", (0, 0, 2, 2)), path)
    with pytest.raises(CheckpointError, match=r"conv_out.weight is nan at \[0, 0, 2, 2\]"):
        load_tokenizer(path, CONFIG.tokenizer)


def test_a_checkpoint_is_loaded_in_a_type_only_if_that_holds_it(tmp_path: Path) -> None:
    path, name = tmp_path / "weights.pth", "block_chunks.0.module.0.ffn.fc1.weight"
    transformer = recorded_transformer()
    transformer[name][7, 5] = 70000
    torch.save(transformer, path)
    load_transformer(path, CONFIG.transformer)
    with pytest.raises(CheckpointError, match=r"is 70000 at \[7, 5\], past the range of float16"):
        load_transformer(path, CONFIG.transformer, weight_dtype=torch.float16)


def test_a_row_that_no_instruction_reads_is_found_when_a_text_encoder_loads(tmp_path: Path) -> None:
    model = write_t5(tmp_path)
    model.shared.weight.data[31, 0] = float("inf")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is inf at \[31, 0\]"):
        TextEncoder.load(tmp_path)


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(9), "b": torch.tensor([0.0, float("nan")])}
    with pytest.raises(CheckpointError, match=r"the weight b is nan at \[1\]"):
        write_safetensors(tmp_path / "weights.safetensors", tensors, {})
    assert not list(tmp_path.iterdir())


# Bundles


def sources(component: str, name: str, index: tuple[int, ...], number: float) -> Sources:
    """Return random weights with one number changed; the text encoder is a part of its own."""
    drawn = random_weights()
    assert drawn.text is not None
    states = {"transformer": drawn.transformer, "tokenizer": drawn.tokenizer}
    states["text"] = drawn.text.state
    tensor = states[component][name].clone()
    tensor[index] = number
    states[component] = {**states[component], name: tensor}
    text = replace(drawn.text, state=states["text"])
    return replace(
        drawn, transformer=states["transformer"], tokenizer=states["tokenizer"], text=text
    )


NAN = float("nan")
QKV = "blocks.1.self_attention.qkv.weight"
ROWS: Any = [
    ("fp32", "text", "shared.weight", (383, 0), NAN),
    ("fp16", "text", "encoder.block.1.layer.0.SelfAttention.q.weight", (5, 6), 1e5),
    ("fp32", "transformer", "unconditional_text", (511, 0), NAN),
    ("fp32", "transformer", "level_embedding.weight", (14, 3), -float("inf")),
    ("fp32", "transformer", "blocks.1.self_attention.log_scale", (2,), float("inf")),
    ("fp16", "transformer", QKV, (200, 7), 65520),
    ("bf16", "transformer", QKV, (200, 7), 3.4e38),
    ("bf16", "tokenizer", "encoder.conv_in.weight", (0, 0, 0, 0), NAN),
]


@pytest.mark.parametrize(("precision", "component", "name", "index", "number"), ROWS)
def test_one_number_keeps_a_bundle_from_being_built(
    tmp_path: Path,
    precision: str,
    component: str,
    name: str,
    index: tuple[int, ...],
    number: float,
) -> None:
    plan = BundlePlan(
        [request(tmp_path / "bundle", precision)], sources(component, name, index, number)
    )
    named = re.escape(f"the weight {name} is {number:g} at {list(index)}")
    with pytest.raises(CheckpointError, match=named):
        assemble(plan, quiet)
    assert not (tmp_path / "bundle").exists()


def test_what_fp16_keeps_in_fp32_may_be_large(tmp_path: Path) -> None:
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    plan = BundlePlan([request(tmp_path, "fp16")], sources("text", name, (0, 0), 1e5))
    (component,) = (c for c in plan.shared if c.name == "text_encoder")
    (tmp_path / component.file).parent.mkdir(parents=True)
    component.write(tmp_path)
    assert load_file(tmp_path / component.file)["blocks.1.down"].max() == 1e5


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded(), tmp_path / "bundle"))


@pytest.mark.parametrize("component", Bundle.open(embedded()).components)
def test_verify_notices_what_an_earlier_version_published(nano: Path, component: str) -> None:
    bundle = Bundle.open(nano)
    path = bundle.weights_path(component)
    weights = load_file(path)
    name = max(weights)
    weights[name].view(-1)[-1] = float("nan")
    save_file(weights, path)
    content = path.read_bytes()
    file = str(path.relative_to(bundle.path))
    entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    files = {**bundle.manifest.files, file: entry}
    rewrite_manifest(nano, canonical_json(msgspec.structs.replace(bundle.manifest, files=files)))
    with pytest.raises(ParityError, match=rf"{component}: the weight {re.escape(name)} is nan at"):
        varedit_export.verify(nano)


# Pictures of one colour


def test_a_decoder_that_knows_one_colour_only_is_no_decoder() -> None:
    pictures = np.zeros((2, 3, 8, 8), np.float32)
    pictures += np.array([0.1, 0.2, 0.3], np.float32)[:, None, None]
    check_output("image_encoder", "output", pictures)
    with pytest.raises(ParityError, match="image_decoder: output is constant"):
        check_output("image_decoder", "output", pictures)
    pictures[1, 2, 3, 4] = 0.5
    with pytest.raises(ParityError, match="image_decoder: output is constant"):
        check_output("image_decoder", "output", pictures)
    pictures[0, 1, 3, 4] = 0.5
    check_output("image_decoder", "output", pictures)

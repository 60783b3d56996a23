"""Random weights: a function of seed and name alone, and sane through forty blocks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released import write_released_tokenizer, write_released_transformer
from small import random_edits, small_config
from torch import Tensor, nn

from varedit_reference.checkpoint import (
    empty_tokenizer,
    empty_transformer,
    load_tokenizer,
    load_transformer,
)
from varedit_reference.config import ModelConfig
from varedit_reference.initialise import initialise, random_weights
from varedit_reference.quantisation import positions, quantise
from varedit_reference.transformer import VAR
from varedit_runtime.errors import CheckpointError

CONFIG = small_config()


def test_a_seed_gives_one_model_whatever_its_size_and_device() -> None:
    built = initialise(VAR(CONFIG.transformer), seed=4).state_dict()
    empty = initialise(empty_transformer(CONFIG.transformer), seed=4).state_dict()
    deeper = replace(CONFIG.transformer, depth=6)
    longer = dict(random_weights(empty_transformer(deeper), seed=4))
    assert built.keys() == empty.keys()
    for name, tensor in built.items():
        assert torch.equal(tensor, empty[name])
        # The depth scales what a block adds, and draws nothing else differently.
        ratio = (4 / 6) ** 0.5 if name.endswith(("projection.weight", "mlp.2.weight")) else 1.0
        ratio = 1.0 if name.startswith("text_pool") else ratio
        torch.testing.assert_close(longer[name], tensor * ratio)


def test_seeds_and_names_give_different_tensors() -> None:
    first = dict(random_weights(empty_transformer(CONFIG.transformer), seed=1))
    second = dict(random_weights(empty_transformer(CONFIG.transformer), seed=2))
    name, twin = "blocks.0.self_attention.qkv.weight", "blocks.1.self_attention.qkv.weight"
    for other in (second[name], first[twin]):
        assert torch.corrcoef(torch.stack((first[name].flatten(), other.flatten())))[0, 1] < 0.05


def test_parameters_take_the_models_own_types() -> None:
    model = initialise(empty_transformer(CONFIG.transformer, weight_dtype=torch.bfloat16), seed=1)
    exact = dict(random_weights(model, seed=1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact[name].to(parameter.dtype))
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("size", ["tiny-2b", "tiny-8b"])
def test_activations_stay_sane_through_forty_blocks(size: str) -> None:
    config = small_config(size)
    config = replace(config, transformer=replace(config.transformer, depth=40))
    model = initialise(empty_transformer(config.transformer), seed=0)
    steps: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        steps.append((inputs[0], output))

    for block in model.blocks:
        block.register_forward_hook(record)
    edit = random_edits(config, lengths=(6,))
    text = model.condition(model.text_rows(edit.prompts, guided=True))
    cache = model.prefill(edit.source / config.tokenizer.token_channels**0.5, text)
    tokens = torch.randn(1, 4, config.transformer.token_channels)
    tokens /= config.tokenizer.token_channels**0.5
    logits = [
        model.predict(0, None, text, cache),
        model.predict(1, tokens, text, cache),
    ]
    assert len(steps) == 3 * 40
    for before, after in steps:
        assert 0.3 < rms(after) < 5
        assert 0.02 < rms(after - before) / rms(before) < 0.5
        assert after.std(dim=-1).min() > 0.1
    for _, after in steps[:40] + steps[80:]:  # more than one token: they stay distinct
        assert after.std(dim=1).mean() > 0.1
    for block in model.blocks:
        gammas = (text.modulation + block.get_parameter("modulation"))[:, :2]
        assert 0.8 < gammas.mean() < 1.2
        assert gammas.std() < 0.3
    for predicted in logits:
        assert 0.3 < predicted.std() < 5
        assert (predicted[0] - predicted[1]).abs().mean() > 0.01  # the text matters


@pytest.mark.parametrize("size", ["tiny-2b", "tiny-8b", "125m"])
def test_a_random_tokenizer_gives_usable_features_and_pictures(size: str) -> None:
    config = small_config(size)
    tokenizer = initialise(empty_tokenizer(config.tokenizer), seed=0)
    coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = tokenizer.encode(nn.functional.interpolate(coarse, (256, 256), mode="bilinear"))
    assert 0.3 < features.norm(dim=1).mean() < 3
    assert 0.2 < (features > 0).float().mean() < 0.8
    total = features
    for scale in quantise(features, code_grids(config)):
        total = scale.sum
    picture = tokenizer.decode(total)
    assert picture.shape == (1, 3, 256, 256)
    assert 0.2 < picture.std() < 1
    assert picture.abs().quantile(0.9) < 1.5
    assert picture.std(dim=(2, 3)).min() > 0.1


def code_grids(config: ModelConfig) -> list[tuple[int, int]]:
    return [positions(grid, config.tokenizer.patch) for grid in config.transformer.grids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_released_checkpoint_is_the_seeds_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write_released_transformer(CONFIG, 9, tmp_path / "var.pth", dtype, chunks=2)
    write_released_tokenizer(CONFIG, 9, tmp_path / "vae.pth", dtype)
    released = torch.load(tmp_path / "var.pth", weights_only=True)
    recorded = torch.load(Path(__file__).parent / "golden/tiny2b-256/var.pth", weights_only=True)
    assert {n: t.shape for n, t in released.items()} == {
        n: t.shape for n, t in recorded.items() if not n.endswith("zero_k_bias")
    }
    assert {tensor.dtype for tensor in released.values()} == {dtype}
    assert list(torch.load(tmp_path / "vae.pth", weights_only=True)) == ["vae"]
    for model in (
        load_transformer(tmp_path / "var.pth", CONFIG.transformer),
        load_tokenizer(tmp_path / "vae.pth", CONFIG.tokenizer),
    ):
        state = model.state_dict()
        for name, tensor in random_weights(model, seed=9).items():
            assert torch.equal(state[name], tensor.to(dtype).float())
    assert {file.name for file in tmp_path.iterdir()} == {"var.pth", "vae.pth"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=" free and "):
        write_released_transformer(CONFIG, 9, tmp_path / "var.pth", torch.float32)
    assert not list(tmp_path.iterdir())

"""The recorded checkpoint, and how tests of checkpoints compare, shard and refuse."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from varedit_reference.config import preset
from varedit_runtime.errors import CheckpointError

RECORDED = Path(__file__).parent / "golden" / "tiny2b-256"
CONFIG = preset("tiny-2b", 256)

State = dict[str, Tensor]


def recorded_transformer(folder: Path = RECORDED) -> State:
    return torch.load(folder / "var.pth", weights_only=True)


def recorded_tokenizer(folder: Path = RECORDED) -> State:
    return torch.load(folder / "vae.pth", weights_only=True)["vae"]


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def refusal(action: Callable[[], object]) -> str:
    """Return the one line of the CheckpointError that an action raises."""
    with pytest.raises(CheckpointError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def save_shards(state: State, folder: Path, suffix: str = "safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {name: f"model-{i % 3}.{suffix}" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        part = {name: state[name].clone() for name in state if weight_map[name] == shard}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))
    return folder

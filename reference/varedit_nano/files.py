"""Write nano's weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from varedit_reference.weights_file import whole_file


def write_weights(
    path: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights, converted to one type, as a safetensors file: whole or not at all."""
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}
    with whole_file(path, sum(tensor.nbytes for tensor in weights.values())) as partial:
        save_file(weights, partial, {"format": "pt"})

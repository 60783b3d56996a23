"""Training in several processes, a GPU each, with PyTorch's FSDP2; torchrun starts them.

Every process holds a share of each parameter, its gradient and its optimiser state, gathers a
block's parameters when the block is computed, and learns from a share of each batch. A parameter is
then a DTensor. All functions here work in the only process as well.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from varedit_runtime.errors import BackendError, one_line

# Longer than the slowest process takes to download weights or encode its pairs, which the others
# wait for. When a process fails, torchrun ends them.
TIMEOUT = timedelta(days=7)


def started_by_torchrun() -> bool:
    """Return whether this process is one of torchrun's."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(device: str, timeout: timedelta = TIMEOUT) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yield the device of this one.

    Raises BackendError if they cannot be joined.
    """
    if not started_by_torchrun():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    try:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            f"torchrun's processes cannot reach each other ({one_line(error)}): start them again"
        ) from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this process is the one that writes files and shows progress."""
    return rank() == 0


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def summed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scalars summed over all processes."""
    if processes() == 1:
        return dict(values)
    total = torch.stack([*values.values()])
    dist.all_reduce(total)
    return dict(zip(values, total.unbind(), strict=True))


def gathered(content: Any) -> Any:
    """Return nested content with whole tensors on the CPU in place of shares, to the first process.

    All have to call it; the others get none of the tensors, which would fill their memory.
    """
    if isinstance(content, Mapping):
        return {key: gathered(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [gathered(value) for value in content]
    if not isinstance(content, DTensor):
        return content
    full = content.full_tensor()
    return full.cpu() if is_first() else None


def number(scalar: Tensor) -> Tensor:
    """Return a scalar as a plain tensor; all processes have to call it."""
    return scalar.full_tensor() if isinstance(scalar, DTensor) else scalar


def shard(learner: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Let the processes share a learner's parameters, those of each block by themselves.

    A block's keys and values of the text are computed before it runs, so they are apart.
    """
    for block in blocks:
        attention = block.get_submodule("cross_attention")
        fully_shard(attention)
        register_fsdp_forward_method(attention, "project")
        fully_shard(block)
    fully_shard(learner)
    register_fsdp_forward_method(learner, "draw")


def share_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's share of a whole tensor that belongs to a parameter of its shape.

    Whatever has another shape, as counters have, is copied.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.clone()
    mesh = parameter.device_mesh
    local = tensor.to(parameter.to_local().device)
    return distribute_tensor(local, mesh, parameter.placements, src_data_rank=None)

"""Check that a machine's fast path computes the gradients that eager fp32 does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varedit_nano.task import NanoTask
from varedit_runtime.errors import ConfigError

SMALLEST_COSINE = 0.98
LARGEST_NORM_ERROR = 0.1


def check_gradients(task: NanoTask) -> tuple[float, float]:
    """Compare the gradients of one batch on the fast path with those of eager fp32.

    Returns the cosine between them and the ratio of their norms. Raises ConfigError if they
    differ by more than rounding explains: the compiler or the hardware then computes wrongly.
    """
    parts = task.dataset[0]
    exact, fast = (_gradient(task, parts, fast) for fast in (False, True))
    cosine = float(nn.functional.cosine_similarity(exact, fast, dim=0))
    ratio = float(fast.norm() / exact.norm())
    if not (cosine >= SMALLEST_COSINE and abs(ratio - 1) <= LARGEST_NORM_ERROR):
        raise ConfigError(
            f"the fast path's gradients are wrong on this machine: cosine {cosine:.4f} to eager "
            f"fp32's, norm {ratio:.3f} times theirs; train without --compiled, or with --precision "
            "fp32"
        )
    return cosine, ratio


def _gradient(task: NanoTask, parts: Sequence[Any], fast: bool) -> Tensor:
    task.model.zero_grad(set_to_none=True)
    for part in parts:
        task.losses(part, 0, fast)["loss"].backward()
    grads = [p.grad for p in task.model.parameters() if p.grad is not None]
    gradient = torch.cat([grad.flatten() for grad in grads]).double()
    task.model.zero_grad(set_to_none=True)
    return gradient

"""The optimisers of training: Muon for what maps hidden states to others, AdamW for the rest."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from varedit_export.training.parallel import share_like

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Optimisers:
    """Several optimisers of disjoint parameters, used as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state. Raises KeyError or ValueError if it is of other optimisers."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(_shared_out(state[str(i)], part))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal.

    A convolution's kernel is a matrix [out, in times window]. Updates are as large as AdamW's (Liu
    et al. 2025, arXiv 2502.16982), so that one learning rate serves both. PyTorch's Muon takes no
    kernels, and computes in bf16, which processors without such products take twenty times as long
    for.
    """

    def __init__(self, kernels: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(kernels, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is not None:
                    self._update(kernel, kernel.grad, group["lr"], group["weight_decay"])

    def _update(self, kernel: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[kernel]
        mean = state.setdefault("momentum_buffer", torch.zeros_like(kernel))
        mean.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(mean, MOMENTUM).flatten(1)  # Nesterov's
        size = 0.2 * max(ahead.shape) ** 0.5
        kernel.mul_(1 - lr * weight_decay)
        kernel.add_(orthogonalised(ahead).view(kernel.shape), alpha=-lr * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix with singular values near 1 in place of a matrix's own.

    Newton-Schulz: X becomes aX + b(XXᵀ)X + c(XXᵀ)²X, with Jordan's a, b, c and number of steps. All
    factors are polynomials of the first XXᵀ, so the steps are taken on these small matrices.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.T
    one = factor = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(NEWTON_SCHULZ_STEPS):
        step = a * one + b * gram + c * gram @ gram
        factor, gram = step @ factor, step @ gram @ step
    made = factor @ wide
    return made if made.shape == matrix.shape else made.T


def optimisers(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    hidden: tuple[nn.Parameter, ...] = (),
) -> Optimisers:
    """Return Muon for the kernels `hidden`, and AdamW for the rest.

    Vectors (biases, norms, gammas) have no weight decay.
    """
    orthogonal = {id(parameter) for parameter in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in orthogonal]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in rest) or None  # without it, as much scratch as parameters
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
    if not hidden:
        return Optimisers(adamw)
    return Optimisers(adamw, Muon(hidden, learning_rate, weight_decay))


def _shared_out(state: Mapping[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a saved state with this process's shares of what has a parameter's shape."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    shared = {
        number: {
            name: share_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in kept.items()
        }
        for number, kept in state["state"].items()
    }
    return {**state, "state": shared}

"""The optimisers of training: Muon for the matrices between hidden states, AdamW for the rest."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from varedit_export.training.parallel import share_like


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


def optimisers(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    hidden: tuple[nn.Parameter, ...] = (),
) -> Optimisers:
    """Return Muon (Jordan et al. 2024) for the matrices `hidden`, and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that
    one learning rate serves both. Vectors (biases, norms, gammas) have no weight decay.
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
    muon = torch.optim.Muon(
        hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Optimisers(adamw, muon)


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

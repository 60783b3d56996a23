"""Measure the memory that steps of shallow models of 2b's widths take: run it as a script.

    python tests/measure_training.py [RESOLUTION]

Prints, for one and two blocks, the bytes of weights, gradients and optimiser, and the most that all
tensors took at once during forward and backward, or while a pair was drawn; behind each, what
`plan_memory` says of it.
"""

import sys
from dataclasses import replace
from functools import partial

from varedit_export.training.fine_tune import new_learner
from varedit_export.training.loop import TrainingMachine
from varedit_export.training.memory import (
    example_without_content,
    pair_without_content,
    peak_of_tensors,
    plan_memory,
)
from varedit_export.training.optimisers import optimisers
from varedit_reference.config import preset


def main(resolution: int = 256) -> None:
    config, machine = preset("2b", resolution), TrainingMachine(precision="bf16")
    for rank in (None, 32):
        new = partial(new_learner, machine=machine, rank=rank, recompute=True)
        for depth in (1, 2):
            own = replace(config, transformer=replace(config.transformer, depth=depth))
            with peak_of_tensors() as peak:
                learner = new(own).to_empty(device="cpu")
                for parameter in learner.parameters():
                    parameter.data.zero_()  # whatever the numbers are, memory is the same
                learner([example_without_content(own)])["loss"].backward()
                learner.draw(pair_without_content(own), 0)
            trained = [p for p in learner.parameters() if p.requires_grad]
            optimiser = optimisers(learner, 1e-4, 0.02, (0.9, 0.97))
            optimiser.step()
            states = [state for part in optimiser.parts for state in part.state.values()]
            kept = sum(value.nbytes for state in states for value in state.values())
            plan = plan_memory(own, new, 1)
            weights = sum(p.nbytes for p in learner.parameters())
            print(
                f"rank {rank}, {depth} blocks: weights {weights:,}"
                f" ({plan.weights:,}), gradients {sum(p.nbytes for p in trained):,} "
                f"({plan.gradients:,}), optimiser {kept:,} ({plan.optimiser:,}), peak {peak():,} "
                f"({plan.weights + plan.gradients + plan.activations:,})"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

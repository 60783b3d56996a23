"""The same edit alone and in a batch, on one and on two threads: equal but for ties."""

import pytest
import torch
from agreement import compare_scale, compare_until_tie
from small import SmallEdits, noise_of, random_edits, random_var, small_config

from varedit_export.bench import torch_threads
from varedit_reference.sampling import TIE, tie_margin
from varedit_reference.scale_loop import PredictedScale, forced, seeded

SEEDS = (11, 12, 13)


def picture(steps: list[PredictedScale], index: int) -> list[PredictedScale]:
    """Return one picture's part of a batch's scales."""
    part = slice(index, index + 1)
    return [
        PredictedScale(
            step.scale,
            None if step.tokens is None else step.tokens[part],
            step.logits[part],
            step.probability[part],
            step.bits[part],
            step.sum[part],
        )
        for step in steps
    ]


@pytest.fixture(params=["tiny-2b", "tiny-8b"])
def edits(request: pytest.FixtureRequest) -> SmallEdits:
    return random_edits(small_config(request.param))


def test_one_seed_gives_the_same_bits_twice(edits: SmallEdits) -> None:
    model = random_var(edits.config)
    one, other = (edits.run(model, seeded(SEEDS)) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.bits, b.bits)
        assert 0.05 < a.bits.float().mean() < 0.95


@pytest.mark.parametrize("count", [1, 2])
def test_in_a_batch_and_alone(edits: SmallEdits, count: int) -> None:
    model = random_var(edits.config)
    together = edits.run(model, seeded(SEEDS))
    for i, seed in enumerate(SEEDS):
        with torch_threads(count):
            free = edits.run(model, seeded([seed]), pictures=[i])
            forced_bits = [step.bits[i : i + 1] for step in together]
            kept = edits.run(model, forced(forced_bits), pictures=[i])
        noises = [noise_of(edits.config, [seed], step.scale) for step in together]
        for report in compare_until_tie(picture(together, i), free, noises):
            assert report.explained, report
        for a, b, noise in zip(picture(together, i), kept, noises, strict=True):
            redrawn = PredictedScale(
                b.scale, b.tokens, b.logits, b.probability, noise < b.probability, b.sum
            )
            report = compare_scale(a, redrawn, noise)
            assert report.explained, report
            torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=0)


def test_a_difference_that_is_no_tie_is_reported(edits: SmallEdits) -> None:
    model = random_var(edits.config)
    steps = edits.run(model, seeded(SEEDS))
    others = edits.run(model, seeded((14, 15, 16)))
    noises = [noise_of(edits.config, SEEDS, step.scale) for step in steps]
    reports = compare_until_tie(steps, others, noises)
    assert reports[-1].differing > 0
    assert not reports[-1].explained
    assert len(reports) < len(steps)


def test_ties_are_at_the_noise_and_at_the_cut() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -3.4760987]])
    noise = torch.tensor([0.5 + TIE / 2, 0.6, 0.5])
    tied = tie_margin(logits, noise) <= TIE
    assert tied.tolist() == [True, False, True]


def test_nan_is_no_agreement(edits: SmallEdits) -> None:
    step = edits.run(random_var(edits.config), seeded(SEEDS))[0]
    broken = PredictedScale(
        0, None, torch.full_like(step.logits, torch.nan), step.probability, step.bits, step.sum
    )
    assert not compare_scale(step, broken, noise_of(edits.config, SEEDS, 0)).explained

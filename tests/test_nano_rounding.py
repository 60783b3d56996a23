"""What precisions of GPUs change of nano's edits, whose probabilities are of a trained model.

No CPU computes such graphs; the reference rounds every product of the transformer, and its weights,
as the graphs do.
"""

import pytest
import torch
from PIL import Image

from varedit_export.parity.rounding import reference_formats, round_products
from varedit_nano.data import EVALUATION_SEEDS
from varedit_nano.model import load_nano
from varedit_nano.scenes import draw_edit
from varedit_reference.pipeline import VAREdit
from varedit_reference.scale_loop import PredictedScale, forced, predict_scales, seeded
from varedit_reference.transformer import VAR
from varedit_runtime.precision import named

EDITS = 9  # one of each kind


@pytest.fixture(scope="module")
def nano() -> VAREdit:
    return load_nano()


@pytest.fixture(scope="module")
def exact(nano: VAREdit) -> list[PredictedScale]:
    return steps(nano, nano.transformer, None)


@torch.inference_mode()
def steps(nano: VAREdit, model: VAR, exact: list[PredictedScale] | None) -> list[PredictedScale]:
    """Edit unseen scenes; if given the exact model's steps, force its bits at all scales."""
    edits = [draw_edit(seed, nano.config.picture_size[0]) for seed in EVALUATION_SEEDS[:EDITS]]
    features = nano.text_encoder.encode([edit.instruction for edit in edits])
    text = model.condition(model.text_rows(features, guided=True))
    source = nano.read([Image.fromarray(edit.source) for edit in edits])
    choose = seeded(range(EDITS)) if exact is None else forced([step.bits for step in exact])
    config = nano.config
    scales = predict_scales(
        model, config, source, text, choose, config.guidance_scale, config.temperature
    )
    return list(scales)


@pytest.mark.parametrize(
    ("precision", "least"), [("fp16", 0.995), ("bf16", 0.995), ("int8-gpu", 0.985), ("fp8", 0.96)]
)
def test_rounded_products_draw_the_same_bits(
    nano: VAREdit, exact: list[PredictedScale], precision: str, least: float
) -> None:
    rounded = VAR(nano.config.transformer)
    rounded.load_state_dict(nano.transformer.state_dict())
    round_products(rounded, reference_formats(nano.config.transformer, named(precision)))
    choose = seeded(range(EDITS))
    agreeing, bits = 0, 0
    for step, other in zip(exact, steps(nano, rounded.eval(), exact), strict=True):
        assert other.logits.isfinite().all()
        agreeing += int((step.bits == choose(step.scale, other.probability)).sum())
        bits += step.bits.numel()
    assert agreeing / bits >= least
    assert agreeing < bits, "nothing was rounded"

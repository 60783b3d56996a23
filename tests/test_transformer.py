"""The transformer: cached against teacher-forced, conditionings, guidance, precision."""

from dataclasses import replace

import pytest
import torch
from small import SmallEdits, noise_of, random_edits, random_var, small_config
from torch import nn

from varedit_reference.config import Conditioning, RotaryLayout
from varedit_reference.kv_cache import KVCache, source_length, teacher_forced_context
from varedit_reference.sampling import guide
from varedit_reference.sar import scale_aligned_references
from varedit_reference.scale_loop import forced, predict_scales, seeded

CONDITIONINGS: tuple[Conditioning, ...] = ("sar", "finest", "full")


def random_bits(edits: SmallEdits) -> list[torch.Tensor]:
    grids, channels = edits.config.transformer.grids, edits.config.transformer.token_channels
    generator = torch.Generator().manual_seed(9)
    shapes = [(len(edits.prompts), rows * columns, channels) for rows, columns in grids]
    return [torch.rand(shape, generator=generator) < 0.5 for shape in shapes]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("rotary", ["released", "paper"])
@pytest.mark.parametrize("size", ["tiny-2b", "tiny-8b"])
def test_teacher_forced_forward_equals_the_cached_loop(
    size: str, conditioning: Conditioning, rotary: RotaryLayout
) -> None:
    config = small_config(size, conditioning, rotary)
    model, edits = random_var(config), random_edits(config)
    cached = edits.run(model, forced(random_bits(edits)), guidance=3.0, temperature=0.5)
    text = model.condition(model.text_rows(edits.prompts, guided=True))
    inputs = [step.tokens for step in cached if step.tokens is not None]
    at_once = [guide(x, 3.0, 0.5, guided=True) for x in model(edits.source, inputs, text)]
    for step, logits in zip(cached, at_once, strict=True):
        assert torch.isfinite(logits).all()
        assert logits.std() > 0.1
        torch.testing.assert_close(logits, step.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("aspect", ["3:2", "1:3"])
def test_off_squares_as_well(aspect: str, conditioning: Conditioning) -> None:
    config = small_config("tiny-8b", conditioning, aspect=aspect)
    model, edits = random_var(config), random_edits(config, lengths=(3,))
    cached = edits.run(model, forced(random_bits(edits)), guidance=1.0, temperature=1.0)
    inputs = [step.tokens for step in cached if step.tokens is not None]
    at_once = model(edits.source, inputs, model.condition(edits.prompts))
    for step, logits in zip(cached, at_once, strict=True):
        torch.testing.assert_close(logits, step.logits, atol=1e-4, rtol=0)
    (rows, columns), patch = config.transformer.finest, config.tokenizer.patch
    assert cached[-1].sum.shape[2:] == (rows * patch, columns * patch)


def test_conditionings_and_layouts_differ() -> None:
    """Each variant changes the logits, so an equality above cannot come from ignoring it."""
    results = []
    for conditioning in CONDITIONINGS:
        for rotary in ("released", "paper"):
            config = small_config("tiny-2b", conditioning, rotary)
            edits = random_edits(small_config("tiny-2b"))
            if conditioning == "full":
                edits = random_edits(config)
            steps = edits.run(random_var(config), forced(random_bits(edits)))
            results.append(steps[3].logits)
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().max() > 1e-2


def test_sar_references_are_area_averages_and_the_last_is_the_source() -> None:
    source = torch.arange(16.0).reshape(16, 1, 1, 1)
    one, four, all_ = scale_aligned_references(source, [(1, 1), (2, 2), (4, 4)])
    assert one.flatten().tolist() == [7.5]
    assert four.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(all_, source)


def test_sar_changes_block_0_only() -> None:
    """Under SAR block 0 sees a reference of the scale's own size, other blocks the whole source."""
    config = small_config().transformer
    cache = KVCache(config)
    kv = torch.zeros(source_length(config), 2, config.heads, config.head_width)
    for block in (0, 1):
        cache.add_source(block, kv, kv)
    for scale, (rows, columns) in enumerate(config.grids):
        new = kv[: rows * columns]
        before = sum(r * c for r, c in config.grids[:scale])
        seen = [len(cache.add_scale(block, new, new)[0].keys) for block in (0, 1)]
        assert seen == [2 * len(new) + before, len(kv) + before + len(new)]
        cache.scales_seen += 1


def test_teacher_forcing_shows_every_scale_what_the_cache_shows() -> None:
    config = small_config().transformer
    areas = [rows * columns for rows, columns in config.grids]
    n = source_length(config)
    kv = torch.arange(float(n + sum(areas)))[:, None, None, None]
    cache = KVCache(config)
    context = teacher_forced_context(config)
    at_once = [context(block, kv, kv) for block in (0, 1)]
    for block in (0, 1):
        assert torch.equal(at_once[block][0].keys, kv[:n])
        cache.add_source(block, kv[:n], kv[:n])
    for k, new in enumerate(kv[n:].split(areas)):
        for block in (0, 1):
            (alone,) = cache.add_scale(block, new, new)
            together = at_once[block][k + 1]
            assert together.queries == alone.queries == len(new)
            assert torch.equal(together.keys, alone.keys)
            assert torch.equal(together.values, alone.values)
        cache.scales_seen += 1


def test_guidance_of_one_needs_no_unconditional_rows() -> None:
    config = small_config()
    model, edits = random_var(config), random_edits(config)
    bits = random_bits(edits)
    alone = edits.run(model, forced(bits), guidance=1.0)
    with_rows = edits.run(model, forced(bits), guidance=[1.0] * 7)
    other = edits.run(model, forced(bits), guidance=3.0)
    for a, b, c in zip(alone, with_rows, other, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=0)
        assert (a.logits - c.logits).abs().max() > 1e-2


def test_a_negative_prompt_takes_the_unconditional_row() -> None:
    config = small_config()
    model, edits = random_var(config), random_edits(config)
    learned = [model.unconditional_text[: len(p)] for p in edits.prompts]
    plain = model.text_rows(edits.prompts, guided=True)
    same = model.text_rows(edits.prompts, guided=True, negatives=learned)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    negative = model.condition(model.text_rows(edits.prompts, True, edits.prompts[::-1]))
    assert (negative.pooled[3:] - model.condition(plain).pooled[3:]).abs().max() > 1e-3


def test_a_negative_prompt_of_another_length_is_as_without_padding() -> None:
    config = small_config()
    model, edits = random_var(config), random_edits(config)
    prompts, negatives = edits.prompts, [edits.prompts[i] for i in (2, 0, 1)]
    bits = random_bits(edits)
    rows = model.text_rows(prompts, True, negatives)
    guided = predict_scales(
        model, config, edits.source, model.condition(rows), forced(bits), 3.0, 0.5
    )
    conditional = edits.run(model, forced(bits), guidance=1.0)
    unconditional = replace(edits, prompts=negatives).run(model, forced(bits), guidance=1.0)
    for a, b, c in zip(guided, conditional, unconditional, strict=True):
        torch.testing.assert_close(a.logits, 3 * b.logits - 2 * c.logits, atol=1e-4, rtol=0)


def test_guidance_and_temperature_are_those_of_the_scale() -> None:
    config = small_config()
    model, edits = random_var(config), random_edits(config, lengths=(4,))
    bits = random_bits(edits)
    guidance, temperature = [1.0, 2.0, 3.0, 4.0, 0.0, 1.5, 5.0], [0.1, 0.2, 0.5, 1.0, 2.0, 0.7, 3.0]
    mixed = edits.run(model, forced(bits), None, guidance, temperature)
    for k, step in enumerate(mixed):
        uniform = edits.run(model, forced(bits), None, [guidance[k]] * 7, temperature[k])[k]
        torch.testing.assert_close(step.logits, uniform.logits)


def test_text_features_of_any_type_are_normed_in_fp32() -> None:
    """Features in bf16 leave the learned unconditional row exact."""
    config = small_config()
    model, edits = random_var(config), random_edits(config)
    rounded = [prompt.bfloat16() for prompt in edits.prompts]
    exact = [prompt.float() for prompt in rounded]
    one, other = (model.condition(model.text_rows(p, guided=True)) for p in (rounded, exact))
    assert torch.equal(one.pooled, other.pooled)


def test_padding_of_the_text_is_not_seen() -> None:
    config = small_config()
    model, edits = random_var(config), random_edits(config)
    together = model.condition(edits.prompts)
    for i, prompt in enumerate(edits.prompts):
        torch.testing.assert_close(together.pooled[i], model.condition([prompt]).pooled[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_keep_the_stream_norms_and_head_in_fp32(dtype: torch.dtype) -> None:
    config = small_config()
    exact, rounded = random_var(config), random_var(config, dtype)
    edits = random_edits(config)
    streams: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        streams.append(output)

    for block in rounded.blocks:
        block.register_forward_hook(keep)
    bits = random_bits(edits)
    one = edits.run(exact, forced(bits), temperature=1.0)
    other = edits.run(rounded, forced(bits), temperature=1.0)
    assert {x.dtype for x in streams} == {torch.float32}
    assert rounded.state_dict()["blocks.0.mlp.0.weight"].dtype == dtype
    assert {p.dtype for m in (rounded.head, rounded.text_norm) for p in m.parameters()} == {
        torch.float32
    }
    for a, b in zip(one, other, strict=True):
        assert b.logits.dtype == torch.float32
        error = (a.logits - b.logits).abs().max()
        assert 0 < error < 0.05 * a.logits.abs().max()


def test_weights_may_be_stored_smaller_than_they_are_computed_with() -> None:
    config = small_config()
    stored = random_var(config, torch.float32, torch.bfloat16)
    widened = random_var(config)
    widened.load_state_dict(stored.state_dict())
    edits = random_edits(config)
    bits = random_bits(edits)
    assert stored.state_dict()["blocks.0.self_attention.qkv.weight"].dtype == torch.bfloat16
    for a, b in zip(edits.run(stored, forced(bits)), edits.run(widened, forced(bits)), strict=True):
        assert torch.equal(a.logits, b.logits)


def test_seeds_choose_bits_by_picture_and_scale() -> None:
    config = small_config()
    choose = seeded([4, 5])
    probability = torch.full((2, 4, config.transformer.token_channels), 0.5)
    bits = choose(1, probability)
    assert torch.equal(bits, noise_of(config, [4, 5], 1) < 0.5)
    assert torch.equal(choose(1, probability), bits)
    assert torch.equal(seeded([5])(1, probability[:1])[0], bits[1])
    assert not torch.equal(bits[0], bits[1])

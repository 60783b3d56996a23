"""nano's training: what it learns from, and that a run can be killed at any point."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from varedit_export.training.attention import eager_attention
from varedit_export.training.loop import (
    batches,
    ema_decay,
    learning_rate,
    train,
)
from varedit_export.training.optimisers import Muon, optimisers, orthogonalised
from varedit_export.training.run_folder import RunFolder, TrainingState
from varedit_export.training.teacher import bit_losses, flip, lesson, scale_weights
from varedit_nano import train_transformer
from varedit_nano.benchmark import reconstruct
from varedit_nano.check_gradients import check_gradients
from varedit_nano.data import (
    EVALUATION_SEEDS,
    TRAINING_SHARES,
    VALIDATION_SEEDS,
    EditBatch,
    EditBatches,
    PictureBatches,
    step_seeds,
    to_model,
    training_kind,
)
from varedit_nano.export_weights import LARGEST_BYTES, export_weights
from varedit_nano.files import write_weights
from varedit_nano.model import NANO, TOKENIZER_FILE, load_nano, nano
from varedit_nano.scenes import KINDS
from varedit_nano.task import NanoMachine
from varedit_nano.text import build_vocabulary, new_text_encoder
from varedit_nano.train_tokenizer import RECIPE as TOKENIZER_RECIPE
from varedit_nano.train_tokenizer import TokenizerTask, new_tokenizer
from varedit_nano.train_transformer import RECIPE as TRANSFORMER_RECIPE
from varedit_nano.train_transformer import (
    SOURCE_PASSES,
    EditModel,
    TransformerTask,
    new_transformer,
)
from varedit_nano.training import NanoRecipe, run_training, tokenizer_options
from varedit_reference.config import ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.initialise import initialise
from varedit_reference.quantisation import quantise, to_tokens
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import fused_attention
from varedit_runtime.errors import CheckpointError, ConfigError

GRIDS = ((1, 1), (2, 2))
TINY = ModelConfig(
    "tiny-nano",
    TokenizerConfig(bits=4, downsampling=8, channels=24, multipliers=(1, 1, 1, 1)),
    TransformerConfig(
        depth=2,
        width=64,
        heads=2,
        token_channels=4,
        text_channels=128,
        grids=GRIDS,
        table_grids=GRIDS,
        rotary="paper",
    ),
)
INSTRUCTIONS = ["add a hat", "remove the dog", "make the sky red"]
NEVER = 10**6


@pytest.fixture(autouse=True)
def gradients(no_gradients: None) -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def features(generator: torch.Generator, side: int = 16, bits: int = 6) -> Tensor:
    return torch.randn(3, bits, side, side, generator=generator) / 2


def tokenizer_task(recipe: NanoRecipe, machine: NanoMachine) -> TokenizerTask:
    return TokenizerTask(new_tokenizer(TINY.tokenizer, 0), recipe, machine, GRIDS)


def transformer_task(
    recipe: NanoRecipe, machine: NanoMachine, config: ModelConfig = TINY
) -> TransformerTask:
    torch.manual_seed(0)
    vocabulary = build_vocabulary(INSTRUCTIONS)
    model = EditModel(new_transformer(config, 0), new_text_encoder(vocabulary, 128))
    tokenizer = new_tokenizer(config.tokenizer, 0).requires_grad_(False)
    return TransformerTask(config, model, tokenizer, vocabulary, recipe, machine)


BuildTask = Callable[[NanoRecipe, NanoMachine], Any]
TASKS = pytest.mark.parametrize(
    ("build", "recipe"),
    [(tokenizer_task, TOKENIZER_RECIPE), (transformer_task, TRANSFORMER_RECIPE)],
    ids=["tokenizer", "transformer"],
)


class Killed(Exception):
    pass


def flat(content: Any) -> list[Any]:
    """Return the leaves of a checkpoint; tensors as lists."""
    if isinstance(content, dict):
        return [leaf for key in sorted(content, key=str) for leaf in flat(content[key])]
    if isinstance(content, list | tuple):
        return [leaf for item in content for leaf in flat(item)]
    return content.flatten().tolist() if isinstance(content, Tensor) else [content]


@TASKS
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    build: BuildTask, recipe: NanoRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, steps=5, batch=2, warmup=2)
    machine = NanoMachine(log_every=1, save_every=2, report_every=NEVER)
    through, resumed = RunFolder(tmp_path / "through"), RunFolder(tmp_path / "resumed")
    seen: list[tuple[int, float]] = []

    def losses_until(task: Any, last: int) -> Callable[..., dict[str, Tensor]]:
        def losses(batch: Any, step: int, fast: bool = True) -> dict[str, Tensor]:
            if step == last:
                raise Killed
            pictures = batch.source if isinstance(batch, EditBatch) else batch
            seen.append((step, float(pictures.float().mean())))
            return type(task).losses(task, batch, step, fast)

        return losses

    def run(folder: RunFolder, last: int) -> None:
        task = build(recipe, machine)
        monkeypatch.setattr(task, "losses", losses_until(task, last))
        monkeypatch.setattr(task, "report", lambda model: ({}, Image.new("RGB", (1, 1))))
        train(task, recipe, machine, folder)

    run(through, last=NEVER)
    whole, seen = seen, []
    with pytest.raises(Killed):
        run(resumed, last=3)  # one step behind the checkpoint
    run(resumed, last=NEVER)
    contents = [torch.load(f.checkpoint, weights_only=True) for f in (through, resumed)]
    assert flat(contents[0]) == flat(contents[1])
    assert contents[0]["step"] == 5
    assert through.log_file.read_text() == resumed.log_file.read_text()
    assert seen == [*whole[:3], *whole[2:]]
    assert len({mean for _, mean in whole}) == 5


@TASKS
def test_it_learns(build: BuildTask, recipe: NanoRecipe, tmp_path: Path) -> None:
    recipe = replace(recipe, steps=40, batch=2, warmup=1)
    machine = NanoMachine(log_every=10, save_every=NEVER, report_every=NEVER)
    task = build(recipe, machine)
    [first] = task.dataset[0]
    before = task.losses(first, 0, False)["loss"].item()
    state = TrainingState.start(task.model, optimisers(task.model, 3e-3, 0.01, (0.9, 0.999)))
    for _ in range(40):
        loss = task.losses(first, 0, False)["loss"]
        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
    assert task.losses(first, 0, False)["loss"].item() < 0.8 * before


def test_a_run_starts_from_the_averaged_weights_of_another(tmp_path: Path) -> None:
    options = {"steps": 2, "batch": 1, "learning_rate": 0.1, "check_gradients": False}
    machine = {"log_every": 1, "save_every": 1, "report_every": NEVER}

    def run(name: str, start_from: str | None) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        start = None if start_from is None else tmp_path / start_from / "ema"
        more = {"run": folder.folder, "start_from": start} | options | machine
        run_training(quiet_task, TOKENIZER_RECIPE, {}, **more)
        return folder

    seen: list[Tensor] = []
    pictures: list[Tensor] = []
    tasks: list[TokenizerTask] = []

    def quiet_task(recipe: NanoRecipe, machine: NanoMachine) -> TokenizerTask:
        task = tokenizer_task(recipe, machine)
        tasks.append(task)
        losses = task.losses
        task.report = lambda model: ({}, Image.new("RGB", (1, 1)))  # type: ignore[method-assign]

        def first_seen(batch: Tensor, step: int, fast: bool = True) -> dict[str, Tensor]:
            if step == 0:
                seen.append(next(task.model.parameters()).detach().clone())
                pictures.append(batch)
            return losses(batch, step, fast)

        task.losses = first_seen  # type: ignore[method-assign]
        return task

    one = run("one", None)
    run("two", "one")
    assert [task.quantised_share(0) for task in tasks] == [0, 1]
    averaged = torch.load(one.checkpoint, weights_only=True)["ema"]
    assert torch.equal(seen[1], next(iter(averaged.values())))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(pictures[0], pictures[1])
    with pytest.raises(ConfigError, match="start_from"):
        run("two", None)
    with pytest.raises(CheckpointError, match="missing"):
        run("three", "missing")


def test_a_transformer_starts_from_one_that_was_trained_on_other_bits(tmp_path: Path) -> None:
    task = transformer_task(TRANSFORMER_RECIPE, NanoMachine())
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter += 1
    task.export(task.model, tmp_path)
    wider = replace(
        TINY,
        tokenizer=replace(TINY.tokenizer, bits=6),
        transformer=replace(TINY.transformer, token_channels=6),
    )
    other = transformer_task(TRANSFORMER_RECIPE, NanoMachine(), wider)
    before = {name: weight.clone() for name, weight in other.model.state_dict().items()}
    other.restore(tmp_path)
    trained, started = task.model.state_dict(), other.model.state_dict()
    new = {"transformer.token_embedding.weight", "transformer.token_embedding.bias"}
    new |= {"transformer.head.weight", "transformer.head.bias"}
    for name, weight in started.items():
        assert torch.equal(weight, before[name] if name in new else trained[name]), name


def test_the_sizes_of_a_tokenizer_are_options() -> None:
    sizes: list[TokenizerConfig] = []
    command = click.command()(tokenizer_options(lambda size: sizes.append(size)))
    for arguments in ([], ["--bits", "32", "--multipliers", "1", "2", "4", "8"]):
        assert CliRunner().invoke(command, arguments).exit_code == 0
    wider = replace(NANO.tokenizer, bits=32, multipliers=(1, 2, 4, 8))
    assert sizes == [NANO.tokenizer, wider]
    assert nano("finest", wider).transformer.token_channels == 32


def test_a_run_keeps_its_options(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.keep_options({"steps": 5, "betas": (0.9, 0.97)})
    folder.keep_options({"steps": 5, "betas": (0.9, 0.97)})
    with pytest.raises(ConfigError, match="steps 5, not 6"):
        folder.keep_options({"steps": 6, "betas": (0.9, 0.97)})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for width in (3, 4):
        model = nn.Linear(width, 1)
        state = TrainingState.start(model, optimisers(model, 1e-3, 0.01, (0.9, 0.999)))
        if width == 3:
            folder.save(state)
        else:
            with pytest.raises(CheckpointError, match="another run folder"):
                folder.resume(state)


def test_a_half_written_log_line_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log_file.write_text('{"step": 0, "loss": 1}\n{"step": 9, "loss": 1}\n{"step": 0, "l')
    model = nn.Linear(1, 1)
    folder.resume(TrainingState.start(model, optimisers(model, 1e-3, 0.01, (0.9, 0.999))))
    assert folder.log_file.read_text() == '{"step": 0, "loss": 1}\n'


def test_a_wrong_fast_path_is_refused() -> None:
    recipe = replace(TOKENIZER_RECIPE, steps=10, batch=2)
    grids = ((1, 1), (8, 8))
    task = TokenizerTask(
        new_tokenizer(TINY.tokenizer, 0), recipe, NanoMachine(precision="bf16"), grids
    )
    cosine, ratio = check_gradients(task)
    assert cosine > 0.98
    assert abs(ratio - 1) < 0.1

    class Wrong(TokenizerTask):
        def losses(self, batch: Tensor, step: int, fast: bool = True) -> dict[str, Tensor]:
            parts = super().losses(batch, step, fast)
            return {"loss": parts["edges"] if fast else parts["loss"]}

    with pytest.raises(ConfigError, match="cosine"):
        check_gradients(Wrong(new_tokenizer(TINY.tokenizer, 0), recipe, NanoMachine(), GRIDS))


def test_the_transformer_computes_in_bf16_with_nearly_the_same_gradients() -> None:
    recipe = replace(TRANSFORMER_RECIPE, steps=10, batch=2)
    task = transformer_task(recipe, NanoMachine(precision="bf16"))
    cosine, _ = check_gradients(task)
    assert 0.98 < cosine < 1
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}


def test_eager_attention_is_fused_attention(generator: torch.Generator) -> None:
    def drawn(length: int) -> torch.Tensor:
        q = 1 + 4 * torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
        return q.requires_grad_()

    q, k, v, given = drawn(5), drawn(7), drawn(7), drawn(5).detach()
    results = [attend(q, k, v) for attend in (eager_attention, fused_attention)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(result, (q, k, v), given) for result in results]
    for eager, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, fused, rtol=0, atol=1e-12 * float(fused.abs().max()))


def test_batches_depend_on_the_step_alone() -> None:
    dataset = PictureBatches(batch=2, size=16)
    drawn = list(batches(dataset, range(3, 6), workers=2))
    assert [torch.equal(drawn[i][0], dataset[3 + i][0]) for i in range(3)] == [True] * 3
    assert not torch.equal(dataset[3][0], dataset[4][0])
    [edits] = EditBatches(batch=2, size=16)[7]
    assert edits.source.shape == edits.target.shape == (2, 16, 16, 3)
    assert len(edits.instructions) == 2


def test_training_draws_every_kind_in_its_share() -> None:
    assert set(TRAINING_SHARES) == set(KINDS)
    assert sum(TRAINING_SHARES.values()) == pytest.approx(1)
    kinds = [training_kind(seed) for seed in range(2000)]
    for kind, share in TRAINING_SHARES.items():
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.03)


def test_training_seeds_are_no_others() -> None:
    reserved = [*EVALUATION_SEEDS[:: len(EVALUATION_SEEDS) - 1], *VALIDATION_SEEDS[::999_999]]
    assert len(reserved) == 4
    for step in (0, 1, 1000):
        assert min(step_seeds(step, 8)) > max(reserved)
    assert not set(step_seeds(0, 8)) & set(step_seeds(1, 8))
    assert VALIDATION_SEEDS.start >= EVALUATION_SEEDS.stop


@pytest.mark.parametrize("patch", [1, 2])
def test_unflipped_targets_are_the_tokenizers_own_bits(
    patch: int, generator: torch.Generator
) -> None:
    grids = ((1, 1), (2, 2), (3, 3), (8, 8))
    given = features(generator, side=8 * patch)
    taught = lesson(given, grids, patch, generator, largest_flip_rate=0.0)
    scales = list(quantise(given, [(rows * patch, columns * patch) for rows, columns in grids]))
    for bits, scale in zip(taught.bits, scales, strict=True):
        assert torch.equal(bits, to_tokens(scale.bits.float(), patch).bool())
    assert torch.equal(taught.inputs[-1], to_tokens(scales[-2].sum, patch))


def test_self_correction_flips_inputs_only_and_later_targets_mend_it(
    generator: torch.Generator,
) -> None:
    given = features(generator)
    grids = ((4, 4), (16, 16), (16, 16))
    exact = lesson(given, grids, 1, generator, largest_flip_rate=0.0)
    taught = lesson(given, grids, 1, generator)
    assert torch.equal(taught.bits[0], exact.bits[0])
    assert not torch.equal(taught.inputs[0], exact.inputs[0])
    # Inputs on the finest grid are the sum so far; targets are the signs of what it leaves.
    tokens = to_tokens(given, 1)
    assert torch.equal(taught.bits[1], tokens - taught.inputs[0] > 0)
    assert torch.equal(taught.bits[2], tokens - taught.inputs[1] > 0)
    flipped = (taught.inputs[1] - taught.inputs[0] > 0) ^ taught.bits[1]
    assert 0 < flipped.float().mean() < 0.3


def test_flip_rates_differ_between_pictures(generator: torch.Generator) -> None:
    bits = torch.zeros(400, 4, 16, 16, dtype=torch.bool)
    rates = flip(bits, 0.3, generator).float().mean((1, 2, 3))
    assert 0.13 < rates.mean() < 0.17
    assert rates.min() < 0.03
    assert 0.27 < rates.max() < 0.34


def test_loss_weights() -> None:
    grids = NANO.transformer.grids
    weights = scale_weights(grids)
    assert sum(weights) == pytest.approx(1)
    per_token = [w / (r * c) for w, (r, c) in zip(weights, grids, strict=True)]
    assert [w / per_token[0] for w in per_token] == pytest.approx([1 / r for r, _ in grids])


def test_the_loss_is_the_two_way_cross_entropy(generator: torch.Generator) -> None:
    logits = torch.randn(2, 5, 3, 2, generator=generator)
    bits = torch.rand(2, 5, 3, generator=generator) < 0.5
    expected = F.cross_entropy(logits.flatten(0, 2), bits.flatten().long())
    [by_picture] = bit_losses([logits], [bits])
    torch.testing.assert_close(by_picture.mean(), expected)


def test_text_is_dropped_now_and_then() -> None:
    task = transformer_task(TRANSFORMER_RECIPE, NanoMachine())
    with torch.no_grad():
        task.model.transformer.unconditional_text.fill_(7)
        rows = task._text_rows(["add a hat"] * 600, torch.Generator().manual_seed(0))
    dropped = np.mean([bool((row == 7).all()) for row in rows])
    assert 0.06 < dropped < 0.14
    assert len({tuple(row.shape) for row in rows}) == 1


def test_quantisation_sets_in_gradually() -> None:
    task = tokenizer_task(replace(TOKENIZER_RECIPE, steps=1000), NanoMachine())
    shares = [task.quantised_share(step) for step in range(1000)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(set(shares)) > 100


def test_gradients_pass_through_the_bits() -> None:
    task = tokenizer_task(replace(TOKENIZER_RECIPE, steps=10, batch=2), NanoMachine())
    [first] = task.dataset[0]
    loss = task.losses(first, 9, False)["absolute"]
    loss.backward()
    gradient = task.model.encoder.conv_in.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


def test_schedules() -> None:
    recipe = replace(TRANSFORMER_RECIPE, steps=100, warmup=10, learning_rate=1.0, ema_decay=0.9)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 90)
    assert ema_decay(recipe, 1) < 0.2
    assert ema_decay(recipe, 10**6) == 0.9


def test_blocks_start_by_adding_little() -> None:
    model = new_transformer(TINY, 0)
    pooled = torch.randn(5, TINY.transformer.width)
    shared = model.shared_modulation(F.silu(pooled)).unflatten(1, (6, -1))
    for block in model.blocks:
        gammas, rest = (shared + block.get_parameter("modulation")).split((2, 4), dim=1)
        assert gammas.abs().max() < 0.02
        assert rest.abs().max() > 0.1


def test_unknown_words_fall_apart() -> None:
    vocabulary = build_vocabulary(INSTRUCTIONS)
    known = vocabulary.encode("ADD a hat", add_special_tokens=False)
    assert len(known.ids) == 3
    unknown = vocabulary.encode("bedazzle Zürich ☃!", add_special_tokens=False)
    assert "<unk>" in unknown.tokens
    assert unknown.tokens.count("<unk>") == 1
    letters = "".join(unknown.tokens).replace("▁", "").replace("<unk>", "")
    assert letters == "bedazzlezurich!"


def test_nano_ships_small_and_loads_as_it_was(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(INSTRUCTIONS)
    task = TransformerTask(
        NANO,
        EditModel(new_transformer(NANO, 0), new_text_encoder(vocabulary, 128)),
        initialise(Tokenizer(NANO.tokenizer), 0),
        vocabulary,
        TRANSFORMER_RECIPE,
        NanoMachine(),
    )
    task.export(task.model, tmp_path / "run" / "ema")
    tokenizer = tmp_path / TOKENIZER_FILE
    write_weights(tokenizer, task.tokenizer.state_dict())
    size = export_weights(tokenizer, tmp_path / "run", tmp_path / "nano")
    assert size <= LARGEST_BYTES
    model = load_nano(tmp_path / "nano")
    for name, weight in task.model.transformer.state_dict().items():
        loaded = model.transformer.state_dict()[name]
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, weight, rtol=1e-3, atol=1e-4)
    again = TransformerTask(
        NANO,
        EditModel(new_transformer(NANO, 1), new_text_encoder(vocabulary, 128)),
        task.tokenizer,
        vocabulary,
        TRANSFORMER_RECIPE,
        NanoMachine(),
    )
    again.restore(tmp_path / "nano")  # what ships can be trained on
    for name, weight in again.model.transformer.state_dict().items():
        assert torch.equal(weight, model.transformer.state_dict()[name])
    restored = again.model.text_encoder.state_dict()
    for name, weight in model.text_encoder.model.state_dict().items():
        assert torch.equal(restored[name], weight)
    again.text = TextEncoder(again.model.text_encoder, build_vocabulary(["other words"]))
    with pytest.raises(ConfigError, match="another vocabulary"):
        again.restore(tmp_path / "nano")
    expected = task.text.encode(["add a hat"])[0]
    torch.testing.assert_close(
        model.text_encoder.encode(["add a hat"])[0], expected, atol=0.05, rtol=0
    )
    assert json.loads((tmp_path / "nano/text_encoder/config.json").read_text())["d_model"] == 128


def test_muon_trains_the_matrices_between_hidden_states() -> None:
    recipe = replace(TRANSFORMER_RECIPE, steps=1, batch=1)
    task = transformer_task(recipe, NanoMachine())
    names = {id(p): name for name, p in task.model.named_parameters()}
    hidden = [names[id(parameter)] for parameter in task.hidden]
    assert len(set(hidden)) == len(hidden) and all(p.ndim == 2 for p in task.hidden)
    for name in (
        "transformer.blocks.0.self_attention.qkv.weight",
        "transformer.blocks.1.mlp.2.weight",
        "transformer.text_memory.0.weight",
        "text_encoder.block.0.layer.1.DenseReluDense.wo.weight",
    ):
        assert name in hidden
    for part in (
        "embed",
        "head",
        "modulation",
        "text_pool.query",
        "relative_attention_bias",
        "norm",
    ):
        assert not any(part in name for name in hidden), part
    model, options = task.model, (1e-3, 0.01, (0.9, 0.99))
    adamw, muon = optimisers(model, *options, task.hidden).parts
    trained = [[id(p) for g in part.param_groups for p in g["params"]] for part in (adamw, muon)]
    assert sorted(trained[0] + trained[1]) == sorted(names)
    assert trained[1] == [id(parameter) for parameter in task.hidden]


def test_muon_trains_the_tokenizers_kernels_but_not_its_ends() -> None:
    recipe = replace(TOKENIZER_RECIPE, steps=1, batch=1)
    task = tokenizer_task(recipe, NanoMachine())
    hidden = {id(parameter) for parameter in task.hidden}
    names = {name for name, p in task.model.named_parameters() if id(p) not in hidden}
    kernels = {name for name, p in task.model.named_parameters() if p.ndim == 4}
    ends = {
        f"{part}.{end}.weight" for part in ("encoder", "decoder") for end in ("conv_in", "conv_out")
    }
    assert names & kernels == ends and len(hidden) == len(kernels) - len(ends)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_is_pytorchs_but_for_rounding(shape: tuple[int, int]) -> None:
    start, gradients = torch.randn(shape), torch.randn(20, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([ours], lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bf16 rounds PyTorch's matrices by 1 % or so


def test_muon_takes_a_kernel_as_a_matrix() -> None:
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(kernel.shape)
    matrix.grad = kernel.grad.flatten(1).clone()
    Muon([kernel, matrix], lr=1e-2, weight_decay=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=1e-7)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrix = torch.randn(24, 200, dtype=torch.float64)
    made = orthogonalised(matrix)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3  # Jordan's coefficients do not converge to 1
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    alike = torch.einsum("ij,ij->", made, left @ right) / made.norm() / (left @ right).norm()
    assert alike > 0.98
    torch.testing.assert_close(orthogonalised(matrix.T), made.T)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_sources_go_through_the_tokenizer_before_an_edit(
    passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_nano()
    shares = tuple(float(count == passes) for count in range(3))
    monkeypatch.setattr(train_transformer, "SOURCE_PASSES", shares)
    task = transformer_task(replace(TRANSFORMER_RECIPE, batch=2), NanoMachine(), NANO)
    task.tokenizer = model.tokenizer
    [batch] = task.dataset[0]
    source, target = task._encode(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pictures = batch.source.numpy()
        for _ in range(passes):
            pictures = np.stack(reconstruct(model, list(pictures)))
        wanted = model.tokenizer.encode(to_model(torch.from_numpy(pictures)))
        torch.testing.assert_close(source, wanted)
        torch.testing.assert_close(target, model.tokenizer.encode(to_model(batch.target)))


def test_sources_are_passed_by_the_shares() -> None:
    task = transformer_task(replace(TRANSFORMER_RECIPE, batch=2), NanoMachine(), TINY)
    given = torch.randn(400, 4, 2, 2)
    passed = task._passed(given.clone(), torch.Generator().manual_seed(0))
    unchanged = (passed == given).all((1, 2, 3)).float().mean()
    assert abs(unchanged - SOURCE_PASSES[0]) < 0.08  # three standard deviations
    assert sum(SOURCE_PASSES) == pytest.approx(1)

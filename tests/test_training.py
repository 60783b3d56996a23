"""Fine-tuning: what a step learns, that a run can be killed, what it writes, and what it takes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

import varedit_export
from varedit_export import TrainOptions
from varedit_export.errors import ExportError
from varedit_export.options import BuildOptions
from varedit_export.resolve_options import model_and_weights
from varedit_export.training import run
from varedit_export.training.fine_tune import (
    TRANSFORMER,
    FineTuning,
    Lessons,
    fill,
    new_learner,
)
from varedit_export.training.learner import Learner, PairTokens, make_example
from varedit_export.training.loop import TrainingMachine
from varedit_export.training.memory import pair_without_content, peak_of_tensors, plan_memory
from varedit_export.training.run import plan_training
from varedit_export.training.tokens import tokens_of
from varedit_export.weights.lora import TRAINED, merge_loras
from varedit_reference.checkpoint import NamedShape, load_transformer, released_transformer
from varedit_reference.config import ModelConfig, preset
from varedit_reference.initialise import random_weights
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import ConfigError

TINY = preset("tiny-2b", 256)
NEVER = 10**6


@pytest.fixture(autouse=True)
def gradients(no_gradients: None) -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_pairs(tmp_path_factory.mktemp("pairs"))


def written_pairs(folder: Path) -> Path:
    """Write twelve pairs of noise as JSON lines, of which one has a mask and one a weight."""
    chance = np.random.default_rng(0)
    lines = []
    for number in range(12):
        row = {"instruction": f"turn it by {number}"}
        for name in ("source", "target"):
            row[name] = f"{name}{number}.png"
            pixels = chance.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(folder / row[name])
        lines.append(row | ({"weight": 3.0} if number == 5 else {}))
    Image.new("L", (64, 64), 255).save(folder / "mask.png")
    lines[7]["mask"] = "mask.png"
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def options(pairs: Path, output: Path, **given: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "size": "tiny-2b",
        "resolution": 256,
        "random_weights": 0,
        "steps": 4,
        "batch": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
        "save_every": 2,
        "report_every": NEVER,
        "cache": pairs.parent / "tokens",
    }
    return TrainOptions(data=(pairs,), output=output, **settings | given)


def leaves(content: Any) -> list[Any]:
    """Return what a checkpoint holds, in order, tensors as their bytes."""
    if isinstance(content, dict):
        return [leaf for key in content for leaf in (key, *leaves(content[key]))]
    if isinstance(content, list | tuple):
        return [leaf for item in content for leaf in leaves(item)]
    return [content.numpy().tobytes() if isinstance(content, Tensor) else content]


class Killed(Exception):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    losses = FineTuning.losses

    def dying(task: FineTuning, batch: Any, now: int) -> dict[str, Tensor]:
        if now == step:
            raise error
        return losses(task, batch, now)

    monkeypatch.setattr(FineTuning, "losses", dying)


@pytest.fixture(autouse=True)
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = ({}, Image.new("RGB", (1, 1)))
    monkeypatch.setattr(FineTuning, "report", lambda task, model: nothing)


@pytest.mark.parametrize("lora", [None, 2], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_bit(
    lora: int | None, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimiser, random mistakes and the place in the data are those of one run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = varedit_export.train(options(pairs, whole, lora=lora))
    with monkeypatch.context() as patch:
        die_at(patch, 3, Killed)
        with pytest.raises(Killed):
            varedit_export.train(options(pairs, killed, lora=lora))
    again = varedit_export.train(options(pairs, killed, lora=lora))
    assert again.read_bytes() == result.read_bytes()
    names = ("log.jsonl", "options.json")
    assert [(whole / n).read_text() for n in names] == [(killed / n).read_text() for n in names]
    kept = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, killed)]
    assert leaves(kept[0]) == leaves(kept[1])
    logged = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 4]
    assert {"rate", "loss", "scale1", "scale7", "gradient"} <= logged[0].keys()


def test_ctrl_c_keeps_the_last_step(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    die_at(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        varedit_export.train(options(pairs, tmp_path, lora=2), told.append)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert "saved after 3 steps; the same command continues" in told[-1]


def test_training_that_diverged_ends(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = FineTuning.losses

    def diverging(task: FineTuning, *given: Any) -> dict[str, Tensor]:
        return {name: loss * torch.nan for name, loss in losses(task, *given).items()}

    monkeypatch.setattr(FineTuning, "losses", diverging)
    with pytest.raises(ConfigError, match=r"loss is nan at step 1, .* another folder .* smaller"):
        varedit_export.train(options(pairs, tmp_path, lora=2))
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("stopped", [False, True], ids=["saved", "ctrl-c"])
def test_a_diverged_model_replaces_no_checkpoint(
    stopped: bool, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient alone is no number, at a step whose loss is not logged."""
    losses = FineTuning.losses

    def diverging(task: FineTuning, batch: Any, step: int) -> dict[str, Tensor]:
        if stopped and step == 3:
            raise KeyboardInterrupt
        made = losses(task, batch, step)
        if step == 2 + (not stopped):
            made["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return made

    monkeypatch.setattr(FineTuning, "losses", diverging)
    with pytest.raises(KeyboardInterrupt if stopped else ConfigError) as raised:
        varedit_export.train(options(pairs, tmp_path, lora=2, steps=6, log_every=NEVER))
    assert stopped or "the gradient is nan at step 4" in str(raised.value)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_a_run_that_stopped_at_its_end_writes_its_result(
    error: type[BaseException], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = varedit_export.train(options(pairs, tmp_path / "whole", lora=2)).read_bytes()
    stopped, count = options(pairs, tmp_path / "stopped", lora=2), 0
    export = FineTuning.export

    def failing(task: FineTuning, *given: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise error
        export(task, *given)

    monkeypatch.setattr(FineTuning, "export", failing)
    with pytest.raises(error):
        varedit_export.train(stopped)
    assert varedit_export.train(stopped).read_bytes() == expected


def test_what_a_report_fails_on_is_saved(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(task: FineTuning, model: Any) -> None:
        raise Killed

    monkeypatch.setattr(FineTuning, "report", failing)
    with pytest.raises(Killed):
        varedit_export.train(options(pairs, tmp_path, lora=2, report_every=2))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_run_goes_on_with_the_same_data_and_recipe_alone(pairs: Path, tmp_path: Path) -> None:
    run_options = options(pairs, tmp_path, lora=2, steps=1)
    varedit_export.train(run_options)
    with pytest.raises(ConfigError, match="lora 2, not 3"):
        varedit_export.train(replace(run_options, lora=3))
    other = pairs.with_name("other.jsonl")
    other.write_text("".join(pairs.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(ConfigError, match="was started with data"):
        varedit_export.train(replace(run_options, data=(other,)))


def test_a_run_does_not_go_on_with_other_encoders(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is told before anything is computed."""
    varedit_export.train(options(pairs, tmp_path, lora=2, steps=1))
    read = run.model_and_weights

    def other(*given: Any) -> Any:
        config, sources = read(*given)
        tokenizer = {name: weight + 1 for name, weight in sources.tokenizer.items()}
        return config, replace(sources, tokenizer=tokenizer)

    monkeypatch.setattr(run, "model_and_weights", other)
    monkeypatch.setattr(run, "_task", None)
    with pytest.raises(ConfigError, match="was started with encoders"):
        varedit_export.train(options(pairs, tmp_path, lora=2, steps=1))


def test_one_process_trains_in_a_folder(pairs: Path, tmp_path: Path) -> None:
    left, kept = tmp_path / f".{'0a' * 16}", tmp_path / ".mine"
    for folder in (left, kept):
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(b"half")
    given = options(pairs, tmp_path, lora=2, steps=1)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ConfigError, match="another process trains in"),
    ):
        varedit_export.train(given)
    assert left.exists()
    varedit_export.train(given)
    assert not left.exists() and kept.exists()


def test_pairs_at_once_change_no_result(pairs: Path, tmp_path: Path) -> None:
    states = []
    for at_once in (1, 4):
        folder = tmp_path / str(at_once)
        settings = {"lora": 2, "batch": 4, "steps": 2, "at_once": at_once}
        states.append(open_weights(varedit_export.train(options(pairs, folder, **settings))))
    for name, one in states[0].items():
        torch.testing.assert_close(one, states[1][name], rtol=1e-3, atol=1e-4)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    example = make_example(some_tokens(TINY, generator), TINY, 1.0, generator)
    gradients = []
    for recompute in (False, True):
        learner = tiny_learner(2, recompute)
        learner([example])["loss"].backward()
        gradients.append([p.grad for p in learner.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_all_weights_are_written_with_released_names(pairs: Path, tmp_path: Path) -> None:
    settings = options(pairs, tmp_path, steps=1)
    result = varedit_export.train(settings)
    assert result == tmp_path / TRANSFORMER
    assert "block_chunks.0.module.0.sa.mat_qkv.weight" in open_weights(result)
    trained = load_transformer(result, TINY.transformer).state_dict()
    _, sources = model_and_weights(settings.build_options, lambda download: None)
    assert trained.keys() == sources.transformer.keys()
    assert all(not torch.equal(trained[n], sources.transformer[n]) for n in ("head.weight",))


@pytest.mark.parametrize("chunks", [None, 1, 2])
def test_an_adapter_is_merged_as_it_was_trained(
    chunks: int | None, pairs: Path, tmp_path: Path
) -> None:
    settings = options(pairs, tmp_path, lora=3)
    adapter = varedit_export.train(settings)
    assert adapter == tmp_path / TRAINED
    config, sources = model_and_weights(settings.build_options, lambda download: None)
    layout = released_transformer(config.transformer.depth, chunks)
    stored = [layout(NamedShape(n, tuple(w.shape))).name for n, w in sources.transformer.items()]
    merged = merge_loras(sources, [(adapter, 1.0)], config.transformer, stored)
    assert merged.description == sources.description
    learner = tiny_learner(3)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    learner.load_state_dict(kept, strict=False)
    generator = torch.Generator().manual_seed(1)
    example = make_example(some_tokens(config, generator), config, 1.0, None)
    with torch.no_grad():
        beside = learner([example])
        learner.load_state_dict(
            {f"transformer.{name}": merged.transformer[name] for name in sources.transformer}
            | {name: torch.zeros_like(factor) for name, factor in kept.items()}
        )
        torch.testing.assert_close(learner([example]), beside, rtol=1e-4, atol=1e-5)


def test_a_build_tells_that_an_adapter_is_of_other_weights(pairs: Path, tmp_path: Path) -> None:
    adapter = varedit_export.train(options(pairs, tmp_path, lora=2, steps=1))
    other = BuildOptions(size="tiny-2b", resolutions=(256,), random_weights=1, loras=(adapter,))
    _, sources = model_and_weights(other, lambda download: None)
    assert "adapter.safetensors was trained on other weights" in sources.description


def test_blocks_products_alone_are_adapted() -> None:
    learner = tiny_learner(2)
    names = {
        n.removeprefix("transformer.") for n, p in learner.named_parameters() if p.requires_grad
    }
    of_one = {n.removeprefix("blocks.1.") for n in names if n.startswith("blocks.1.")}
    products = ("self_attention.qkv", "self_attention.projection", "mlp.0", "mlp.2")
    products += tuple(f"cross_attention.{n}" for n in ("query", "kv", "projection"))
    assert of_one == {f"{product}.lora_{x}" for product in products for x in "AB"}
    assert len(names) == TINY.transformer.depth * len(of_one)
    assert all(n.startswith("blocks.") for n in names)


@pytest.fixture(scope="module")
def lessons(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    plan = plan_training(options(pairs, tmp_path_factory.mktemp("run"), batch=12, held_out=0))
    config, sources = model_and_weights(plan.options.build_options, lambda download: None)
    return run._task(plan, config, sources, run.read_pairs([pairs]), "").lessons


def test_the_weight_of_a_pair_is_its_share(lessons: Lessons) -> None:
    shares = sorted(example.share for part in lessons[0] for example in part)
    assert shares == pytest.approx([1 / 14] * 11 + [3 / 14])


def test_processes_share_a_steps_examples(lessons: Lessons) -> None:
    lessons = replace(lessons, recipe=replace(lessons.recipe, batch=4), at_once=2)
    alone = [example for part in lessons[3] for example in part]
    halves = [replace(lessons, rank=rank, processes=2)[3] for rank in (0, 1)]
    assert [len(part) for half in halves for part in half] == [2, 2]
    shared = [example for half in halves for part in half for example in part]
    for one, other in zip((alone[0], alone[2], alone[1], alone[3]), shared, strict=True):
        torch.testing.assert_close(vars(one), vars(other), rtol=0, atol=0)


def test_each_pass_has_all_pairs_in_another_order_with_other_mistakes(lessons: Lessons) -> None:
    passes = [[example for part in lessons[step] for example in part] for step in (0, 1)]
    inputs = [[example.inputs.sum().item() for example in seen] for seen in passes]
    assert not set(inputs[0]) & set(inputs[1])
    sources = [[example.source.sum().item() for example in seen] for seen in passes]
    assert sources[0] != sources[1] and sorted(sources[0]) == sorted(sources[1])
    assert len({*sources[0]}) == 12


def test_mistakes_do_not_repeat(lessons: Lessons) -> None:
    states = [lessons._generator(position).get_state() for position in (1, 1 + 2**12, 1 + 2**32)]
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_outside_its_mask_a_target_is_its_source(pairs: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 0).save(pairs.with_name("black.png"))
    row = {"instruction": "x", "source": "source0.png", "target": "target0.png"}
    masked = pairs.with_name("masked.jsonl")
    masked.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'mask': 'black.png'})}\n")
    build = options(pairs, tmp_path).build_options
    config, sources = model_and_weights(build, lambda download: None)
    tokens, _ = tokens_of(run.read_pairs([masked]), config, sources, tmp_path, "cpu")
    assert not torch.equal(tokens[0].source, tokens[0].target)
    assert torch.equal(tokens[1].source, tokens[1].target)


def test_held_out_pairs_are_measured_and_drawn(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    varedit_export.train(options(pairs, tmp_path, lora=2, steps=1, report_every=1))
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert entry["held_out_loss"] > 0 and "held_out_scale7" in entry
    sheet = Image.open(tmp_path / "sheets" / "0000001.png")
    assert sheet.width > 3 * 256


def test_a_pair_is_read_once_for_its_tokens(pairs: Path, tmp_path: Path) -> None:
    config, sources = model_and_weights(options(pairs, tmp_path).build_options, lambda _: None)
    tokens, _ = tokens_of(run.read_pairs([pairs]), config, sources, pairs.parent / "tokens", "cpu")
    first = tokens[3]
    tokens.pairs = ()
    assert torch.equal(tokens[3].source, first.source)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_what_a_mask_keeps_is_what_a_model_sees(mode: str, tmp_path: Path) -> None:
    """The colours under transparent pixels of the source are not shown."""
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "source.png")
    Image.new(mode, (64, 64)).save(tmp_path / "target.png")
    Image.new("L", (64, 64), 0).save(tmp_path / "mask.png")
    row = {"instruction": "x"} | {n: f"{n}.png" for n in ("source", "target", "mask")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    build = options(tmp_path, tmp_path).build_options
    config, sources = model_and_weights(build, lambda download: None)
    pairs = run.read_pairs([tmp_path / "pairs.jsonl"])
    [tokens], _ = tokens_of(pairs, config, sources, tmp_path, "cpu")
    assert torch.equal(tokens.source, tokens.target)


def test_the_planned_memory_is_what_drawing_a_pair_takes() -> None:
    """Without activations to keep, that of a deep model's keys and values is the most."""
    deep = replace(TINY, transformer=replace(TINY.transformer, depth=40))

    def new(config: ModelConfig) -> Learner:
        return new_learner(config, TrainingMachine(), 1, True)

    plan = plan_memory(deep, new, 1)
    with peak_of_tensors() as peak:
        learner = new(deep)
        fill(learner, random_weights(learner.transformer, 0), "cpu", 0)
        learner.draw(pair_without_content(deep), 0)
    assert plan.weights + plan.activations == pytest.approx(peak(), rel=0.05)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_planned_memory_is_what_a_step_takes(lora: int | None, recompute: bool) -> None:
    machine = TrainingMachine()
    deep = replace(TINY, transformer=replace(TINY.transformer, depth=6))

    def new(config: ModelConfig) -> Learner:
        return new_learner(config, machine, lora, recompute)

    plan = plan_memory(deep, new, 2)
    generator = torch.Generator().manual_seed(0)
    words = torch.zeros(64, TINY.transformer.text_channels)
    pair = replace(some_tokens(TINY, generator), text=words)
    examples = [make_example(pair, deep, 0.5, None)] * 2
    with peak_of_tensors() as peak:
        learner = new(deep)
        fill(learner, random_weights(learner.transformer, 0), "cpu", 0)
        learner(examples)["loss"].backward()
    planned = plan.weights + plan.gradients + plan.activations
    assert planned == pytest.approx(peak(), rel=0.05)


def test_what_does_not_fit_is_refused(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "available_memory", lambda: 10**8)
    with pytest.raises(ExportError, match=r"100 MB of memory are free .* --lora"):
        varedit_export.train(options(pairs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_options_out_of_range_are_refused(pairs: Path, tmp_path: Path) -> None:
    for wrong in (
        {"lora": 0},
        {"steps": 0},
        {"batch": 0},
        {"at_once": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"seed": -1},
        {"precision": "fp16"},
    ):
        with pytest.raises(ConfigError):
            options(pairs, tmp_path, **wrong)


def some_tokens(config: ModelConfig, generator: torch.Generator) -> PairTokens:
    sizes, patch = config.transformer, config.tokenizer.patch
    rows, columns = sizes.finest
    shape = config.tokenizer.bits, rows * patch, columns * patch
    source, target = (torch.randn(shape, generator=generator) for _ in range(2))
    return PairTokens(source, target, torch.randn(3, sizes.text_channels, generator=generator))


def tiny_learner(rank: int, recompute: bool = False) -> Learner:
    """Return a learner whose changes are no longer zero."""
    learner = new_learner(TINY, TrainingMachine(), rank, recompute)
    fill(learner, random_weights(learner.transformer, 0), "cpu", 0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in learner.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return learner

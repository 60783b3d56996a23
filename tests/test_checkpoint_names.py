"""Checkpoints as people have them: names that training code wrapped, tensors under other names."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CONFIG,
    RECORDED,
    State,
    assert_equal,
    recorded_transformer,
    save_shards,
)
from click.testing import CliRunner
from safetensors.torch import save_file
from small_t5 import write_t5

from varedit_export.cli import main
from varedit_export.options import BuildOptions
from varedit_export.resolve_options import plan_of
from varedit_export.sources import checkpoint_sources
from varedit_reference.checkpoint import load_tokenizer, load_transformer, transformer_weights
from varedit_reference.config import TextEncoderConfig, preset
from varedit_reference.text_encoder import TextEncoder, read_config
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def transformer() -> State:
    return recorded_transformer()


@pytest.fixture(scope="module")
def expected() -> State:
    return load_transformer(RECORDED / "var.pth", CONFIG.transformer).state_dict()


# Names that training code wrapped


def wrapped_inside(name: str) -> str:
    """Return a name as FSDP and torch.compile leave it where they wrap every block."""
    return name.replace(".module.0.", ".module.0._fsdp_wrapped_module._orig_mod.")


PREFIXES = (
    *("module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module."),
    *("_checkpoint_wrapped_module.", "module._orig_mod.", "_orig_mod.module."),
    *("_forward_module.model.", "module.module."),
    "_forward_module._fsdp_wrapped_module.module._orig_mod.",
)
# How names begin, and whether they are wrapped inside too.
WRAPPED = [*((prefix, False) for prefix in PREFIXES), ("", True), ("module.", True)]


def wrapped(state: State, case: tuple[str, bool]) -> State:
    prefix, inside = case
    return {prefix + (wrapped_inside(n) if inside else n): t for n, t in state.items()}


def of_wrappers(case: tuple[str, bool]) -> set[str]:
    """Return what names have to be read without."""
    prefix, inside = case
    parts = {f"{part}." for part in prefix.split(".") if part}
    return parts | ({"_orig_mod.", "_fsdp_wrapped_module."} if inside else set())


def left_out(notes: tuple[str, ...]) -> set[str]:
    """Return what the last note says that names are read without."""
    return {quoted.strip("'") for quoted in notes[-1].removeprefix("names without ").split(", ")}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "shards"])
def test_what_wraps_all_names_is_left_out_and_said(
    tmp_path: Path, transformer: State, expected: State, case: tuple[str, bool], kind: str
) -> None:
    path = tmp_path / f"w.{kind}"
    save = {"pth": torch.save, "safetensors": save_file, "shards": save_shards}[kind]
    save(wrapped(transformer, case), path)
    assert_equal(load_transformer(path, CONFIG.transformer).state_dict(), expected)
    assert left_out(open_weights(path).notes) == of_wrappers(case)


def test_a_prefix_that_some_names_lack_is_not_left_out(tmp_path: Path, transformer: State) -> None:
    first, *others = transformer
    state = {first: transformer[first], **{f"module.{n}": transformer[n] for n in others}}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(module\."):
        load_transformer(tmp_path / "w.pth", CONFIG.transformer)


def test_names_are_kept_where_two_would_become_one(tmp_path: Path) -> None:
    state = {"a.w": torch.zeros(1), "_orig_mod.a.w": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert set(open_weights(tmp_path / "w.pth")) == set(state)


BESIDE = {"epoch": 3, "args": Namespace(lr=1), "optimizer": {0: {"step": torch.ones(1)}}}
BRANCHES = [
    f"{outer}{key}"
    for outer in ("", "trainer.")
    for key in ("gpt_fsdp", "gpt_ema_fsdp", "gpt", "ema", "state_dict", "model", "module")
]


def nested(branches: dict[str, State]) -> dict[str, Any]:
    """Return a training's checkpoint with these state dicts at their places."""
    content: dict[str, Any] = {**BESIDE}
    for branch, state in branches.items():
        *outer, key = branch.split(".")
        place = content
        for name in outer:
            place = place.setdefault(name, {"config": {"lr": 1}, "gpt_opt": {"state": {}}})
        place[key] = state
    return content


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_state_dict_may_lie_beside_other_things(
    tmp_path: Path, transformer: State, expected: State, branch: str
) -> None:
    path = tmp_path / "w.pth"
    torch.save(nested({branch: transformer}), path)
    assert_equal(load_transformer(path, CONFIG.transformer).state_dict(), expected)
    assert open_weights(path).notes == (f"read from '{branch}'",)
    for case in WRAPPED[::3]:
        torch.save(nested({branch: wrapped(transformer, case)}), path)
        assert_equal(load_transformer(path, CONFIG.transformer).state_dict(), expected)
        notes = open_weights(path).notes
        assert notes[:-1] == (f"read from '{branch}'",) and left_out(notes) == of_wrappers(case)


def test_every_recording_loads_as_a_training_leaves_it(
    tmp_path: Path, recording_folder: Path
) -> None:
    config = preset(recording_folder.name.split("-")[0].replace("tiny", "tiny-")).transformer
    state = torch.load(recording_folder / "var.pth")
    content = nested({"trainer.gpt_fsdp": wrapped(state, ("_forward_module.", True))})
    torch.save(content, tmp_path / "w.pth")
    loaded = load_transformer(tmp_path / "w.pth", config).state_dict()
    assert_equal(loaded, load_transformer(recording_folder / "var.pth", config).state_dict())


AVERAGES = [branch for branch in BRANCHES if "ema" in branch]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("branch", [branch for branch in BRANCHES if "ema" not in branch])
def test_of_weights_and_their_average_that_is_read_which_is_asked_for(
    tmp_path: Path, branch: str, average: str
) -> None:
    weights, averages = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    torch.save(nested({average: averages, branch: weights}), tmp_path / "w.pth")
    read = open_weights(tmp_path / "w.pth")
    assert_equal(read, weights)
    assert read.notes == (f"read from '{branch}', not from '{average}'",)
    read = open_weights(tmp_path / "w.pth", prefer_ema=True)
    assert_equal(read, averages)
    assert read.notes == (f"read from '{average}', not from '{branch}'",)


def test_an_empty_state_dict_is_none(tmp_path: Path) -> None:
    """A training over several processes leaves such in files of all but the first."""
    average = {"w": torch.ones(1)}
    torch.save(
        nested({"trainer.gpt_fsdp": {}, "trainer.gpt_ema_fsdp": average}), tmp_path / "w.pth"
    )
    assert open_weights(tmp_path / "w.pth").notes == ("read from 'trainer.gpt_ema_fsdp'",)


def test_of_shards_the_branches_are_said_once(tmp_path: Path) -> None:
    for shard in "ab":
        branches = {"model": {shard: torch.ones(1)}, "ema": {shard: torch.zeros(1)}}
        torch.save(nested(branches), tmp_path / f"{shard}.bin")
    index = json.dumps({"weight_map": {"a": "a.bin", "b": "b.bin"}})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert open_weights(tmp_path).notes == ("read from 'model', not from 'ema'",)
    read = open_weights(tmp_path, prefer_ema=True)
    assert read.notes == ("read from 'ema', not from 'model'",)
    assert [tensor.item() for tensor in read.values()] == [0, 0]


@pytest.mark.parametrize("kind", ["flat", "branches", "safetensors", "shards"])
def test_a_missing_average_is_an_error_that_says_what_there_is(
    tmp_path: Path, transformer: State, kind: str
) -> None:
    path, told = tmp_path / "w.pth", "nothing like it"
    if kind == "shards":
        save_shards(transformer, path := tmp_path / "w")
    elif kind == "safetensors":
        save_file(transformer, path := tmp_path / "w.safetensors")
    elif kind == "branches":
        torch.save(nested({"trainer.gpt_fsdp": transformer}), path)
        told = "'trainer.gpt_fsdp'"
    else:
        torch.save(transformer, path)
    with pytest.raises(CheckpointError) as refused:
        transformer_weights(path, CONFIG.transformer, prefer_ema=True)
    assert (
        "has no average of its weights (EMA): expected it under one of 'gpt_ema_fsdp', 'ema', at "
        f"the top or in 'trainer'; there is {told}; leave out --prefer-ema"
    ) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {**BESIDE},
            "('epoch' is a int, 'args' is a argparse.Namespace, 'optimizer' is a dict of '0')",
        ),
        ({"trainer": {"gpt_fsdp": {}, "a": 1}}, "('trainer' is a dict of 'gpt_fsdp', 'a')"),
        ({"trainer": {"gpt_fsdp": None}}, "('trainer' is a dict of 'gpt_fsdp')"),
        ({"gpt_fsdp": [1]}, "('gpt_fsdp' is a list)"),
        (
            {"trainer": {"gpt": {"w": torch.zeros(1), "state": {}}}},
            "under 'trainer.gpt' ('state' is a dict)",
        ),
        (
            {"ema": {"decay": 0.9, "shadow": {"w": torch.zeros(1)}}},
            "under 'ema' ('decay' is a float, ",
        ),
    ],
)
def test_other_contents_are_an_error_that_says_what_there_is(
    tmp_path: Path, content: dict[str, Any], found: str
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as refused:
        load_transformer(tmp_path / "w.pth", CONFIG.transformer)
    assert f"holds more than tensors {found}" in str(refused.value)
    assert (
        "expected a state dict of dense tensors, alone or under one of 'gpt_fsdp', 'gpt', 's"
        in (str(refused.value))
    )


# The learned unconditional text


@pytest.mark.parametrize("name", ["cfg_uncond", "unconditional_text"])
@pytest.mark.parametrize("rows", [1, 77, 511, 513, 1024])
def test_an_unconditional_text_of_another_length_is_cut_or_padded_and_said(
    tmp_path: Path, transformer: State, expected: State, rows: int, name: str
) -> None:
    """An instruction of T tokens takes the first T rows, as recordings show."""
    state = dict(transformer if name == "cfg_uncond" else expected)
    known = state[name][:rows]
    state[name] = torch.cat([known, known.new_ones(rows - len(known), known.shape[1])])
    torch.save(state, tmp_path / "w.pth")
    loaded = load_transformer(tmp_path / "w.pth", CONFIG.transformer).state_dict()
    text = loaded["unconditional_text"]
    assert torch.equal(text[:rows], expected["unconditional_text"][:rows])
    assert text.shape == (512, 128) and not text[rows:].any()
    assert_equal({**loaded, "unconditional_text": expected["unconditional_text"]}, expected)
    done = "cut" if rows > 512 else "padded with zeros"
    notes = transformer_weights(tmp_path / "w.pth", CONFIG.transformer).notes
    assert notes == (f"{name} {done} from {rows} to 512 rows",)


@pytest.mark.parametrize("shape", [(0, 128), (300, 64), (300,), (1, 300, 128)])
def test_no_other_shape_is_an_unconditional_text(
    tmp_path: Path, transformer: State, shape: tuple[int, ...]
) -> None:
    torch.save({**transformer, "cfg_uncond": torch.zeros(shape)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"cfg_uncond {re.escape(str([*shape]))} for \[512"):
        load_transformer(tmp_path / "w.pth", CONFIG.transformer)


def test_the_released_layouts_need_no_word() -> None:
    assert [open_weights(RECORDED / name).notes for name in ("var.pth", "vae.pth")] == [(), ()]


@pytest.fixture
def training(tmp_path: Path, transformer: State) -> Path:
    """Write a training's checkpoint; its average is the recording's transformer."""
    state = {f"module.{n}": t for n, t in transformer.items()}
    others = {name: tensor * 0 for name, tensor in state.items()}
    content = nested({"trainer.gpt_fsdp": others, "trainer.gpt_ema_fsdp": state})
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_what_was_chosen_and_left_out_is_in_the_plan(training: Path) -> None:
    options = BuildOptions(
        config=RECORDED / "config.json", checkpoint=training, tokenizer=RECORDED / "vae.pth"
    )
    plain, average = (plan_of(replace(options, prefer_ema=chosen)) for chosen in (False, True))
    assert plain.sources.description == (
        "w.pth (read from 'trainer.gpt_fsdp', not from 'trainer.gpt_ema_fsdp'; "
        "names without 'module.'), vae.pth"
    )
    assert average.sources.description == (
        "w.pth (read from 'trainer.gpt_ema_fsdp', not from 'trainer.gpt_fsdp'; "
        "names without 'module.'), vae.pth"
    )
    assert (
        plain.sources.identity != average.sources.identity
    )  # no file of one is kept for the other
    for sources, factor in ((plain.sources, 0), (average.sources, 1)):
        assert torch.equal(
            sources.transformer["head.weight"],
            factor * open_weights(RECORDED / "var.pth")["head.weight"],
        )


def test_what_was_chosen_and_left_out_is_told_by_convert(training: Path, expected: State) -> None:
    folder = training.parent
    write_t5(folder / "t5")
    arguments = ["--size", "tiny-2b", "--checkpoint", training, "--tokenizer", RECORDED / "vae.pth"]
    arguments += ["--text-encoder", folder / "t5", "-o", folder / "out", "--prefer-ema"]
    done = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "transformer.safetensors: names without 'module.'" in done.stderr
    assert "read from 'trainer.gpt_ema_fsdp', not from 'trainer.gpt_fsdp'" in done.stderr
    converted = load_transformer(folder / "out/transformer.safetensors", CONFIG.transformer)
    assert_equal(converted.state_dict(), expected)
    load_tokenizer(folder / "out/tokenizer.safetensors", CONFIG.tokenizer)


@pytest.mark.parametrize(
    "weights", [["--size", "nano"], ["--size", "2b", "--res", "256", "--random-weights", "1"]]
)
def test_weights_that_are_in_no_checkpoint_have_no_average(weights: list[str]) -> None:
    done = CliRunner().invoke(main, ["build", *weights, "--prefer-ema"])
    assert done.exit_code == 1
    assert done.stderr == "Error: --prefer-ema chooses in a checkpoint: give one, or leave it out\n"


# T5 folders


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    write_t5(tmp_path)
    return tmp_path


def restored(folder: Path, change: Callable[[State], State]) -> None:
    """Store a folder's weights as one file, changed."""
    state: State = dict(open_weights(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(change(state), folder / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
)
def test_the_token_embedding_may_be_stored_under_one_of_its_names(t5: Path, name: str) -> None:
    def renamed(state: State) -> State:
        names = {n for n in state if "embed_tokens" in n or n == "shared.weight"}
        embedding = state["shared.weight"]
        return {**{n: t for n, t in state.items() if n not in names}, name: embedding}

    (before,) = TextEncoder.load(t5).encode(["make the sky red"])
    restored(t5, renamed)
    (after,) = TextEncoder.load(t5).encode(["make the sky red"])
    assert torch.equal(before, after)
    restored(t5, lambda state: {n: t for n, t in state.items() if n != name})
    with pytest.raises(CheckpointError, match=r"one of shared\.weight, encoder\.embed_tokens"):
        TextEncoder.load(t5)


def test_wrapped_names_of_a_text_encoder_are_read(t5: Path) -> None:
    (before,) = TextEncoder.load(t5).encode(["red"])
    restored(t5, lambda state: {f"module.{n}": t for n, t in state.items()})
    assert torch.equal(before, TextEncoder.load(t5).encode(["red"])[0])


def test_sizes_that_a_config_leaves_out_are_those_of_transformers(t5: Path) -> None:
    from transformers import T5Config

    given = json.loads((t5 / "config.json").read_text())
    (before,) = TextEncoder.load(t5).encode(["red hat"])
    assert TextEncoderConfig.from_json({}).json == {
        name: getattr(T5Config(), name) for name in TextEncoderConfig().json
    }
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    settings = {name: given[name] for name in (*needed, "feed_forward_proj")}
    (t5 / "config.json").write_text(json.dumps(settings))
    assert read_config(t5) == TextEncoderConfig.from_json(given)
    assert torch.equal(before, TextEncoder.load(t5).encode(["red hat"])[0])


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_tokenizer_may_leave_out_its_models_type(t5: Path) -> None:
    before = TextEncoder.load(t5).tokenise("make the sky red")
    edit_json(t5 / "tokenizer.json", lambda content: content["model"].pop("type"))
    assert TextEncoder.load(t5).tokenise("make the sky red") == before


def test_another_kind_of_mlp_is_no_flan_t5(t5: Path) -> None:
    edit_json(t5 / "config.json", lambda content: content.update(feed_forward_proj="gated-magic"))
    with pytest.raises(CheckpointError, match="MLP of kind 'gated-magic', which T5 has not"):
        TextEncoder.load(t5)


def test_a_plain_t5_runs_but_is_not_exported(t5: Path) -> None:
    def plain(state: State) -> State:
        return {n.replace("wi_0", "wi"): t for n, t in state.items() if "wi_1" not in n}

    restored(t5, plain)
    edit_json(t5 / "config.json", lambda content: content.pop("feed_forward_proj"))
    TextEncoder.load(t5).encode(["red"])
    with pytest.raises(ConfigError, match="MLP is 'relu'; only T5 encoders with 'gated-gelu'"):
        checkpoint_sources(CONFIG, RECORDED / "var.pth", RECORDED / "vae.pth", t5)

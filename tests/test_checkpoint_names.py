"""Checkpoints as people have them: names that training code wrapped, tensors under other names."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from small_t5 import write_t5
from torch import Tensor

from varedit_export.cli import main
from varedit_export.options import BuildOptions
from varedit_export.resolve_options import plan_of
from varedit_export.sources import checkpoint_sources
from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.config import TextEncoderConfig, preset
from varedit_reference.text_encoder import TextEncoder, read_config
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import CheckpointError, ConfigError

RECORDED = Path(__file__).parent / "golden" / "tiny2b-256"
CONFIG = preset("tiny-2b", 256)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def transformer() -> State:
    return torch.load(RECORDED / "var.pth")


@pytest.fixture(scope="module")
def expected() -> State:
    return load_transformer(RECORDED / "var.pth", CONFIG.transformer).state_dict()


def same(state: State, expected: State) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], tensor) for name, tensor in expected.items()
    )


# Names that training code wrapped


def wrapped_inside(name: str) -> str:
    """Return a name as FSDP and torch.compile leave it where they wrap every block."""
    return name.replace(".module.0.", ".module.0._fsdp_wrapped_module._orig_mod.")


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"module.{name}", "'module.'"),
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.'"),
        (lambda name: f"module._orig_mod.{name}", "'_orig_mod.', 'module.'"),
        (lambda name: f"_forward_module.model.{name}", "'_forward_module.', 'model.'"),
        (lambda name: f"module.module.{name}", "'module.', 'module.'"),
        (wrapped_inside, "'_orig_mod.', '_fsdp_wrapped_module.'"),
    ],
)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "shards"])
def test_what_wraps_all_names_is_left_out_and_said(
    tmp_path: Path,
    transformer: State,
    expected: State,
    rename: Callable[[str], str],
    said: str,
    kind: str,
) -> None:
    path, state = tmp_path / f"w.{kind}", {rename(n): t for n, t in transformer.items()}
    if kind == "pth":
        torch.save(state, path)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        path.mkdir()
        for shard in range(2):
            save_file(dict(list(state.items())[shard::2]), path / f"{shard}.safetensors")
        weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_transformer(path, CONFIG.transformer).state_dict(), expected)
    assert set(open_weights(path).notes[0].removeprefix("names without ").split(", ")) == set(
        said.split(", ")
    )


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


BRANCHES = [
    "state_dict",
    "model",
    "module",
    "gpt",
    "ema",
    "trainer.gpt_fsdp",
    "trainer.gpt_ema_fsdp",
]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_state_dict_may_lie_beside_other_things(
    tmp_path: Path, transformer: State, expected: State, branch: str
) -> None:
    content = {"epoch": 3, "args": Namespace(lr=1), "optimizer": {0: {"step": torch.ones(1)}}}
    outer, _, inner = branch.partition(".")
    kept = {outer: {inner: transformer, "step": 3} if inner else transformer}
    torch.save(content | kept, tmp_path / "w.pth")
    assert same(load_transformer(tmp_path / "w.pth", CONFIG.transformer).state_dict(), expected)
    assert open_weights(tmp_path / "w.pth").notes == (f"read from '{branch}'",)


def test_of_weights_and_their_average_the_weights_are_read(
    tmp_path: Path, transformer: State
) -> None:
    average = {name: tensor * 0 for name, tensor in transformer.items()}
    trainer = {"gpt_ema_fsdp": average, "gpt_fsdp": transformer}
    torch.save({"epoch": 3, "trainer": trainer}, tmp_path / "w.pth")
    weights = open_weights(tmp_path / "w.pth")
    assert same(weights, transformer) and weights.notes == ("read from 'trainer.gpt_fsdp'",)


def test_the_released_layouts_need_no_word() -> None:
    assert [open_weights(RECORDED / name).notes for name in ("var.pth", "vae.pth")] == [(), ()]


def test_what_was_left_out_is_in_the_plan_and_told_by_convert(
    tmp_path: Path, transformer: State
) -> None:
    torch.save({f"module.{n}": t for n, t in transformer.items()}, tmp_path / "w.pth")
    tokenizer = RECORDED / "vae.pth"
    options = BuildOptions(
        config=RECORDED / "config.json", checkpoint=tmp_path / "w.pth", tokenizer=tokenizer
    )
    sources = plan_of(options).sources
    assert sources.description == "w.pth (names without 'module.'), vae.pth"
    write_t5(tmp_path / "t5")
    arguments = ["--size", "tiny-2b", "--checkpoint", tmp_path / "w.pth", "--tokenizer", tokenizer]
    arguments += ["--text-encoder", tmp_path / "t5", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "transformer.safetensors: names without 'module.'" in done.stderr
    load_tokenizer(tmp_path / "out/tokenizer.safetensors", CONFIG.tokenizer)


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


def test_spiece_alone_says_what_to_install(t5: Path) -> None:
    (t5 / "tokenizer.json").rename(t5 / "spiece.model")
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        TextEncoder.load(t5)


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

"""The sources of a build's weights: checkpoints on disk, or random ones.

Both are mappings from the reference's parameter names to tensors, which are read or drawn one at a
time. The image tokenizer and the text encoder are loaded from them here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import starmap
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from msgspec import UNSET, UnsetType
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from varedit_export.graphs.text import GATED
from varedit_reference.checkpoint import (
    NamedShape,
    empty_tokenizer,
    empty_transformer,
    load,
    tokenizer_weights,
    transformer_weights,
)
from varedit_reference.config import ModelConfig, TextEncoderConfig
from varedit_reference.initialise import RandomWeights, random_weights
from varedit_reference.text_encoder import (
    SHARED,
    TextEncoder,
    read_config,
    t5_layout,
    t5_stack,
    text_encoder_weights,
)
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.weights_file import Weights, check_there
from varedit_runtime.errors import ConfigError, shown
from varedit_runtime.manifest import TOKENIZER, HubOrigin, MergedLora
from varedit_runtime.text import END_TOKEN, read_tokenizer

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack


@dataclass(frozen=True)
class TextSource:
    """A text encoder: its sizes, T5's tensors by name, and its tokenizer.json."""

    config: TextEncoderConfig
    state: Mapping[str, Tensor]
    tokenizer_json: bytes


@dataclass(frozen=True)
class Sources:
    """All weights of a build.

    text: None for a bundle that starts at text features. description: where the weights come from,
    for people. identity: changes when the weights do, so that a resumed build notices. origins: of
    the files that came from the hub. loras: that are merged into the transformer. random: whether
    the weights are random. trained_on: the only pictures that the model was trained on.
    """

    transformer: Mapping[str, Tensor]
    tokenizer: Mapping[str, Tensor]
    text: TextSource | None
    description: str
    identity: str
    origins: tuple[HubOrigin, ...] = ()
    loras: tuple[MergedLora, ...] = ()
    random: bool = False
    trained_on: Literal["drawn scenes"] | UnsetType = UNSET


def checkpoint_sources(
    config: ModelConfig,
    transformer: Path,
    tokenizer: Path,
    text_encoder: Path | None = None,
    *,
    names: Sequence[str] = (),
    prefer_ema: bool = False,
) -> Sources:
    """Open weights in files. names: what they are called; by default their own names.

    prefer_ema: of the transformer, see `open_weights`.

    Raises CheckpointError if they cannot be read or do not fit, ConfigError on a text encoder of a
    kind that is not exported.
    """
    paths = [transformer, tokenizer, *([] if text_encoder is None else [text_encoder])]
    check_there(paths)
    files: dict[Path, Weights] = {
        transformer: transformer_weights(transformer, config.transformer, prefer_ema),
        tokenizer: tokenizer_weights(tokenizer, config.tokenizer),
    }
    text = None
    if text_encoder is not None:
        files[text_encoder] = text_encoder_weights(text_encoder, config.transformer)
        text = _text_source(text_encoder, files[text_encoder])
    return Sources(
        files[transformer],
        files[tokenizer],
        text,
        ", ".join(map(_described, names or [path.name for path in files], files.values())),
        sha256("\n".join(starmap(_stamp, files.items())).encode()).hexdigest(),
    )


def random_sources(config: ModelConfig, seed: int) -> Sources:
    """Make random weights, with a byte tokenizer in place of T5's, to test structure and speed."""
    transformer = random_weights(empty_transformer(config.transformer), seed)
    tokenizer = random_weights(empty_tokenizer(config.tokenizer), seed)
    text = _random_text_encoder(config.transformer.text_channels, seed)
    name = f"random, seed {seed}"
    return Sources(transformer, tokenizer, text, name, name, random=True)


def tokenizer_of(config: ModelConfig, state: Mapping[str, Tensor]) -> Tokenizer:
    """Load the reference's picture tokenizer in fp32, from weights by its own names."""
    return load(empty_tokenizer(config.tokenizer), state)


def t5_encoder(text: TextSource) -> "T5Stack":
    """Load transformers' encoder with a bundle's text weights, in fp32."""
    encoder = t5_stack(text.config)
    state = {
        name: text.state[t5_layout(NamedShape(name, ())).name] for name in encoder.state_dict()
    }
    return load(encoder, state)


def text_encoder_of(text: TextSource) -> TextEncoder:
    """Load the reference's text encoder in fp32."""
    return TextEncoder(t5_encoder(text), read_tokenizer(text.tokenizer_json))


def _random_text_encoder(width: int, seed: int) -> TextSource:
    """Make an encoder of Flan-T5-XL's sizes if the width is its own, else a small one."""
    full = width == 2048
    config = TextEncoderConfig(
        vocabulary=32128 if full else 384,
        width=width,
        heads=32 if full else width // 64,
        mlp_width=5120 if full else 2 * width,
        depth=24 if full else 2,
        mlp=GATED,
    )
    state = t5_stack(config).state_dict()
    stored = [t5_layout(NamedShape(name, tuple(tensor.shape))) for name, tensor in state.items()]
    weights = RandomWeights(dict(stored), f"{seed} text", _text_weight)
    return TextSource(config, weights, byte_tokenizer())


def _text_weight(name: str, normal: Tensor) -> Tensor:
    if normal.dim() == 1:
        return torch.ones_like(normal)
    return normal if name == SHARED else normal * prod(normal.shape[1:]) ** -0.5


def byte_tokenizer() -> bytes:
    """Return a tokenizer.json with one token per byte, which takes any instruction."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", END_TOKEN, "<unk>", *alphabet]
    vocabulary = Vocabulary(models.BPE({name: i for i, name in enumerate(names)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens(names[:3])
    return vocabulary.to_str().encode()


def _text_source(folder: Path, weights: Weights) -> TextSource:
    config = read_config(folder)
    if config.mlp != GATED:
        raise ConfigError(
            f"the text encoder's MLP is {shown(config.mlp)}; only T5 encoders with {GATED!r}, such "
            "as Flan-T5, can be exported"
        )
    return TextSource(config, weights, (folder / TOKENIZER).read_bytes())


def _described(name: str, weights: Weights) -> str:
    return f"{name} ({'; '.join(weights.notes)})" if weights.notes else name


def _stamp(path: Path, weights: Weights) -> str:
    """Return a text that changes with a file, one directly in a folder, or what is read of them."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{path.resolve()} {stats} {weights.notes}"

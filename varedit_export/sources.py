"""The sources of a build's weights: checkpoints on disk, or random ones.

Both are mappings from the reference's parameter names to tensors, which are read or drawn one at a
time.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from varedit_export.graphs.text import TextEncoderConfig
from varedit_reference.checkpoint import (
    empty_tokenizer,
    empty_transformer,
    fit,
    tokenizer_weights,
    transformer_weights,
)
from varedit_reference.config import ModelConfig
from varedit_reference.initialise import RandomWeights
from varedit_reference.text_encoder import empty_encoder, encoder_weights, t5_layout
from varedit_runtime.errors import CheckpointError
from varedit_runtime.text import END_TOKEN

NANO_SIZE = "nano"  # the size whose weights come with the package, in the embedded bundle
PUBLISHED = {
    "2b": ("a VAREdit 2B transformer (.pth)", "infinity_vae_d32reg.pth"),
    "8b": ("8B-512.pth or 8B-1024.pth", "infinity_vae_d56_f8_14_patchify.pth"),
}
PUBLISHERS = (
    "their authors publish the transformers as HiDream-ai/VAREdit, the picture tokenizers as "
    "FoundationVision/Infinity and the text encoder as google/flan-t5-xl, on Hugging Face"
)


@dataclass(frozen=True)
class TextSource:
    """A text encoder: its sizes, its config.json, T5's tensors by name, and its tokenizer.json."""

    config: TextEncoderConfig
    json: Mapping[str, Any]
    state: Mapping[str, Tensor]
    tokenizer_json: bytes


@dataclass(frozen=True)
class Sources:
    """All weights of a build.

    text: None for a bundle that starts at text features. description: where the weights come from,
    for people. identity: changes when the weights do, so that a resumed build notices.
    """

    transformer: Mapping[str, Tensor]
    tokenizer: Mapping[str, Tensor]
    text: TextSource | None
    description: str
    identity: str


def checkpoint_sources(
    config: ModelConfig, transformer: Path, tokenizer: Path, text_encoder: Path | None
) -> Sources:
    """Open weights in files. Raises CheckpointError if they cannot be read or do not fit."""
    text = None if text_encoder is None else _read_text_encoder(text_encoder)
    if text is not None and text.config.width != config.transformer.text_channels:
        raise CheckpointError(
            f"{text_encoder} has width {text.config.width}, and the transformer reads "
            f"{config.transformer.text_channels}: give the text encoder it was trained with"
        )
    paths = [transformer, tokenizer, *([] if text_encoder is None else [text_encoder])]
    return Sources(
        transformer_weights(transformer, config.transformer),
        tokenizer_weights(tokenizer, config.tokenizer),
        text,
        ", ".join(path.name for path in paths),
        sha256("\n".join(map(_stamp, paths)).encode()).hexdigest(),
    )


def random_sources(config: ModelConfig, seed: int) -> Sources:
    """Make random weights, with a byte tokenizer in place of T5's, to test structure and speed."""
    transformer = RandomWeights(empty_transformer(config.transformer), seed)
    tokenizer = RandomWeights(empty_tokenizer(config.tokenizer), seed)
    text = _random_text_encoder(config.transformer.text_channels, seed)
    name = f"random, seed {seed}"
    return Sources(transformer, tokenizer, text, name, name)


class RandomTextEncoder(Mapping[str, Tensor]):
    """A T5 encoder's random tensors by name, each drawn when it is looked up."""

    def __init__(self, config: TextEncoderConfig, seed: int) -> None:
        inner, width, mlp = config.heads * config.head_width, config.width, config.mlp_width
        attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
        self._seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {
            "shared.weight": (config.vocabulary, width),
            "encoder.final_layer_norm.weight": (width,),
        }
        for i in range(config.depth):
            shapes = {f"{attention}.{name}.weight": (inner, width) for name in "qkv"}
            shapes |= {f"{attention}.o.weight": (width, inner)}
            shapes |= {f"{dense}.{name}.weight": (mlp, width) for name in ("wi_0", "wi_1")}
            shapes |= {f"{dense}.wo.weight": (width, mlp)}
            shapes |= {f"layer.{j}.layer_norm.weight": (width,) for j in range(2)}
            if i == 0:
                relative = f"{attention}.relative_attention_bias.weight"
                shapes[relative] = (config.buckets, config.heads)
            self._shapes |= {f"encoder.block.{i}.{name}": s for name, s in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        key = sha256(f"{self._seed} text {name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        spread = 1.0 if name == "shared.weight" else prod(shape[1:]) ** -0.5
        return spread * torch.randn(shape, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _random_text_encoder(width: int, seed: int) -> TextSource:
    """Make an encoder of Flan-T5-XL's sizes if the width is its own, else a small one."""
    full = width == 2048
    settings = {
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128 if full else 384,
        "d_model": width,
        "d_kv": 64,
        "num_heads": 32 if full else width // 64,
        "d_ff": 5120 if full else 2 * width,
        "num_layers": 24 if full else 2,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
    config = TextEncoderConfig.from_json(settings)
    return TextSource(config, settings, RandomTextEncoder(config, seed), byte_tokenizer())


def byte_tokenizer() -> bytes:
    """Return a tokenizer.json with one token per byte, which takes any instruction."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", END_TOKEN, "<unk>", *alphabet]
    vocabulary = Vocabulary(models.BPE({name: i for i, name in enumerate(names)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens(names[:3])
    return vocabulary.to_str().encode()


def missing_weights(size: str) -> str:
    """Say which weights a build of this size must be given."""
    if size == NANO_SIZE:
        return (
            "size nano has its own weights: give none, or all of --checkpoint, --tokenizer and "
            "--text-encoder"
        )
    transformer, tokenizer = PUBLISHED.get(size, ("its transformer", "its picture tokenizer"))
    return (
        f"size {size} needs --checkpoint ({transformer}), --tokenizer ({tokenizer}) and "
        f"--text-encoder (a flan-t5-xl folder): {PUBLISHERS}; or --random-weights SEED for "
        "structure and speed alone"
    )


def _read_text_encoder(folder: Path) -> TextSource:
    weights = encoder_weights(folder)
    fit(empty_encoder(folder), weights, t5_layout, folder)
    settings = json.loads((folder / "config.json").read_bytes())
    tokenizer_json = (folder / "tokenizer.json").read_bytes()
    return TextSource(TextEncoderConfig.from_json(settings), settings, weights, tokenizer_json)


def _stamp(path: Path) -> str:
    """Return a text that changes when a file, or a file directly in a folder, is rewritten."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{path.resolve()} {stats}"

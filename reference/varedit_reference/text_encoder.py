"""The text encoder: T5 (arXiv 1910.10683; Flan-T5-XL in the released models) over instructions.

An instruction is used as it is, without a template, followed by T5's end token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from varedit_reference.checkpoint import NamedShape, fit, load
from varedit_reference.config import MAX_TEXT_TOKENS, TextEncoderConfig, TransformerConfig
from varedit_reference.weights_file import Weights, open_weights, read_header_file, torch_dtype
from varedit_runtime.errors import CheckpointError, needs_extra, reason, shown
from varedit_runtime.precision import named
from varedit_runtime.text import Instructions, read_tokenizer

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack

BESIDE_WEIGHTS = ("config.json", "tokenizer.json")  # the other files that a folder has to have
SHARED = "shared.weight"
# The names of one token embedding, of which a file stores some.
EMBEDDINGS = (SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LARGEST_TOKENIZER = 2**25  # bytes; T5's has 2.4 million
# T5's name of the product that transformers lets differ in type.
T5_PRODUCTS = {"wo": "blocks.down"}


class TextEncoder:
    """A T5 encoder and its tokenizer: from instructions to the features of their tokens."""

    def __init__(self, model: "T5Stack", vocabulary: Vocabulary) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self._instructions = Instructions(vocabulary, MAX_TEXT_TOKENS)

    @classmethod
    def load(cls, folder: str | Path, precision: str = "fp32") -> "TextEncoder":
        """Load the encoder of a T5 folder (config.json, tokenizer.json, weights) on the CPU.

        Raises CheckpointError if the folder is no T5 model, MissingExtraError without transformers.
        """
        vocabulary = read_vocabulary(folder)
        model = empty_encoder(read_config(folder), precision)
        weights = fit(model, encoder_weights(folder), t5_layout, folder)
        return cls(load(model, weights), vocabulary)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> list[Tensor]:
        """Encode instructions: per instruction, features [T_i, text_channels], end token included.

        truncate: cut a long instruction at 512 tokens, as the released code does. Raises
        TextError on an empty instruction, and on a long one unless truncate.
        """
        tokens = [self.tokenise(prompt, truncate=truncate) for prompt in prompts]
        device = self.model.device
        ids = pad_sequence([torch.tensor(t) for t in tokens], batch_first=True).to(device)
        lengths = torch.tensor([len(t) for t in tokens], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        features = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return [row[: len(t)] for row, t in zip(features, tokens, strict=True)]  # without padding

    def tokenise(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Return an instruction's token ids, end token included. Raises TextError as `encode`."""
        return self._instructions.tokenise(prompt, truncate=truncate)


def t5_layout(own: NamedShape) -> NamedShape:
    """Return a parameter of the encoder as a T5 file names it (a `checkpoint.FileLayout`)."""
    name = SHARED if own.name == "embed_tokens.weight" else f"encoder.{own.name}"
    return NamedShape(name, own.shape)


def text_encoder_weights(folder: Path, config: TransformerConfig) -> Weights:
    """Open the encoder that a transformer reads by T5's names, in the file's types.

    Raises CheckpointError if the folder is no whole T5 model, or of another width.
    """
    read_vocabulary(folder)
    weights = encoder_weights(folder)
    fit(empty_encoder(read_config(folder)), weights, t5_layout, folder)
    width = weights[SHARED].shape[1]
    if width != config.text_channels:
        raise CheckpointError(
            f"{folder} holds an encoder of width {width}, and the transformer reads "
            f"{config.text_channels}: give the text encoder it was trained with (Flan-T5-XL)"
        )
    return weights


def encoder_weights(folder: str | Path) -> Weights:
    """Return the weights of a T5 folder's encoder by T5's names, without decoder and language head.

    The token embedding, which T5 stores under one name or several, is returned as `shared.weight`.
    Raises CheckpointError on unreadable weights or a folder without a T5 encoder.
    """
    weights = open_weights(folder)
    blocks = {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith("encoder.") and name not in EMBEDDINGS
    }
    embedding = next((weights[name] for name in EMBEDDINGS if name in weights), None)
    if embedding is None or not blocks:
        raise CheckpointError(
            f"{folder} holds no T5 encoder: expected tensors named encoder.* and one of "
            f"{', '.join(EMBEDDINGS)}; give a Flan-T5 folder"
        )
    return Weights({SHARED: embedding, **blocks}, weights.notes)


def read_config(folder: str | Path) -> TextEncoderConfig:
    """Read a T5 folder's config.json. Raises CheckpointError if it is absent or not a T5's."""
    path = Path(folder) / "config.json"
    try:
        return TextEncoderConfig.from_json(json.loads(read_header_file(path)))
    except (OSError, ValueError, RecursionError) as error:  # ConfigError is a ValueError
        raise CheckpointError(
            f"{path} does not describe a T5 encoder ({reason(error)}): give a Flan-T5 folder with "
            "its config.json"
        ) from error


def empty_encoder(config: TextEncoderConfig, precision: str = "fp32") -> "T5Stack":
    """Build an encoder on the meta device, its products in the types of a precision.

    Raises CheckpointError on a kind of MLP that T5 lacks, MissingExtraError without transformers.
    """
    policy = named(precision)
    encoder = t5_stack(config).type(torch_dtype(policy.type))
    for name, module in encoder.named_modules():
        if product := T5_PRODUCTS.get(name.rpartition(".")[2]):
            module.type(torch_dtype(policy.format("text_encoder", product).type))
    return encoder


def t5_stack(config: TextEncoderConfig) -> "T5Stack":
    """Build an encoder on the meta device, in fp32. Raises as `empty_encoder`."""
    with needs_extra("export"):
        from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config(**config.json)).encoder
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the text encoder has an MLP of kind {shown(config.mlp)}, which T5 has not: give a "
            "Flan-T5 folder"
        ) from error


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Read a T5 folder's tokenizer.json. Raises CheckpointError if it is absent or not T5's."""
    path = Path(folder) / "tokenizer.json"
    if not Path(folder).is_dir():
        raise CheckpointError(f"there is no folder {folder}: give a Flan-T5 folder")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: download it, or make it from spiece.model: run "
            "pip install sentencepiece protobuf, then in Python "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return read_tokenizer(read_header_file(path, LARGEST_TOKENIZER))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} {error}: copy the one that came with Flan-T5") from error

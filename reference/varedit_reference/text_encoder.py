"""The text encoder: T5 (arXiv 1910.10683; Flan-T5-XL in the released models) over instructions.

An instruction is used as it is, without a template, followed by T5's end token.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from varedit_reference.checkpoint import NamedShape, fit, load
from varedit_reference.config import MAX_TEXT_TOKENS, TransformerConfig
from varedit_reference.weights_file import open_weights, torch_dtype
from varedit_runtime.errors import CheckpointError, MissingExtraError, needs_extra
from varedit_runtime.precision import named
from varedit_runtime.text import Instructions, read_tokenizer

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack

SHARED, EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
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
        model = empty_encoder(folder, precision)
        return cls(load(model, encoder_weights(folder), t5_layout, folder), vocabulary)

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


def text_encoder_weights(folder: Path, config: TransformerConfig) -> dict[str, Tensor]:
    """Open the encoder that a transformer reads by T5's names, in the file's types.

    Raises CheckpointError if the folder is no whole T5 model, or of another width.
    """
    read_vocabulary(folder)
    weights = encoder_weights(folder)
    fit(empty_encoder(folder), weights, t5_layout, folder)
    width = weights[SHARED].shape[1]
    if width != config.text_channels:
        raise CheckpointError(
            f"{folder} holds an encoder of width {width}, and the transformer reads "
            f"{config.text_channels}: give the text encoder it was trained with (Flan-T5-XL)"
        )
    return weights


def encoder_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the weights of a T5 folder's encoder by T5's names, without decoder and language head.

    The token embedding, which T5 stores under one name or two, is returned as `shared.weight`.
    Raises CheckpointError on unreadable weights or a folder without a T5 encoder.
    """
    weights = open_weights(folder)
    encoder = {name: t for name, t in weights.items() if name.startswith("encoder.")}
    embedding = encoder.pop(EMBEDDING, weights.get(SHARED))
    if embedding is None or not encoder:
        raise CheckpointError(
            f"{folder} holds no T5 encoder: expected tensors named {SHARED} and encoder.*; give a "
            "Flan-T5 folder"
        )
    return {SHARED: embedding, **encoder}


def empty_encoder(folder: str | Path, precision: str = "fp32") -> "T5Stack":
    """Build the encoder that a T5 folder's config.json describes, on the meta device.

    Raises CheckpointError on a folder without a T5 configuration, MissingExtraError without
    transformers.
    """
    path, policy = Path(folder) / "config.json", named(precision)
    try:
        encoder = t5_stack(json.loads(path.read_bytes())).type(torch_dtype(policy.type))
    except MissingExtraError:
        raise
    except Exception as error:  # transformers raises whatever a wrong value happens to break
        raise CheckpointError(
            f"{path} does not describe a T5 encoder: give a Flan-T5 folder with its config.json"
        ) from error
    for name, module in encoder.named_modules():
        if product := T5_PRODUCTS.get(name.rpartition(".")[2]):
            module.type(torch_dtype(policy.format("text_encoder", product).type))
    return encoder


def t5_stack(settings: Mapping[str, Any]) -> "T5Stack":
    """Build the encoder that a T5 config.json describes, on the meta device."""
    with needs_extra("export"):
        from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        return T5EncoderModel(T5Config(**settings)).encoder


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Read a T5 folder's tokenizer.json. Raises CheckpointError if it is absent or not T5's."""
    path = Path(folder) / "tokenizer.json"
    if not Path(folder).is_dir():
        raise CheckpointError(f"there is no folder {folder}: give a Flan-T5 folder")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: download it, or make it from spiece.model with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return read_tokenizer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} {error}: copy the one that came with Flan-T5") from error

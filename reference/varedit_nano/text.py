"""nano's text encoder: a vocabulary made from its instructions, and a small T5 encoder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase, digits, punctuation

import torch
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Stack

from varedit_nano.files import write_weights
from varedit_reference.checkpoint import NamedShape
from varedit_reference.text_encoder import t5_layout
from varedit_runtime.text import END_TOKEN

PAD_TOKEN, UNKNOWN_TOKEN = "<pad>", "<unk>"
VOCABULARY_SIZE = 768


def build_vocabulary(instructions: Iterable[str]) -> Vocabulary:
    """Train a vocabulary of lower-case word pieces (BPE); frequent words are one piece.

    Every printable ASCII character is a piece, so that unknown words are spelt with known pieces;
    other characters become <unk>.
    """
    vocabulary = Vocabulary(models.BPE(unk_token=UNKNOWN_TOKEN))
    vocabulary.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Strip(),
        ]
    )
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    vocabulary.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN],
        initial_alphabet=list(ascii_lowercase + digits + punctuation),
        show_progress=False,
    )
    vocabulary.train_from_iterator(instructions, trainer)
    return vocabulary


def new_text_encoder(vocabulary: Vocabulary, channels: int) -> T5Stack:
    """Build an untrained T5 encoder of three layers, as transformers initialises it."""
    config = T5Config(
        vocab_size=vocabulary.get_vocab_size(),
        d_model=channels,
        d_kv=32,
        d_ff=2 * channels,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=vocabulary.token_to_id(PAD_TOKEN),
        eos_token_id=vocabulary.token_to_id(END_TOKEN),
        architectures=["T5EncoderModel"],
    )
    return T5EncoderModel(config).encoder


def text_features(model: T5Stack, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Encode token ids to features [T_i, text_channels], with gradients."""
    lengths = torch.tensor([len(ids) for ids in tokens])
    ids = pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    ids, mask = ids.to(model.device), mask.long().to(model.device)
    features = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [row[:length] for row, length in zip(features, lengths.tolist(), strict=True)]


def write_text_folder(
    folder: Path, model: T5Stack, vocabulary: Vocabulary, dtype: torch.dtype = torch.float32
) -> None:
    """Write a T5 folder: config.json, tokenizer.json and the encoder's weights."""
    state = {
        t5_layout(NamedShape(name, tuple(tensor.shape))).name: tensor
        for name, tensor in model.state_dict().items()
    }
    write_weights(folder / "model.safetensors", state, dtype)
    model.config.to_json_file(folder / "config.json")
    vocabulary.save(str(folder / "tokenizer.json"))

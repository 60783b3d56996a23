"""A small random T5 and its tokenizer, in folders as Hugging Face writes them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5ForConditionalGeneration

WORDS = ("make", "the", "sky", "red", "add", "a", "hat", "remove", "dog")


def write_t5(
    folder: Path, width: int = 128, shards: str = "safetensors"
) -> T5ForConditionalGeneration:
    """Write a T5, encoder and decoder, as sharded .safetensors or .bin; return the model."""
    config = T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(folder, max_shard_size="200KB")
    if shards == "bin":
        rewrite_as_bin(folder)
    write_vocabulary(folder)
    return model


def rewrite_as_bin(folder: Path) -> None:
    """Replace a folder's safetensors shards by two .bin shards with an index."""
    model = T5ForConditionalGeneration.from_pretrained(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = model.state_dict()
    names = list(state)
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{shard:05}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_vocabulary(folder: Path) -> None:
    """Write a unigram tokenizer.json, which adds the end token as T5's does."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    vocabulary = Tokenizer(models.Unigram(pieces, unk_id=2))
    vocabulary.pre_tokenizer = pre_tokenizers.Metaspace()
    vocabulary.decoder = decoders.Metaspace()
    vocabulary.add_special_tokens(["<pad>", "</s>", "<unk>"])
    vocabulary.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    # Settings that a published file may carry and that must not act here.
    vocabulary.enable_truncation(4)
    vocabulary.enable_padding(length=16)
    vocabulary.save(str(folder / "tokenizer.json"))

"""Convert released checkpoints to one safetensors file per component, in this reference's names.

    OUTPUT/transformer.safetensors
    OUTPUT/tokenizer.safetensors
    OUTPUT/text_encoder/   model.safetensors (the encoder alone), config.json, tokenizer.json

The weights keep the float type of the released files.
"""

import shutil
from pathlib import Path

from varedit_reference.checkpoint import tokenizer_weights, transformer_weights
from varedit_reference.config import preset
from varedit_reference.text_encoder import text_encoder_weights
from varedit_reference.weights_file import check_room, whole_file, write_safetensors

TEXT_ENCODER_FILES = ("config.json", "tokenizer.json")


def convert(
    size: str,
    transformer: str | Path,
    tokenizer: str | Path,
    text_encoder: str | Path,
    output: str | Path,
) -> list[Path]:
    """Convert a transformer, a tokenizer and a T5 folder; return the files written to output.

    size: the preset that the weights must fit. Every file appears whole or not at all; memory holds
    about one tensor at a time. Raises ConfigError on an unknown size, CheckpointError if weights
    cannot be read or do not fit, or the disk has no room for all of them.
    """
    output, text_encoder = Path(output), Path(text_encoder)
    config = preset(size)
    components = {
        "transformer.safetensors": transformer_weights(transformer, config.transformer),
        "tokenizer.safetensors": tokenizer_weights(tokenizer, config.tokenizer),
        "text_encoder/model.safetensors": text_encoder_weights(text_encoder, config.transformer),
    }
    tensors = [tensor for weights in components.values() for tensor in weights.values()]
    check_room(output, sum(tensor.nbytes for tensor in tensors))
    for name, weights in components.items():
        component = name.removesuffix(".safetensors").removesuffix("/model")
        metadata = {"format": "varedit_reference", "component": component, "size": size}
        write_safetensors(output / name, weights, metadata)
    for name in TEXT_ENCODER_FILES:
        source = text_encoder / name
        with whole_file(output / "text_encoder" / name, source.stat().st_size) as partial:
            shutil.copyfile(source, partial)
    names = [*components, *(f"text_encoder/{name}" for name in TEXT_ENCODER_FILES)]
    return [output / name for name in names]

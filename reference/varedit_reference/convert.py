"""Convert released checkpoints to one safetensors file per component, in this reference's names.

    OUTPUT/transformer.safetensors
    OUTPUT/tokenizer.safetensors
    OUTPUT/text_encoder/   model.safetensors (the encoder alone), config.json, tokenizer.json

The weights keep the float type of the released files.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from varedit_reference.checkpoint import tokenizer_weights, transformer_weights
from varedit_reference.config import preset
from varedit_reference.text_encoder import BESIDE_WEIGHTS, text_encoder_weights
from varedit_reference.weights_file import check_room, check_there, whole_file, write_safetensors
from varedit_runtime.errors import CheckpointError
from varedit_runtime.files import same_file

TRANSFORMER, TOKENIZER = "transformer.safetensors", "tokenizer.safetensors"
TEXT_ENCODER = "text_encoder"
WEIGHTS = "model.safetensors"  # of the text encoder


def convert(
    size: str,
    transformer: str | Path,
    tokenizer: str | Path,
    text_encoder: str | Path,
    output: str | Path,
    notice: Callable[[str], None] = lambda _: None,
    prefer_ema: bool = False,
) -> list[Path]:
    """Convert a transformer, a tokenizer and a T5 folder; return the files written to output.

    size: the preset that the weights must fit. notice: called with what was left out of names, or
    chosen from a file. prefer_ema: of the transformer, see `open_weights`. Every file appears whole
    or not at all; memory holds about one tensor at a time. Raises ConfigError on an unknown size,
    CheckpointError if weights cannot be read, do not fit or would be overwritten, or the disk has
    no room for all of them.
    """
    output, text_encoder = Path(output), Path(text_encoder)
    config, sources = preset(size), (Path(transformer), Path(tokenizer), text_encoder)
    check_there(sources)
    components = {
        output / TRANSFORMER: transformer_weights(transformer, config.transformer, prefer_ema),
        output / TOKENIZER: tokenizer_weights(tokenizer, config.tokenizer),
        output / TEXT_ENCODER / WEIGHTS: text_encoder_weights(text_encoder, config.transformer),
    }
    copies = {output / TEXT_ENCODER / name: text_encoder / name for name in BESIDE_WEIGHTS}
    _check_apart([*components, *copies], sources)
    for path, weights in components.items():
        for note in weights.notes:
            notice(f"{path}: {note}")
    tensors = [tensor for weights in components.values() for tensor in weights.values()]
    check_room(output, sum(tensor.nbytes for tensor in tensors))
    for path, weights in components.items():
        component = path.stem if path.parent == output else path.parent.name
        metadata = {"format": "varedit_reference", "component": component, "size": size}
        write_safetensors(path, weights, metadata)
    for path, source in copies.items():
        with whole_file(path, source.stat().st_size) as partial:
            shutil.copyfile(source, partial)
    return [*components, *copies]


def _check_apart(targets: Iterable[Path], sources: Iterable[Path]) -> None:
    """Raise CheckpointError if a file to write is one to read, or in a folder to read."""
    for target in targets:
        for source in sources:
            if same_file(target, source) or same_file(target.parent, source):
                raise CheckpointError(
                    f"{target} would be written over, or among, the weights of {source}: choose "
                    "another folder"
                )

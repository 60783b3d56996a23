"""Convert released checkpoints: `varedit-export convert`."""

from functools import partial
from pathlib import Path

import click

from varedit_export.commands.shared_options import (
    checkpoint_option,
    prefer_ema_option,
    text_encoder_option,
    tokenizer_option,
    yes_option,
)
from varedit_export.console import accept, say
from varedit_reference.config import preset
from varedit_runtime.errors import CheckpointError, needs_extra
from varedit_runtime.terminal.command import PATH


@click.command()
@click.option("--size", required=True, help="Size of the model: 2b or 8b.")
@checkpoint_option
@prefer_ema_option
@tokenizer_option
@text_encoder_option
@yes_option
@click.option("-o", "--output", type=PATH, required=True, help="The folder to write into.")
def convert(
    size: str,
    checkpoint: str | None,
    prefer_ema: bool,
    tokenizer: str | None,
    text_encoder: str | None,
    yes: bool,
    output: Path,
) -> None:
    """Write one safetensors file per component of the released checkpoints.

    \b
    varedit-export convert --size 2b --checkpoint 2B-512.pth \\
        --tokenizer infinity_vae_d32reg.pth --text-encoder flan-t5-xl \\
        -o converted/2b-512
    """
    given = {"checkpoint": checkpoint, "tokenizer": tokenizer, "text-encoder": text_encoder}
    if checkpoint is None or tokenizer is None or text_encoder is None:
        missing = " and ".join(f"--{name}" for name, path in given.items() if path is None)
        raise CheckpointError(f"convert needs {missing} too")
    preset(size)
    with needs_extra("export"):
        from varedit_export.weights.published import bring_weights
        from varedit_reference.convert import convert as convert_checkpoints

    files = bring_weights([checkpoint, tokenizer, text_encoder], partial(accept, yes))
    transformer, picture_tokenizer, text_folder = files.paths
    for path in convert_checkpoints(
        size, transformer, picture_tokenizer, text_folder, output, say, prefer_ema
    ):
        click.echo(path)

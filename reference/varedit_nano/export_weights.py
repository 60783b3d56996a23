"""Write a trained model to the package: `python -m varedit_nano.export_weights`."""

from pathlib import Path

import click
import torch

from varedit_nano.files import write_weights
from varedit_nano.model import TEXT_FOLDER, TOKENIZER_FILE, TRANSFORMER_FILE, WEIGHTS
from varedit_nano.text import write_text_folder
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import CheckpointError

LARGEST_BYTES = 40 * 10**6


def export_weights(tokenizer: Path, run: Path, out: Path = WEIGHTS) -> int:
    """Write averaged weights in fp16, which halves the download.

    tokenizer: the file that the transformer was trained with. run: the transformer's run folder.
    Returns the bytes written. Raises CheckpointError if they exceed the package's limit.
    """
    write_weights(out / TOKENIZER_FILE, open_weights(tokenizer), torch.float16)
    transformer = open_weights(run / "ema" / TRANSFORMER_FILE)
    write_weights(out / TRANSFORMER_FILE, transformer, torch.float16)
    text = TextEncoder.load(run / "ema" / TEXT_FOLDER)
    write_text_folder(out / TEXT_FOLDER, text.model, text.vocabulary, torch.float16)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > LARGEST_BYTES:
        raise CheckpointError(
            f"the weights take {size / 1e6:.0f} MB of at most {LARGEST_BYTES / 1e6:.0f}: make "
            "the model smaller"
        )
    return size


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--run", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS)
def main(tokenizer: Path, run: Path, out: Path) -> None:
    """Write the averaged weights of a transformer's run and its tokenizer to OUT."""
    size = export_weights(tokenizer, run, out)
    click.echo(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

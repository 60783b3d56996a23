"""The `varedit-export` command."""

from pathlib import Path

import click

from varedit_runtime.command import CommandGroup, debug_option
from varedit_runtime.errors import needs_extra

_PATH = click.Path(path_type=Path)


@click.group(cls=CommandGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Export VAREdit models.

    Graphs are NOT in this version yet. What works today: converting released checkpoints to one
    safetensors file per component.
    """


@main.command()
@click.option("--size", required=True, help="2b or 8b: the size of the model.")
@click.option(
    "--checkpoint",
    type=_PATH,
    required=True,
    help="The transformer: a .pth or .safetensors file, or a folder of shards.",
)
@click.option(
    "--tokenizer", type=_PATH, required=True, help="The image tokenizer: infinity_vae_*.pth."
)
@click.option("--text-encoder", type=_PATH, required=True, help="The flan-t5-xl folder.")
@click.option("-o", "--output", type=_PATH, required=True, help="The folder to write into.")
def convert(size: str, checkpoint: Path, tokenizer: Path, text_encoder: Path, output: Path) -> None:
    """Write one safetensors file per component of the released checkpoints."""
    with needs_extra("export"):
        from varedit_reference.convert import convert as convert_checkpoints

    for path in convert_checkpoints(size, checkpoint, tokenizer, text_encoder, output):
        click.echo(path)

"""Write a bundle for Triton: `varedit-export triton`."""

from pathlib import Path

import click

from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import printable
from varedit_runtime.terminal.command import BUNDLE, PATH, backend_option, variant_option


@click.command()
@click.argument("bundle", type=BUNDLE)
@backend_option()
@variant_option
@click.option("-o", "--output", type=PATH, required=True, help="Triton's model repository.")
def triton(bundle: Path, backend: str, variant: str | None, output: Path) -> None:
    """Write BUNDLE as a model of NVIDIA's Triton Inference Server.

    The model has the bundle's name and contains it: as hard links, which take no room, where the
    repository is on the same disk. It batches, and its queue has bounds, which its config.pbtxt
    states. Triton's Python needs varedit-export installed.

    \b
    varedit-export triton bundles/2b-512 -o models
    tritonserver --model-repository models
    """
    from varedit_export.triton.repository import write_repository

    click.echo(printable(f"{write_repository(Bundle.open(bundle), variant, backend, output)}"))

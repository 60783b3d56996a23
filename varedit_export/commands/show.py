"""Show what a bundle or a machine has: `varedit-export inspect`, `doctor`."""

from pathlib import Path

import click

from varedit_export.describe import described
from varedit_runtime.bundle import Bundle
from varedit_runtime.terminal.command import BUNDLE


@click.command()
@click.argument("bundle", type=BUNDLE)
def inspect(bundle: Path) -> None:
    """Show what is in a bundle: model, variants, graphs, sizes, precision, parity.

    \b
    varedit-export inspect bundles/2b-512
    """
    click.echo(described(Bundle.open(bundle)))


@click.command()
@click.argument("bundle", type=BUNDLE, required=False)
@click.pass_context
def doctor(context: click.Context, bundle: Path | None) -> None:
    """Show which backends can edit pictures here, why others cannot, and what would help.

    With BUNDLE, show also whether it can edit pictures, which takes a text encoder and
    weights that are not random, whether it fits in memory, and which of its engines are
    for this machine. Exits with 1 if no backend can run here, or BUNDLE cannot edit.

    \b
    varedit-export doctor
    varedit-export doctor bundles/2b-512
    """
    from varedit_export.doctor import can_edit, report
    from varedit_runtime.backends.detect import detect_machine

    machine = detect_machine(bundle)
    click.echo(report(machine))
    if not can_edit(machine):
        context.exit(1)

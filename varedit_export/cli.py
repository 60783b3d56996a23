"""The `varedit-export` command; what its subcommands do is in `commands/`."""

import click

from varedit_export.commands.attention import attention
from varedit_export.commands.bench import bench
from varedit_export.commands.build import build
from varedit_export.commands.convert import convert
from varedit_export.commands.engines import engines, layers
from varedit_export.commands.evaluate import evaluate
from varedit_export.commands.filter import filter_pairs
from varedit_export.commands.show import doctor, inspect
from varedit_export.commands.train import train
from varedit_export.commands.triton import triton
from varedit_export.commands.verify import verify
from varedit_runtime.terminal.command import CommandGroup, debug_option


@click.group(cls=CommandGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Export VAREdit models to bundles that `varedit-run` edits pictures with.

    \b
    varedit-export build --size nano
    varedit-export build --size 8b --res 512 --precision fp16
    varedit-export build --size tiny-2b --res 256 --random-weights 0
    """


for command in (
    *(build, engines, verify, layers, inspect, doctor, bench, evaluate, attention),
    *(train, filter_pairs, convert, triton),
):
    main.add_command(command)

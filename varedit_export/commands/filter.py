"""Filter pairs to fine-tune on: `varedit-export filter`."""

from functools import partial

import click

from varedit_export.commands.shared_options import (
    PLACE,
    option_of,
    with_judge,
    with_options,
    yes_option,
)
from varedit_export.console import accept, progress, say
from varedit_export.options import FilterOptions
from varedit_runtime.errors import needs_extra
from varedit_runtime.terminal.command import PATH

PARTS = 20  # lines of progress where there is no terminal


@click.command("filter")
@click.argument("data", metavar=f"{PLACE}...", nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="The new list, a .jsonl.")
@option_of(
    FilterOptions,
    "--least",
    help="Keep pairs with this score, 0 to 10, or more: for match, source and target.",
)
@with_judge
@yes_option
@with_options(FilterOptions)
def filter_pairs(options: FilterOptions, yes: bool) -> None:
    """Let a judge say which pairs are worth learning from.

    It scores how well the pictures match the instruction, and how clear each picture is. The list
    has all pairs, with scores and reasons; those that are dropped are passed over when it is read.
    It lies in a folder that the pictures are in or below. The same command continues a run that was
    interrupted, and no answer is asked for twice.

    \b
    varedit-export filter photos/pairs.jsonl -o photos/kept.jsonl \\
        --judge http://127.0.0.1:8000/v1 --judge-model Qwen/Qwen3-VL-30B-A3B-Instruct
    varedit-export filter hf://datasets/osunlp/MagicBrush -o kept.jsonl --judge ...
    """
    with needs_extra("evaluate"):
        from varedit_export.pairs import filter as filtering

    with progress(PARTS) as on_step:
        filtered = filtering.filter_pairs(options, on_step, say, partial(accept, yes))
    say(str(filtered))
    click.echo(options.output)

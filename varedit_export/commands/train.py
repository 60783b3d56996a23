"""Fine-tune a model: `varedit-export train`."""

from functools import partial
from typing import get_args

import click

import varedit_export
from varedit_export.commands.shared_options import (
    PLACE,
    checkpoint_option,
    option_of,
    prefer_ema_option,
    source_option,
    text_encoder_option,
    tokenizer_option,
    with_options,
    yes_option,
)
from varedit_export.console import accept, say
from varedit_export.options import TrainOptions, TrainPrecision
from varedit_runtime.terminal.command import PATH


@click.command()
@click.option("--size", required=True, help="The model: nano, 2b or 8b, or one for tests.")
@click.option("--res", "resolution", type=int, help="256, 512 or 1024 px. nano has 128.")
@checkpoint_option
@prefer_ema_option
@tokenizer_option
@text_encoder_option
@source_option
@yes_option
@click.option("--random-weights", type=int, help="Seed of random weights, to try memory and speed.")
@click.option(
    "--data",
    metavar=PLACE,
    multiple=True,
    required=True,
    help="Pairs: JSON lines, tables, shards, a folder; repeatable.",
)
@click.option("-o", "--output", type=PATH, required=True, metavar="RUN", help="The run's folder.")
@click.option("--cache", type=PATH, help="Folder of the pairs' tokens. Default: RUN/tokens.")
@click.option("--lora", type=int, metavar="RANK", help="Train a LoRA adapter, not all weights.")
@option_of(TrainOptions, "--steps", help="Steps of the whole run.")
@option_of(TrainOptions, "--batch", help="Pairs of a step.")
@click.option(
    "--learning-rate",
    type=float,
    help="Default: the paper's, 6e-5, and 1.875e-5 from 512 px on; ten times that with --lora.",
)
@option_of(TrainOptions, "--seed", help="Of all that is random.")
@option_of(TrainOptions, "--held-out", help="Most pairs that are only measured on.")
@option_of(
    TrainOptions,
    "--precision",
    type=click.Choice(get_args(TrainPrecision)),
    help="Of products; auto: bf16 on a GPU.",
)
@option_of(TrainOptions, "--at-once", help="Pairs computed at a time; changes no result.")
@click.option(
    "--keep-activations", is_flag=True, help="Faster, with more memory: compute no block twice."
)
@option_of(TrainOptions, "--log-every", help="Steps between losses.")
@option_of(TrainOptions, "--save-every", help="Steps between checkpoints.")
@option_of(TrainOptions, "--report-every", help="Steps between sheets.")
@click.option("--dry-run", is_flag=True, help="Say what memory it takes; fetch and train nothing.")
@with_options(TrainOptions)
def train(options: TrainOptions, yes: bool, dry_run: bool) -> None:
    """Fine-tune a model on pairs of pictures and the instructions between them.

    RUN gets the result: adapter.safetensors of --lora, which `build --lora` merges, or
    transformer.safetensors, which `build --checkpoint` takes. It also gets the losses of every
    scale (log.jsonl), sheets of edits, and a checkpoint: the same command continues a run that was
    interrupted, as if it had not been. With several GPUs, start it with torchrun.

    \b
    varedit-export train --size nano --data pairs.jsonl --lora 16 -o runs/nano
    varedit-export train --size 8b --res 512 --data pairs.jsonl --lora 32 -o runs/style
    torchrun --nproc-per-node 8 --no-python varedit-export train --size 8b --res 512 \\
        --data hf://datasets/OWNER/PAIRS --batch 256 -o runs/8b --yes
    """
    if dry_run:
        click.echo(varedit_export.plan_train(options))
        return
    click.echo(varedit_export.train(options, say, partial(accept, yes)))

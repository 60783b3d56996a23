"""The options that several commands have."""

from collections.abc import Callable, Collection
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from varedit_export.options import (
    BuildOptions,
    EngineOptions,
    EvaluateOptions,
    FilterOptions,
    JudgedOptions,
    TrainOptions,
    VerifyOptions,
)
from varedit_runtime.backends.engines.engine_set import LAYOUTS
from varedit_runtime.terminal.command import BUNDLE, PATH

Command = Callable[..., None]

PLACE = "PATH|hf://..."  # a file or folder here, or one on the Hugging Face hub
checkpoint_option = click.option(
    "--checkpoint",
    metavar=PLACE,
    help="The transformer: a .pth or .safetensors file, or a folder of shards.",
)
prefer_ema_option = click.option(
    "--prefer-ema",
    is_flag=True,
    help="Of a training's checkpoint take the average of the weights (EMA), which it has to have.",
)
tokenizer_option = click.option(
    "--tokenizer", metavar=PLACE, help="The picture tokenizer: infinity_vae_*.pth."
)
text_encoder_option = click.option(
    "--text-encoder", metavar=PLACE, help="The flan-t5-xl folder, or OWNER/REPOSITORY."
)
source_option = click.option(
    "--from",
    "source",
    metavar="OWNER/REPOSITORY|FOLDER",
    help="Where the published weights are taken from; by default their authors'.",
)
yes_option = click.option("--yes", is_flag=True, help="Download weights without asking.")
architectures_option = click.option(
    "--architecture",
    "architectures",
    multiple=True,
    help="GPU architecture, such as sm89; repeatable, tensorrt-rtx only. Default: this GPU's.",
)
fail_below_option = click.option(
    "--fail-below",
    metavar="SCORE=NUMBER",
    multiple=True,
    help="Exit with 1 if a score's overall mean is worse than this, or an edit could not be made; "
    "repeatable.",
)


class BundleOr(click.ParamType):
    """A bundle, or one of some names, which then are not looked for among bundles.

    name: what it is, for messages. names: returns those that there are.
    """

    def __init__(self, name: str, names: Callable[[], Collection[str]]) -> None:
        self.name, self._names = name, names

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | Path:
        return value if value in self._names() else BUNDLE.convert(value, param, ctx)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return what gives a command several options, in this order."""

    def give(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return give


def option_of(kind: type[Any], *names: str, **of: Any) -> Callable[[Command], Command]:
    """Return an option that has, and shows, the default of its field in an options class."""
    own = next((name for name in names if name.isidentifier()), names[-1])
    own = own.removeprefix("--").replace("-", "_")
    defaults = {field.name: field.default for field in fields(kind)}
    return click.option(*names, default=defaults[own], show_default=True, **of)


with_judge = together(
    click.option(
        "--judge",
        metavar="URL",
        help="Ask a model that takes pictures, at an OpenAI-compatible address such as "
        "http://127.0.0.1:8000/v1. Its key: VAREDIT_JUDGE_KEY in the environment.",
    ),
    click.option("--judge-model", metavar="NAME", help="The model's name there."),
    option_of(JudgedOptions, "--judge-repeat", help="Answers about each edit."),
    option_of(JudgedOptions, "--judge-at-once", help="Edits at a time."),
    click.option("--judge-prompts", type=PATH, help="A folder of prompts in place of ours."),
    click.option(
        "--judge-price",
        type=(float, float),
        metavar="IN OUT",
        help="Price of a million tokens in, and out, to tell the cost.",
    ),
)


def layout_option(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option for where engines' weights are, under a command's own name for it."""
    return option_of(
        EngineOptions,
        name,
        "layout",
        type=click.Choice(LAYOUTS),
        help="Weights: inputs of the engines, inside one for all scales, or inside one per scale.",
    )


def with_options(
    kind: type[BuildOptions]
    | type[EngineOptions]
    | type[EvaluateOptions]
    | type[FilterOptions]
    | type[TrainOptions]
    | type[VerifyOptions],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one argument, `options`, in place of the fields of an options class."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(*arguments: Any, **given: Any) -> None:
            names = {field.name for field in fields(kind)} & given.keys()
            command(*arguments, options=kind(**{n: given.pop(n) for n in names}), **given)

        return call

    return decorate

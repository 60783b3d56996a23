"""The behaviour that all commands share: one-line errors, `--debug`, exit codes, `--backend`."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any

import click
from click.shell_completion import CompletionItem

from varedit_runtime.backends import BACKENDS, DEFAULT, choose, specs
from varedit_runtime.errors import VareditError, one_line

_DEBUG, _OPTIONS = "varedit.debug", "varedit.backends"


def _remember(context: click.Context, _: click.Parameter, debug: bool) -> None:
    context.meta[_DEBUG] = debug or _debugging(context)
    if debug:
        warnings.simplefilter("default")


def _debugging(context: click.Context) -> bool:
    return context.meta.get(_DEBUG, False)


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember,
    help="Show tracebacks, and the warnings of libraries.",
)


class CommandGroup(click.Group):
    """A group of commands that exits with 1 and one line on a VareditError, 130 on an interrupt.

    `--debug` shows tracebacks instead. It may stand before a command's name or, if the command has
    the option too, after it.
    """

    def invoke(self, ctx: click.Context) -> object:
        with warnings.catch_warnings():
            if not _debugging(ctx):
                warnings.simplefilter("ignore")
            try:
                return super().invoke(ctx)
            except VareditError as error:
                if _debugging(ctx):
                    raise
                click.echo(f"Error: {one_line(error)}", err=True)
                ctx.exit(1)
            except KeyboardInterrupt:
                if _debugging(ctx):
                    raise
                click.echo("Interrupted.", err=True)
                ctx.exit(130)


class Registered(click.ParamType):
    """A name in a registry, which is asked when a command line is read.

    name: what the names are of; names: returns those that there are.
    """

    def __init__(self, name: str, names: Callable[[], Iterable[str]]) -> None:
        self.name, self._names = name, names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return click.Choice(self._names()).convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._names())}]"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return click.Choice(self._names()).shell_complete(ctx, param, incomplete)


class BackendCommand(click.Command):
    """A command with `--backend` and the options of all backends.

    Its function gets one argument for all of them: `backend`, a ChosenBackend.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, with the backends' behind `--backend`."""
        params = super().get_params(ctx)
        place = 1 + next(i for i, param in enumerate(params) if param.name == "backend")
        return [*params[:place], *_backend_options(ctx).values(), *params[place:]]

    def invoke(self, ctx: click.Context) -> Any:
        options = {name: ctx.params.pop(name) for name in _backend_options(ctx)}
        ctx.params["backend"] = choose(ctx.params["backend"], **options)
        return super().invoke(ctx)


def _backend_options(ctx: click.Context) -> dict[str, click.Option]:
    """Return the options of all backends by their fields' names.

    Within one run they are the same objects, by which click knows the order they were given in.
    """
    if _OPTIONS not in ctx.meta:
        ctx.meta[_OPTIONS] = {
            option.name: _click_option(option)
            for spec in specs()
            for option in fields(spec.options)
        }
    return ctx.meta[_OPTIONS]


def backend_option(
    help: str, default: str = DEFAULT, compiling: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option `--backend`. compiling: only of backends that run compiled engines."""

    def names() -> Iterable[str]:
        return (spec.name for spec in specs() if spec.compiles) if compiling else BACKENDS

    name = Registered("backend", names)
    return click.option("--backend", type=name, default=default, show_default=True, help=help)


def _click_option(option: Field[Any]) -> click.Option:
    """Return a field of a backend's options as an option of a command."""
    flag = f"--{option.name.replace('_', '-')}"
    if isinstance(option.default, bool):
        return click.Option([flag], is_flag=True, help=option.metadata["help"])
    kind = int if "int" in str(option.type) else str
    return click.Option([flag], type=kind, **option.metadata)

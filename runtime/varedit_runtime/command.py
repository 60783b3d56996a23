"""The behaviour that all commands share: errors in one line, `--debug`, exit codes."""

import warnings

import click

from varedit_runtime.errors import VareditError, one_line

_DEBUG = "varedit.debug"


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

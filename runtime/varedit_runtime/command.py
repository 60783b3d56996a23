"""What the commands have in common: errors in one line, `--debug`, exit codes."""

import warnings

import click

from varedit_runtime.errors import VareditError

_DEBUG = "varedit.debug"


def _remember(context: click.Context, _: click.Parameter, debug: bool) -> None:
    context.meta[_DEBUG] = debug


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember,
    help="Show tracebacks, and the warnings of libraries.",
)


class CommandGroup(click.Group):
    """Ends with exit code 1 and one line on a VareditError, and with 130 on an interrupt."""

    def invoke(self, ctx: click.Context) -> object:
        if ctx.meta[_DEBUG]:
            return super().invoke(ctx)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return super().invoke(ctx)
            except VareditError as error:
                click.echo(f"Error: {' '.join(str(error).split())}", err=True)
                ctx.exit(1)
            except KeyboardInterrupt:
                click.echo("Interrupted.", err=True)
                ctx.exit(130)

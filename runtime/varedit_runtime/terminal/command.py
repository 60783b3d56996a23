"""The behaviour that all commands share: one-line errors, `--debug`, exit codes, `--backend`."""

import json
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from varedit_runtime.backends import BACKENDS, specs
from varedit_runtime.backends.auto import AUTO, wanted_backend
from varedit_runtime.backends.interrupt import exit_on_signals
from varedit_runtime.errors import VareditError, printable, reason
from varedit_runtime.terminal.streams import OutputError, dependable_streams

_OPTIONS = "varedit.backends"
_FAILED = 1
_INTERRUPTED = "Interrupted."


@dataclass
class _Run:
    """One run of a command.

    debug: show tracebacks. as_json: tell errors on stdout too. signals: those that ended it.
    interrupted: what is said then.
    """

    debug: bool = False
    as_json: bool = False
    signals: list[int] = field(default_factory=list)
    interrupted: str = _INTERRUPTED


def _remember(context: click.Context, _: click.Parameter, debug: bool) -> None:
    if debug:
        context.ensure_object(_Run).debug = True
        warnings.simplefilter("default")


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember,
    help="Show tracebacks, and the warnings of libraries.",
)


def say(line: str) -> None:
    """Print a line on stderr, `printable` whatever names of files or messages are in it.

    Does nothing where who read stderr has ended, as `| head` does: a server goes on.
    """
    with suppress(BrokenPipeError):
        click.echo(printable(line), err=True)


class OneLineErrors(click.Command):
    """A command that says on one line why it fails; to be mixed in.

    It exits with 1 on an error, also if its output cannot be written, with 2 on wrong usage, with
    130 on Ctrl-C and 143 on SIGTERM. `--debug` shows tracebacks too. It may stand before a
    command's name or, if the command has the option too, after it.
    """

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command line and end the process."""
        with dependable_streams():
            sys.exit(self._run(*args, **extra))

    def _run(self, *args: Any, **extra: Any) -> int | None:
        """Run a command line; return the exit code."""
        run = _Run()
        try:
            with exit_on_signals(run.signals), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # With color, click keeps names of files on stdout as they are, also in a pipe.
                return super().main(*args, **extra, standalone_mode=False, obj=run, color=True)
        except BaseException as error:
            if run.debug and not isinstance(error, click.ClickException):
                traceback.print_exception(error)
            code = _exit_code(error, run)
            if run.as_json and not isinstance(error, OutputError):
                _print_json(error, code)
            return code


class CommandGroup(OneLineErrors, click.Group):
    """A group of commands; it fails as `OneLineErrors` says."""


def tell_errors_as_json(context: click.Context) -> None:
    """Let an error of the run be told as JSON on stdout too."""
    context.ensure_object(_Run).as_json = True


def tell_when_interrupted(context: click.Context, advice: str) -> None:
    """Let a signal that ends the run be told with what the user can do then."""
    context.ensure_object(_Run).interrupted = f"{_INTERRUPTED} {advice}"


def error_as_json(error: BaseException, message: str, code: int) -> dict[str, Any]:
    """Return what JSON says of an error."""
    kind = "UsageError" if isinstance(error, click.UsageError) else type(error).__name__
    return {"error": {"type": kind, "message": message, "exit_code": code}}


def _print_json(error: BaseException, code: int) -> None:
    if code > 2:
        error, message = KeyboardInterrupt(), _INTERRUPTED
    elif isinstance(error, click.ClickException):
        message = printable(error.format_message())
    else:
        message = reason(error)
    with suppress(OutputError):
        click.echo(json.dumps(error_as_json(error, message, code)))


def _exit_code(error: BaseException, run: _Run) -> int:
    """Tell an error on stderr; return the exit code. Raises it if nobody could have expected it."""
    if run.signals or isinstance(error, click.Abort | KeyboardInterrupt):
        say(run.interrupted)  # whatever a library has made of a signal
        return 128 + next(iter(run.signals), signal.SIGINT)
    if isinstance(error, click.UsageError):
        if not isinstance(error, click.exceptions.NoArgsIsHelpError):
            error = click.UsageError(printable(error.format_message()), error.ctx)
        error.show()
        return error.exit_code
    if isinstance(error, OutputError) and isinstance(error.__cause__, BrokenPipeError):
        return _FAILED  # `| head` has read enough, and wants no message
    if isinstance(error, VareditError | OSError | MemoryError):
        say(f"Error: {reason(error)}")
        return _FAILED
    raise error


class _Path(click.Path):
    """A path, of which nothing is asked but that it is not empty: Path("") is this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("the path is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


class _BundlePath(_Path):
    """A bundle, by a name that `locate.named` knows or by its folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from varedit_runtime.locate import named

        path = super().convert(value, param, ctx)
        return named(value) if isinstance(value, str) else path  # the path has lost its "./"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from varedit_runtime.locate import NANO, label, own_bundles

        names = dict.fromkeys([NANO, *map(label, own_bundles())])
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, type="dir")]


PATH = _Path(path_type=Path, readable=False)  # whatever opens it says what is wrong
BUNDLE = _BundlePath(path_type=Path, readable=False)
TEXT_PATH = _Path(readable=False)  # as it was typed: a Path would change `./-` and `folder/`


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

    Its function gets one argument for all of them: `backend`, a ChosenBackend, or an AutoBackend
    that says on stderr what it chooses.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, with the backends' behind `--backend`."""
        params = super().get_params(ctx)
        place = 1 + next(i for i, param in enumerate(params) if param.name == "backend")
        return [*params[:place], *_backend_options(ctx).values(), *params[place:]]

    def invoke(self, ctx: click.Context) -> Any:
        options = {name: ctx.params.pop(name) for name in _backend_options(ctx)}
        ctx.params["backend"] = wanted_backend(ctx.params["backend"], say, **options)
        return super().invoke(ctx)


def _backend_options(ctx: click.Context) -> dict[str, click.Option]:
    """Return the options of all backends by their fields' names.

    Within one run they are the same objects, by which click knows the order they were given in. Of
    a name that several backends use, the first one says what it means.
    """
    if _OPTIONS not in ctx.meta:
        options = ctx.meta[_OPTIONS] = {}
        for option in (option for spec in specs() for option in fields(spec.options)):
            options.setdefault(option.name, _click_option(option))
    return ctx.meta[_OPTIONS]


variant_option = click.option(
    "--variant", metavar="NAME", help="The bundle's variant; by default its first."
)


def backend_option(
    help: str = "What runs the bundle; auto: the best that can here.",
    default: str = AUTO,
    compiling: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option `--backend`, with auto where that is the default.

    compiling: only of backends that run compiled engines.
    """

    def names() -> Iterable[str]:
        if compiling:
            return (spec.name for spec in specs() if spec.compiles)
        return (AUTO, *BACKENDS) if default == AUTO else BACKENDS

    name = Registered("backend", names)
    return click.option("--backend", type=name, default=default, show_default=True, help=help)


def _click_option(option: Field[Any]) -> click.Option:
    """Return a field of a backend's options as an option of a command."""
    flag = f"--{option.name.replace('_', '-')}"
    if isinstance(option.default, bool):
        return click.Option([flag], is_flag=True, help=option.metadata["help"])
    kind = int if "int" in str(option.type) else str
    return click.Option([flag], type=kind, **option.metadata)

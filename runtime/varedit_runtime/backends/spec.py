"""How a backend describes itself to the registry.

The commands ask every backend for its options when they start, and `doctor` asks all of them what
they can do, installed or not. So the module of a spec must import cheaply: it imports what is large
or optional (NumPy, ONNX Runtime, TensorRT) inside `probe` and `open` only.
"""

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, get_type_hints

from varedit_runtime.backends.machine import Machine, ProbeResult
from varedit_runtime.errors import (
    ANY_FAILURE,
    BackendError,
    ConfigError,
    one_line,
    printable,
    readable_size,
    reason,
    shown,
)
from varedit_runtime.values import CheckedOptions, checked

if TYPE_CHECKING:
    from varedit_runtime.backends.base import Backend
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.manifest import Variant


# Names of what else commands and `Editor.open` take.
RESERVED = {
    *("against", "as_json", "backend", "batches", "benchmark", "bundle", "compare", "data"),
    *("debug", "dial", "dials", "digest", "fail_below", "fast", "golden", "guidance_scale"),
    *("help", "images", "instruction", "json", "json_file", "judge", "judge_at_once"),
    *("judge_model", "judge_price", "judge_prompts", "judge_repeat", "keep_steps", "limit"),
    *("list", "listed", "mask", "max_side", "metric", "metrics", "negative_prompt"),
    *("on_ray", "output", "output_size", "overwrite", "previews", "ray", "repeat"),
    *("report", "seed", "temperature", "then", "variant", "version", "weights", "yes"),
}


@dataclass(frozen=True)
class BackendOptions(CheckedOptions):
    """The options of a backend that takes none, and the base of all others.

    Subclasses are frozen dataclasses whose fields are made with `option`. Every field is an option
    of the commands too, by its own name, which is none of RESERVED: `engines_digest` is
    `--engines-digest`. Its type is bool, int or str, the latter two also with None. `__post_init__`
    calls the one here, which checks types, and raises ConfigError on bad values.
    """


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """Return a field of a BackendOptions class; help and metavar are for the commands."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(BackendOptions):
    """The options of a backend that need not hold all weights at once.

    offload: "text" to load the text encoder's weights when an instruction is encoded, and to
    release them before the transformer runs; None to hold all weights.
    """

    offload: str | None = option(
        None, "text: hold the text encoder only while it runs, for less memory.", "text"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload not in (None, "text"):
            raise ConfigError(f"offload is {shown(self.offload)}; it can only be text")


@dataclass(frozen=True)
class Verdict:
    """What `doctor` says about a backend.

    backend: its name, with the provider where it has several. what: what it can do, or why it
    cannot. fix: the commands that help, to be run in this order.
    """

    backend: str
    word: Literal["can run", "can compile", "cannot"]
    what: str
    fix: tuple[str, ...] = ()

    def __str__(self) -> str:
        return report_line(self.backend, f"{self.word}: {self.what}{commands_hint(self.fix)}")


Options = TypeVar("Options", bound=BackendOptions)


class BackendSpec(ABC, Generic[Options]):
    """A backend as the registry knows it.

    name: what users type. options: the class of its options. packages: the distributions that
    provide it, whose versions `doctor` lists. compiles: whether it runs engines, which
    `varedit-export engines` compiles, instead of a bundle's graphs.
    """

    name: ClassVar[str]
    options: type[Options]
    packages: ClassVar[tuple[str, ...]] = ()
    compiles: ClassVar[bool] = False

    @abstractmethod
    def verdicts(self, machine: Machine) -> Sequence[Verdict]:
        """Judge whether the backend runs on a machine, and its bundle if there is one.

        Judge by the machine's facts alone, so that tests can make up machines.
        """

    @abstractmethod
    def open(self, bundle: "Bundle", variant: "Variant", options: Options) -> "Backend":
        """Load a variant of a bundle.

        Raises MissingExtraError when the backend is not installed, BackendError when it cannot run
        here or the memory is too small, BundleError when the bundle lacks what it runs.
        """

    def probe(self) -> ProbeResult:
        """Import what the backend needs and return what that can do. Raises nothing."""
        return ProbeResult()

    def report(self, machine: Machine) -> Iterator[tuple[str, str]]:
        """Yield (name, text) for every line of `doctor` about what is installed."""
        for package in self.packages:
            yield package, machine.packages.get(package, "not installed")


class BrokenBackend(BackendSpec[BackendOptions]):
    """A registered backend that cannot be imported or described: it stays listed and says why."""

    options = BackendOptions

    def __init__(self, name: str, problem: str) -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]: of this one alone
        self._problem = problem

    def verdicts(self, machine: Machine) -> Sequence[Verdict]:
        return (Verdict(self.name, "cannot", self._problem),)

    def open(self, bundle: "Bundle", variant: "Variant", options: BackendOptions) -> "Backend":
        raise BackendError(f"backend {self.name} cannot be used: {self._problem}")


def check_spec(name: str, spec: object) -> BackendSpec[Any]:
    """Return the spec that is registered by a name. Raises ConfigError if it breaks the rules."""
    if not isinstance(spec, BackendSpec):
        raise ConfigError(f"{shown(spec)} is no BackendSpec")
    if spec.name != name:
        raise ConfigError(f"its name is {shown(spec.name)}")
    checked("packages", spec.packages, tuple[str, ...])
    checked("compiles", spec.compiles, bool)
    options = checked("options", spec.options, type)
    if not issubclass(options, BackendOptions) or "__dataclass_fields__" not in vars(options):
        raise ConfigError(f"{options.__name__} is no dataclass below BackendOptions")
    hints = get_type_hints(options)
    for own in fields(options):
        _check_option(own, hints[own.name])
    return spec


def _check_option(option: Field[Any], hint: Any) -> None:
    name = option.name
    if name in RESERVED or not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigError(f"no option can be called {shown(name)}")
    if hint not in (bool, int, str, int | None, str | None):
        raise ConfigError(f"option {name} is of no type that an option can have")
    if not option.metadata.keys() >= {"help", "metavar"}:
        raise ConfigError(f"option {name} is not made with option()")
    checked(name, option.default, hint)


# Facts and sentences that several backends use


def try_import(name: str) -> ModuleType | str:
    """Import a module. Return why it fails in one line, or "" when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "" if error.name == name else one_line(error)
    except ANY_FAILURE as error:  # libraries that are missing or of another version
        return reason(error)


def too_little(free: int | None, needed: int, of: str, offloaded: int = 0) -> str | None:
    """Return a sentence when fewer bytes of some memory are free than needed.

    offloaded: the bytes that are needed with `--offload text`; 0 where that is unknown.
    """
    if free is None or free >= needed:
        return None
    wanted, left = readable_size(needed), readable_size(free)
    less = f", or edit with --offload text, which takes {readable_size(offloaded)}"
    hint = less if 0 < offloaded <= free else ""
    return f"about {wanted} of {of} are needed and {left} free: end other programs{hint}"


def install_command(name: str) -> str:
    """Return the command that installs an extra of the distribution."""
    return f'pip install "varedit-export[{name}]"'


def commands_hint(commands: Sequence[str]) -> str:
    """Return the end of a sentence that says which commands to run; "" without any."""
    return f"; run {' and '.join(f'`{command}`' for command in commands)}" if commands else ""


def report_line(name: str, text: str) -> str:
    """Return a line of `doctor` in two columns, printable whatever a library calls itself."""
    return printable(f"{name:<18}{text}")

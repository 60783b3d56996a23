"""The registry of backends: everything that can run a bundle, found by the name that users type.

To add a backend, write one module and add one line to BACKENDS. The module subclasses
`spec.BackendSpec`, which describes the backend, and `base.Backend`, which runs a bundle's stages.
The commands' `--backend`, `doctor`, `Editor.open` and `verify` then know it. `auto.py` says which
of them are chosen where none is named.
"""

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from varedit_runtime.backends.spec import BackendOptions, BackendSpec, BrokenBackend, check_spec
from varedit_runtime.errors import (
    ANY_FAILURE,
    BackendError,
    ConfigError,
    VareditError,
    reason,
    shown,
)
from varedit_runtime.values import CheckedOptions, checked

if TYPE_CHECKING:
    from varedit_runtime.backends.base import Backend
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.manifest import Variant

# The name of each backend, and the module and variable of its spec.
BACKENDS: dict[str, str] = {
    "onnxruntime": "varedit_runtime.backends.onnxruntime.spec:ONNXRUNTIME",
    "tensorrt": "varedit_runtime.backends.engines.spec:TENSORRT",
    "tensorrt-rtx": "varedit_runtime.backends.engines.spec:TENSORRT_RTX",
}
DEFAULT = "onnxruntime"


@dataclass(frozen=True)
class ChosenBackend(CheckedOptions):
    """A backend with checked options; `choose` makes one. why: how it came to be chosen."""

    spec: BackendSpec[Any]
    options: BackendOptions
    why: str = "as asked for"

    @property
    def label(self) -> str:
        """Its name, with the provider where it has several, as verdicts have it."""
        return " ".join(filter(None, (self.spec.name, getattr(self.options, "provider", ""))))

    def pick(self, bundle: "Bundle", variant: "Variant") -> "ChosenBackend":
        """Return itself, which is what runs; `auto.AutoBackend` chooses here."""
        return self

    def with_threads(self, threads: int) -> "ChosenBackend":
        """Return it with so many threads, if it computes on a CPU and no number was chosen."""
        options = vars(self.options)
        if options.get("provider") != "cpu" or options.get("threads", 0) is not None:
            return self
        return replace(self, options=type(self.options)(**options | {"threads": threads}))

    def open(self, bundle: "Bundle", variant: "Variant") -> "Backend":
        """Load a variant of a bundle; see `BackendSpec.open` for what it raises."""
        with _faults(self.spec, "cannot be opened", BackendError):
            return self.spec.open(bundle, variant, self.options)


@contextmanager
def _faults(spec: BackendSpec[Any], what: str, kind: type[VareditError]) -> Iterator[None]:
    """Turn what a backend at fault raises into an error that names it."""
    try:
        yield
    except VareditError:
        raise
    except ANY_FAILURE as error:
        raise kind(f"backend {spec.name} {what}: {reason(error)}") from error


def find_backend(name: str) -> BackendSpec[Any]:
    """Return a backend's spec.

    A backend that cannot be imported, or whose spec breaks the rules, has one too, which says why.
    Raises ConfigError on an unknown name.
    """
    name = checked("backend", name, str, f"one of {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise ConfigError(f"no backend is called {shown(name)}; there are {', '.join(BACKENDS)}")
    module, _, variable = BACKENDS[name].partition(":")
    try:
        spec = getattr(importlib.import_module(module), variable)
    except ANY_FAILURE as error:  # whatever an optional library raises must not hide the others
        return BrokenBackend(name, f"it cannot be imported ({reason(error)})")
    try:
        return check_spec(name, spec)
    except ANY_FAILURE as error:
        return BrokenBackend(name, f"its spec is wrong ({reason(error)})")


def specs() -> Iterator[BackendSpec[Any]]:
    """Yield every backend's spec, in the order of the registry."""
    yield from map(find_backend, BACKENDS)


def choose(backend: str | ChosenBackend = DEFAULT, **options: object) -> ChosenBackend:
    """Choose a backend by name, with its options by name; None and False mean "not given".

    Raises ConfigError on an unknown backend, and on options that are not the backend's, naming
    the backends that have them; and what the backend's options raise on bad values.
    """
    backend = checked("backend", backend, str | ChosenBackend, f"one of {', '.join(BACKENDS)}")
    given = {n: value for n, value in options.items() if value is not None and value is not False}
    if isinstance(backend, ChosenBackend):
        if given:
            raise ConfigError(f"{' and '.join(given)}: give these to choose(), with the backend")
        return backend
    spec = find_backend(backend)
    own = option_names(spec)
    if foreign := [name for name in given if name not in own]:
        owners = backends_with(foreign)
        whose = f", only {' and '.join(owners)}" if owners else ""
        raise ConfigError(
            f"backend {backend} does not take {' and '.join(foreign)}{whose}: leave that out, or "
            "choose another backend"
        )
    with _faults(spec, "refuses its options", ConfigError):
        return ChosenBackend(spec, spec.options(**given))


def backends_with(options: Collection[str]) -> list[str]:
    """Return the names of the backends that have all these options."""
    return [spec.name for spec in specs() if option_names(spec).issuperset(options)]


def option_names(spec: BackendSpec[Any]) -> set[str]:
    """Return the names of a backend's options."""
    return {option.name for option in fields(spec.options)}

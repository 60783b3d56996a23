"""Choose the best backend for a bundle on this machine: what `--backend auto` runs.

A backend counts only if it can run the bundle as it is here: engines of the variant were compiled
for this GPU, and precision and memory fit. What `doctor` says of a backend is what decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from varedit_runtime.backends import BACKENDS, ChosenBackend, backends_with, choose, find_backend
from varedit_runtime.backends.machine import Machine
from varedit_runtime.backends.spec import BackendSpec, OffloadOptions, Verdict
from varedit_runtime.errors import ANY_FAILURE, ConfigError, reason
from varedit_runtime.precision import BEST_ON_CPU, BEST_ON_GPU
from varedit_runtime.values import CheckedOptions, checked

if TYPE_CHECKING:
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.manifest import Variant

AUTO = "auto"
# What auto chooses from, the best first, as verdicts call them. All but the last need an NVIDIA
# GPU. The last is taken unasked where no other can run: opening it says what is wrong.
BEST_FIRST = ("tensorrt", "tensorrt-rtx", "onnxruntime cuda", "onnxruntime cpu")
NO_GPU = "no NVIDIA GPU was found"


def _ignore(_: str) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class AutoBackend(CheckedOptions):
    """The best backend, chosen when a bundle is opened.

    say: called with one line that says what was chosen, and why nothing better. offload: see
    `OffloadOptions`, which all that auto chooses from have. threads: on a CPU, where that is
    chosen; None for one per core.
    """

    say: Callable[[str], None] = _ignore
    offload: str | None = None
    threads: int | None = None

    def with_threads(self, threads: int) -> "AutoBackend":
        """Return what chooses a backend with so many threads, where it computes on a CPU."""
        return replace(self, threads=threads)

    def pick(self, bundle: "Bundle", variant: "Variant") -> ChosenBackend:
        """Choose for a variant of a bundle on this machine."""
        from varedit_runtime.backends.detect import detect_machine
        from varedit_runtime.backends.host import nvidia

        found = nvidia()
        if found.gpus:
            chosen = best(detect_machine(bundle, variant.name, found, self.offload))
        else:  # nothing else needs to be asked, which takes time
            chosen = _chosen(BEST_FIRST[-1], NO_GPU)
        self.say(told(chosen))
        if self.threads is not None:
            chosen = chosen.with_threads(self.threads)
        if self.offload and isinstance(chosen.options, OffloadOptions):
            return replace(chosen, options=replace(chosen.options, offload=self.offload))
        return chosen


def wanted_backend(
    backend: str | ChosenBackend | AutoBackend = AUTO,
    say: Callable[[str], None] = _ignore,
    /,
    **options: object,
) -> ChosenBackend | AutoBackend:
    """Return the backend that a caller names, with its options by name, or auto.

    An option that one backend alone has names that backend. Raises what `choose` raises.
    """
    known = f"one of {AUTO}, {', '.join(BACKENDS)}"
    backend = checked("backend", backend, str | ChosenBackend | AutoBackend, known)
    if isinstance(backend, AutoBackend):
        options = {**options, "offload": options.get("offload") or backend.offload}
        backend, say = AUTO, backend.say
    if backend != AUTO:
        return choose(backend, **options)
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given in ([], ["offload"]):
        offload = checked("offload", options.get("offload"), str | None)
        return AutoBackend(say, OffloadOptions(offload=offload).offload)
    owners = backends_with(given)
    if len(owners) != 1:
        whose = f" ({' or '.join(owners)})" if owners else ""
        raise ConfigError(f"{' and '.join(given)}: name the backend that takes this{whose}")
    return choose(owners[0], **options)


def verdicts(spec: BackendSpec[Any], machine: Machine) -> Sequence[Verdict]:
    """Return what a backend says about a machine, and its bundle if it has one."""
    try:
        return checked("its answer", spec.verdicts(machine), tuple[Verdict, ...])
    except ANY_FAILURE as error:  # a backend at fault must not hide what the others say
        return (Verdict(spec.name, "cannot", f"its check failed ({reason(error)})"),)


def best(machine: Machine, backend: str = AUTO) -> ChosenBackend:
    """Choose for a machine, and for its bundle if it has one.

    backend: the one to choose a provider of; by default all are chosen from.
    """
    labels = [label for label in BEST_FIRST if backend in (AUTO, label.split()[0])]
    if len(labels) < 2:  # a named one without providers to choose from
        return choose(backend)
    if not machine.nvidia.gpus:
        return _chosen(labels[-1], NO_GPU)
    missed: list[str] = []
    for label in labels[:-1]:
        judged = verdicts(find_backend(label.split()[0]), machine)
        verdict = next((one for one in judged if one.backend == label), judged[0])
        if verdict.word == "can run":
            return _chosen(label, "; ".join(missed) or "the first choice")
        missed.append(f"{label} {verdict.word}: {verdict.what}")
    return _chosen(labels[-1], "; ".join(missed))


def told(chosen: ChosenBackend) -> str:
    """Return one line that says what was chosen, and why."""
    return f"backend: {chosen.label} ({chosen.why})"


def best_precision(chosen: ChosenBackend) -> str:
    """Return the precision to build in for a backend."""
    return BEST_ON_GPU if chosen.label in BEST_FIRST[:-1] else BEST_ON_CPU


def _chosen(label: str, why: str) -> ChosenBackend:
    name, _, provider = label.partition(" ")
    return replace(choose(name, provider=provider or None), why=why)

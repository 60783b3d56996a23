"""What `doctor` reports about a machine: what is there, and what every backend says it can do."""

import shlex
from collections.abc import Iterator

from varedit_runtime.backends import BACKENDS, find_backend, specs
from varedit_runtime.backends.auto import AUTO, best, verdicts
from varedit_runtime.backends.engines.spec import EngineSpec, unfit
from varedit_runtime.backends.machine import BundleFacts, EngineSetFacts, Machine
from varedit_runtime.backends.spec import (
    Verdict,
    commands_hint,
    install_command,
    report_line,
    too_little,
)
from varedit_runtime.errors import ANY_FAILURE, readable_size, reason

EXPORT = (
    "torch",
    "transformers",
    "huggingface-hub",
    "safetensors",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "tqdm",
)


def all_verdicts(machine: Machine) -> tuple[Verdict, ...]:
    """Return what every backend says about a machine, and its bundle if it has one."""
    return tuple(verdict for spec in specs() for verdict in verdicts(spec, machine))


def can_edit(machine: Machine) -> bool:
    """Return whether any backend can run here, and the bundle, if there is one, is for editing."""
    if machine.bundle is not None and machine.bundle.unfit is not None:
        return False
    return any(verdict.word == "can run" for verdict in all_verdicts(machine))


def report(machine: Machine) -> str:
    """Return the report: a line for each thing that is there or missing, then the verdicts."""
    bundle = [] if machine.bundle is None else ["", *_bundle(machine, machine.bundle)]
    return "\n".join([*_installed(machine), *bundle, "", *_judged(machine)])


def _judged(machine: Machine) -> Iterator[str]:
    """Yield the verdicts, and which backend auto takes."""
    judged = all_verdicts(machine)
    yield from map(str, judged)
    label = best(machine).label
    if any(verdict.backend == label and verdict.word == "can run" for verdict in judged):
        yield report_line(AUTO, f"takes {label}")


def _installed(machine: Machine) -> Iterator[str]:
    packages, driver = machine.packages, machine.nvidia
    yield report_line("Python", machine.python)
    own = packages.get("varedit-export", "not installed, run from a clone")
    yield report_line("varedit-export", own)
    yield report_line("NVIDIA driver", driver.driver or f"none ({driver.problem})")
    for number, gpu in enumerate(driver.gpus):
        free = "unknown" if gpu.free is None else readable_size(gpu.free)
        text = f"{gpu.name}, {gpu.architecture}, free memory {free}"
        yield report_line(f"GPU {number}", text)
    for spec in specs():
        try:
            yield from [report_line(name, text) for name, text in spec.report(machine)]
        except ANY_FAILURE as error:  # as for verdicts
            yield report_line(spec.name, f"its report failed ({reason(error)})")
    missing = [name for name in EXPORT if name not in packages]
    absent = f"without {', '.join(missing)}{commands_hint((install_command('export'),))}"
    yield report_line("extra export", absent if missing else f"complete, torch {packages['torch']}")
    yield report_line(
        "free memory", "unknown" if machine.memory is None else readable_size(machine.memory)
    )
    yield report_line("free disk", f"{readable_size(machine.disk)} where bundles are built")


def _bundle(machine: Machine, bundle: BundleFacts) -> Iterator[str]:
    variants = ", ".join(bundle.variants)
    yield report_line("bundle", f"{bundle.path}: {bundle.precision.name}, {variants}")
    edits = "yes" if bundle.unfit is None else f"no: {bundle.unfit}"
    yield report_line("edits pictures", edits)
    yield report_line("weights", f"{readable_size(bundle.weights)}: {_fits(machine, bundle)}")
    for engines in bundle.engines:
        why = unfit(machine, engines)
        said = (
            "for this machine"
            if why is None
            else f"{why}{commands_hint(_replace(machine, engines))}"
        )
        yield report_line("engines", f"{engines.path.name}: {said}")
    if not bundle.engines:
        yield report_line("engines", "none")


def _fits(machine: Machine, bundle: BundleFacts) -> str:
    """Return whether the memory is enough for editing on a CPU, as far as that is known."""
    if why := too_little(machine.memory, bundle.memory, "memory", bundle.offloaded):
        return why
    if not bundle.memory:
        return "unknown how much memory editing takes"
    taken = f"about {readable_size(bundle.memory)}"
    if machine.memory is None:
        return f"editing takes {taken} of memory, and it is unknown how much is free"
    return f"editing fits in memory, {taken}"


def _replace(machine: Machine, engines: EngineSetFacts) -> tuple[str, ...]:
    """Return the commands that compile engines for this machine in place of those."""
    backend, recipe = engines.path.name.rpartition("-")[0], engines.recipe
    removal = () if recipe else (f"rm -r {shlex.quote(str(engines.path))}",)
    spec = find_backend(backend) if backend in BACKENDS else None
    command = spec.compile_command(machine) if isinstance(spec, EngineSpec) else None
    if command is None:
        return removal
    chosen = f" --layout {recipe.layout} --variant {recipe.variant}" if recipe else ""
    return *removal, command + chosen

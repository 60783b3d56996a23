"""What can edit pictures and compile engines on a machine, what cannot, and what would help."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from varedit_export.machine import EXPORT, BundleFacts, Engines, Gpu, Machine
from varedit_runtime.backends.engines.engine_set import mismatch
from varedit_runtime.backends.engines.tensorrt_module import MODULES, RTX, EngineKind

PEAK = 1.3  # of the weights: they, packed copies, caches and activations

CPU, CUDA, TENSORRT = "onnxruntime cpu", "onnxruntime cuda", "tensorrt"
TO_GPU = ("pip uninstall onnxruntime", "pip install --force-reinstall onnxruntime-gpu")
TO_CPU = ("pip uninstall onnxruntime-gpu", "pip install --force-reinstall onnxruntime")


@dataclass(frozen=True)
class Verdict:
    """On a backend. what: it can, or why it cannot; fix: the commands to run for it, if any."""

    backend: str
    word: Literal["can run", "can compile", "cannot"]
    what: str
    fix: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _line(self.backend, f"{self.word}: {self.what}{_run(self.fix)}")


def verdicts(machine: Machine) -> tuple[Verdict, ...]:
    """One for each backend, on the machine's bundle if it has one."""
    return _cpu(machine), _cuda(machine), _tensorrt(machine), _rtx(machine)


def can_edit(machine: Machine) -> bool:
    return any(verdict.word == "can run" for verdict in verdicts(machine))


def report(machine: Machine) -> str:
    """For a person: a line for each thing that is there or missing, then the verdicts."""
    bundle = [] if machine.bundle is None else ["", *_bundle(machine, machine.bundle)]
    return "\n".join([*_installed(machine), *bundle, "", *map(str, verdicts(machine))])


def _cpu(machine: Machine) -> Verdict:
    if why := _no_onnxruntime(machine) or machine.failed.get("cpu"):
        fix = TO_CPU if _both(machine) else ("pip install --force-reinstall onnxruntime",)
        return Verdict(CPU, "cannot", why, fix)
    bundle = machine.bundle
    if bundle is None:
        return Verdict(CPU, "can run", "bundles in fp32 that fit in memory")
    if bundle.precision == "bf16":
        return Verdict(CPU, "cannot", "CPUs do not compute bf16: build with --precision fp32")
    if why := _too_little(machine.memory, _cpu_bytes(bundle), "memory"):
        return Verdict(CPU, "cannot", why)
    if bundle.precision == "fp16":
        return Verdict(CPU, "can run", "this bundle, in fp32: --precision fp32 takes less memory")
    return Verdict(CPU, "can run", "this bundle")


def _cuda(machine: Machine) -> Verdict:
    gpus = machine.nvidia.gpus
    if not gpus:
        return Verdict(CUDA, "cannot", f"no NVIDIA GPU was found ({machine.nvidia.problem})")
    if why := _no_onnxruntime(machine):
        return Verdict(CUDA, "cannot", why, TO_GPU)
    if "CUDAExecutionProvider" not in machine.providers:
        both = "onnxruntime is installed over onnxruntime-gpu"
        why = both if _both(machine) else "onnxruntime-gpu is not installed"
        return Verdict(CUDA, "cannot", why, TO_GPU)
    if why := machine.failed.get("cuda"):
        return Verdict(CUDA, "cannot", why, TO_GPU if _both(machine) else ())
    if machine.bundle is None:
        return Verdict(CUDA, "can run", "bundles that fit in the GPU's memory")
    if machine.bundle.precision == "bf16":
        return Verdict(CUDA, "cannot", "it runs no bf16: build with --precision fp16, or engines")
    if why := _too_little(_most_free(gpus), int(PEAK * machine.bundle.weights), "GPU memory"):
        return Verdict(CUDA, "cannot", why)
    return Verdict(CUDA, "can run", "this bundle")


def _tensorrt(machine: Machine) -> Verdict:
    if absent := _not_installed(machine, "tensorrt"):
        return absent
    gpus = machine.nvidia.gpus
    if not gpus:
        why = f"it compiles for the GPU it runs on, and there is none ({machine.nvidia.problem})"
        return Verdict(TENSORRT, "cannot", why)
    return _runs(machine, TENSORRT, gpus[0], ())


def _rtx(machine: Machine) -> Verdict:
    if absent := _not_installed(machine, RTX):
        return absent
    if gpu := _rtx_gpu(machine):
        return _runs(machine, RTX, gpu, (gpu.architecture,))
    here = "".join(f", not {gpu.architecture}" for gpu in machine.nvidia.gpus)
    known = f"{', '.join(machine.rtx_architectures)}{here}: name one with --architecture"
    return _no_onnx(machine, RTX) or Verdict(RTX, "can compile", known)


def _runs(
    machine: Machine, backend: EngineKind, gpu: Gpu, architectures: tuple[str, ...]
) -> Verdict:
    """On a GPU that it compiles for."""
    for name in ("cuda-core", "cuda-bindings"):
        if name not in machine.packages:
            why = f"{name}, which reaches the GPU, is not installed"
            return Verdict(backend, "cannot", why, (f"pip install {name}",))
    if machine.bundle is None:
        return Verdict(backend, "can run", f"bundles with engines for this {gpu.architecture}")
    own = [engines for engines in machine.bundle.engines if _is_of(engines, backend)]
    fitting = [engines for engines in own if _mismatch(machine, engines) is None]
    if not fitting:
        compiling = (_engines_command(machine, backend, architectures),)
        what = f"this bundle's engines for {gpu.architecture}"
        return _no_onnx(machine, backend) or Verdict(backend, "can compile", what, compiling)
    needed = min(engines.gpu_memory for engines in fitting)
    if why := _too_little(gpu.free, needed, "GPU memory"):
        return Verdict(backend, "cannot", why)
    return Verdict(backend, "can run", "this bundle")


def _is_of(engines: Engines, backend: EngineKind) -> bool:
    return engines.recipe is not None and engines.recipe.backend == backend


def _not_installed(machine: Machine, backend: EngineKind) -> Verdict | None:
    if why := machine.unusable.get(MODULES[backend]):
        return Verdict(backend, "cannot", why, (f"pip install --force-reinstall {backend}",))
    if backend not in machine.packages:
        return Verdict(backend, "cannot", "it is not installed", (_extra(backend),))
    return None


def _no_onnx(machine: Machine, backend: EngineKind) -> Verdict | None:
    """Which compiling takes, and running does not."""
    if "onnx" in machine.packages:
        return None
    return Verdict(backend, "cannot", "onnx is not installed", (_extra("export"),))


def _no_onnxruntime(machine: Machine) -> str | None:
    if why := machine.unusable.get("onnxruntime"):
        return f"onnxruntime cannot be imported ({why})"
    return None if machine.providers else "onnxruntime is not installed"


def _both(machine: Machine) -> bool:
    return {"onnxruntime", "onnxruntime-gpu"} <= machine.packages.keys()


def _too_little(have: int | None, needed: int, of: str) -> str | None:
    if have is None or have >= needed:
        return None
    return f"about {_size(needed)} of {of} are needed and {_size(have)} free: end other programs"


def _cpu_bytes(bundle: BundleFacts) -> int:
    """What editing takes on a CPU, for which weights of 16 bits become fp32."""
    return int(PEAK * bundle.weights * (1 if bundle.precision == "fp32" else 2))


def _most_free(gpus: tuple[Gpu, ...]) -> int | None:
    return max((gpu.free for gpu in gpus if gpu.free is not None), default=None)


def _rtx_gpu(machine: Machine) -> Gpu | None:
    """The GPU that is used, if TensorRT for RTX compiles for it."""
    first = machine.nvidia.gpus[:1]
    return next((gpu for gpu in first if gpu.architecture in machine.rtx_architectures), None)


# What is there, in lines


def _installed(machine: Machine) -> Iterator[str]:
    packages, nvidia = machine.packages, machine.nvidia
    yield _line("Python", machine.python)
    yield _line("varedit-export", packages.get("varedit-export", "not installed, run from a clone"))
    yield _line("NVIDIA driver", nvidia.driver or f"none ({nvidia.problem})")
    for number, gpu in enumerate(nvidia.gpus):
        free = "unknown" if gpu.free is None else _size(gpu.free)
        yield _line(f"GPU {number}", f"{gpu.name}, {gpu.architecture}, free memory {free}")
    for name in ("onnxruntime", "onnxruntime-gpu", *MODULES):
        yield _line(name, packages.get(name, "not installed"))
    if _both(machine):
        fix = _run(TO_GPU if nvidia.gpus else TO_CPU)
        yield _line("", f"onnxruntime and onnxruntime-gpu are installed over each other{fix}")
    yield _line("providers", ", ".join(machine.providers) or "none")
    missing = [name for name in EXPORT if name not in packages]
    absent = f"without {', '.join(missing)}{_run((_extra('export'),))}"
    yield _line("extra export", absent if missing else f"complete, torch {packages['torch']}")
    yield _line("free memory", "unknown" if machine.memory is None else _size(machine.memory))
    yield _line("free disk", f"{_size(machine.disk)} where bundles are built")


def _bundle(machine: Machine, bundle: BundleFacts) -> Iterator[str]:
    yield _line("bundle", f"{bundle.path}: {bundle.precision}, {', '.join(bundle.variants)}")
    needed = _cpu_bytes(bundle)
    fits = _too_little(machine.memory, needed, "memory") or f"fit in memory, about {_size(needed)}"
    yield _line("weights", f"{_size(bundle.weights)}: {fits}")
    for engines in bundle.engines:
        why = _mismatch(machine, engines)
        said = "for this machine" if why is None else f"{why}{_run(_replace(machine, engines))}"
        yield _line("engines", f"{engines.path.name}: {said}")
    if not bundle.engines:
        yield _line("engines", "none")


def _mismatch(machine: Machine, engines: Engines) -> str | None:
    """Why engines are not for this machine; None where they are."""
    recipe = engines.recipe
    if recipe is None:
        return engines.problem
    gpus = [f"{gpu.architecture} {gpu.name}" for gpu in machine.nvidia.gpus[:1]]  # which is used
    return mismatch(recipe, machine.packages, gpus)


def _replace(machine: Machine, engines: Engines) -> tuple[str, ...]:
    """The commands that compile engines for this machine in place of those."""
    backend, recipe = engines.path.name.rsplit("-", 1)[0], engines.recipe
    removal = () if recipe else (f"rm -r {shlex.quote(str(engines.path))}",)
    chosen = f" --layout {recipe.layout} --variant {recipe.variant}" if recipe else ""
    gpu = _rtx_gpu(machine)
    if backend == RTX and gpu:
        return *removal, _engines_command(machine, RTX, (gpu.architecture,)) + chosen
    if backend == TENSORRT and machine.nvidia.gpus:
        return *removal, _engines_command(machine, TENSORRT, ()) + chosen
    return removal


def _engines_command(machine: Machine, backend: str, architectures: tuple[str, ...]) -> str:
    path = "BUNDLE" if machine.bundle is None else shlex.quote(str(machine.bundle.path))
    named = "".join(f" --architecture {name}" for name in architectures)
    return f"varedit-export engines {path} --backend {backend}{named}"


def _extra(name: str) -> str:
    return f'pip install "varedit-export[{name}]"'


def _run(commands: tuple[str, ...]) -> str:
    return f"; run {' and '.join(f'`{command}`' for command in commands)}" if commands else ""


def _line(name: str, what: str) -> str:
    return f"{name:<18}{what}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"

"""What a machine has for editing and compiling: the facts that backends judge by.

They are data without behaviour, so that a test can make up a machine. `detect.py` collects them.
Nothing here needs PyTorch, TensorRT or a GPU.
"""

import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from varedit_runtime.errors import one_line, printable
from varedit_runtime.precision import Precision

if TYPE_CHECKING:
    from varedit_runtime.backends.engines.engine_set import EngineRecipe

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SMI_SECONDS = 10  # a driver that hangs must not hang this program
VISIBLE = "CUDA_VISIBLE_DEVICES"
SMI_FIELDS = "driver_version,name,compute_cap,memory.total,memory.free"


def cores() -> int:
    """Return how many cores this process may use, by its affinity and its cgroups' quotas."""
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS lacks
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError, ZeroDivisionError):  # no cgroups, or odd ones
        path = OWN_CGROUP.read_text().rpartition("0::/")[2].strip()
        for parent in (".", *accumulate(Path(path).parts, os.path.join)):
            file = CGROUPS / parent / "cpu.max"
            quota, period = file.read_text().split() if file.exists() else ("max", "")
            if quota != "max":
                count = min(count, int(quota) // int(period))
    return max(1, count)


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    architecture: as in "sm89". memory, free: bytes, None where the driver does not say; what is
    free of an integrated GPU is what programs can have of the system's memory.
    """

    name: str
    architecture: str
    memory: int | None
    free: int | None


@dataclass(frozen=True)
class Nvidia:
    """The driver and its GPUs. problem: why there are none."""

    driver: str | None
    gpus: tuple[Gpu, ...]
    problem: str = ""


@dataclass(frozen=True)
class EngineSetFacts:
    """A set of compiled engines of a bundle.

    problem: why no machine can use it; without one it has a recipe. gpu_memory: bytes that the
    engines take, without what the driver needs for their code. offloaded: the same with
    `--offload text`; 0 where it is unknown.
    """

    path: Path
    recipe: "EngineRecipe | None"
    problem: str = ""
    gpu_memory: int = 0
    offloaded: int = 0


@dataclass(frozen=True)
class BundleFacts:
    """A bundle.

    weights: bytes of all its weights files. unfit: why it is not for editing. memory, gpu_memory:
    bytes that editing takes on a CPU, and with ONNX Runtime on a GPU; offloaded: on a CPU with
    `--offload text`; each 0 where it is unknown.
    """

    path: Path
    precision: Precision
    weights: int
    variants: tuple[str, ...]
    engines: tuple[EngineSetFacts, ...]
    unfit: str | None = None
    memory: int = 0
    gpu_memory: int = 0
    offloaded: int = 0


@dataclass(frozen=True)
class ProbeResult:
    """What a backend found when it imported what it needs.

    problem: why that cannot be imported; "" also where it is not installed. offers: what it can
    use: ONNX Runtime's providers, the architectures that TensorRT for RTX compiles for. failed:
    those that are offered and do not work, and why.
    """

    problem: str = ""
    offers: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """A machine, and the bundle to judge it for, if there is one.

    packages: versions of the distributions that are installed. probes: by the names of backends.
    memory, disk: bytes available, memory None where the system does not say.
    """

    python: str
    nvidia: Nvidia
    packages: Mapping[str, str]
    probes: Mapping[str, ProbeResult]
    memory: int | None
    disk: int
    bundle: BundleFacts | None = None

    def probe(self, backend: str) -> ProbeResult:
        """Return what a backend found; an empty probe where it was not asked."""
        return self.probes.get(backend, ProbeResult())


def nvidia() -> Nvidia:
    """Ask nvidia-smi for the GPUs; where it knows none, as on a Jetson, ask CUDA for the first."""
    if os.environ.get(VISIBLE) in ("", "-1"):  # which nvidia-smi does not obey
        return Nvidia(None, (), f"{VISIBLE} hides all")
    found = _by_smi()
    return found if found.gpus else _by_cuda(found)


def _by_cuda(otherwise: Nvidia) -> Nvidia:
    try:
        gpu = importlib.import_module("cuda.core").Device()
        major, minor = gpu.compute_capability
        free = available_memory() if gpu.properties.integrated else None
        return Nvidia(otherwise.driver, (Gpu(gpu.name, f"sm{major}{minor}", None, free),))
    except Exception:  # the driver's errors have no common base, and may lack a module
        return otherwise


def _by_smi() -> Nvidia:
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=SMI_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Nvidia(None, (), f"nvidia-smi gave no answer in {SMI_SECONDS} s")
    except OSError as error:
        return Nvidia(None, (), f"nvidia-smi cannot be run: {error.strerror}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    gpus = tuple(
        Gpu(printable(name), f"sm{capability.replace('.', '')}", _mebibytes(total), _free(free))
        for _, name, capability, total, free in rows
        if capability[:1].isdecimal()
    )
    if done.returncode != 0 or not gpus:
        said = one_line(done.stdout + done.stderr) or "nvidia-smi names none"
        return Nvidia(rows[0][0] if rows else None, (), said)
    return Nvidia(rows[0][0], gpus)


def available_memory() -> int | None:
    """Return the bytes that programs can have without swapping; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * sizes[0] if sizes else None


def return_freed_memory() -> None:
    """Ask glibc to return freed memory that it keeps, which nothing in the process uses."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _free(cell: str) -> int | None:
    return available_memory() if (size := _mebibytes(cell)) is None else size


def _mebibytes(cell: str) -> int | None:
    return int(cell) * 2**20 if cell.isdecimal() else None  # "[N/A]" where memory is the system's

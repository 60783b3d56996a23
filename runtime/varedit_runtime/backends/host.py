"""Ask this machine: its cores and memory, and its GPUs, without PyTorch or TensorRT."""

import ctypes
import importlib
import os
import subprocess
import sys
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from varedit_runtime.backends.machine import Gpu, Nvidia
from varedit_runtime.errors import one_line, printable

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

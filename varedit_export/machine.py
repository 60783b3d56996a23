"""What this machine has for editing and compiling: facts alone, collected without raising.

Nothing here needs PyTorch, TensorRT or a GPU. What is absent is an empty entry, and what is there
and does not work an entry that says why.
"""

import importlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from varedit_runtime.backends.engines.engine_set import EngineSet, EngineSets, Recipe
from varedit_runtime.backends.engines.memory import budget
from varedit_runtime.backends.engines.tensorrt_module import MODULES
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BundleError, VareditError, one_line
from varedit_runtime.locate import default_root, embedded
from varedit_runtime.manifest import Precision, weights_file

EXPORT = ("torch", "transformers", "safetensors", "onnx", "onnxscript", "tqdm")
PACKAGES = (
    *("varedit-export", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"),
    *("cuda-core", "cuda-bindings", *EXPORT),
)
SMI_SECONDS = 10  # a driver that hangs must not hang this program
SMI_FIELDS = "driver_version,name,compute_cap,memory.total,memory.free"


@dataclass(frozen=True)
class Gpu:
    """architecture: as in "sm89". memory, free: bytes, None where the driver does not say."""

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
class Engines:
    """A set of engines. problem: why it cannot be used on any machine; else it has a recipe.

    gpu_memory: bytes that they take but for their scratch.
    """

    path: Path
    recipe: Recipe | None
    problem: str = ""
    gpu_memory: int = 0


@dataclass(frozen=True)
class BundleFacts:
    """weights: bytes of all its weights files."""

    path: Path
    precision: Precision
    weights: int
    variants: tuple[str, ...]
    engines: tuple[Engines, ...]


@dataclass(frozen=True)
class Machine:
    """All that `doctor` judges by.

    packages: versions of the distributions that are installed. unusable: modules that are there
    and cannot be imported, and why. providers: ONNX Runtime's, by its names; failed: those of ours
    ("cpu", "cuda") that it names and that load no graph, and why. rtx_architectures: that TensorRT
    for RTX compiles for. memory, disk: bytes available, None where the system does not say.
    """

    python: str
    nvidia: Nvidia
    packages: Mapping[str, str]
    unusable: Mapping[str, str]
    providers: tuple[str, ...]
    failed: Mapping[str, str]
    rtx_architectures: tuple[str, ...]
    memory: int | None
    disk: int
    bundle: BundleFacts | None = None


def survey(bundle: Path | None = None) -> Machine:
    """This machine as it is now. Raises BundleError when the bundle cannot be opened."""
    modules = {name: _import(name) for name in ("onnxruntime", *MODULES.values())}
    onnxruntime, rtx = modules["onnxruntime"], modules["tensorrt_rtx"]
    providers = () if isinstance(onnxruntime, str) else tuple(onnxruntime.get_available_providers())
    return Machine(
        python=platform.python_version(),
        nvidia=nvidia(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        unusable={name: why for name, why in modules.items() if isinstance(why, str) and why},
        providers=providers,
        failed=_failed(providers),
        rtx_architectures=() if isinstance(rtx, str) else _architectures(rtx),
        memory=available_memory(),
        disk=shutil.disk_usage(_standing(default_root())).free,
        bundle=None if bundle is None else _bundle_facts(Bundle.open(bundle)),
    )


def nvidia() -> Nvidia:
    """From NVIDIA's library if there is a binding of it, else from its program."""
    try:
        return _from_library()
    except Exception:  # it is not installed, or has errors of its own
        return _from_program()


def available_memory() -> int | None:
    """Bytes that programs can have without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * sizes[0] if sizes else None


def _from_library() -> Nvidia:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        gpus = tuple(_from_handle(nvml, handle) for handle in handles)
        return Nvidia(nvml.nvmlSystemGetDriverVersion(), gpus, "" if gpus else "there is none")
    finally:
        nvml.nvmlShutdown()


def _from_handle(nvml: ModuleType, handle: object) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    return Gpu(name, f"sm{major}{minor}", memory.total, memory.free)


def _from_program() -> Nvidia:
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return Nvidia(None, (), f"nvidia-smi gave no answer in {SMI_SECONDS} s")
    except OSError as error:
        return Nvidia(None, (), f"nvidia-smi cannot be run: {error.strerror}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    gpus = tuple(
        Gpu(name, f"sm{capability.replace('.', '')}", _mebibytes(total), _mebibytes(free))
        for _, name, capability, total, free in (row for row in rows if len(row) == 5)
    )
    if done.returncode != 0 or not gpus:
        return Nvidia(None, (), one_line(done.stdout + done.stderr) or "nvidia-smi names none")
    return Nvidia(rows[0][0], gpus)


def _mebibytes(cell: str) -> int | None:
    return int(cell) * 2**20 if cell.isdecimal() else None  # "[N/A]" where memory is the system's


def _import(name: str) -> ModuleType | str:
    """The module; or why it cannot be imported, nothing if it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "" if error.name == name else one_line(error)
    except Exception as error:  # libraries that are missing or of another version
        return one_line(error) or type(error).__name__


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _architectures(rtx: ModuleType) -> tuple[str, ...]:
    names = rtx.ComputeCapability.__members__
    return tuple(name.lower() for name in names if name.startswith("SM"))


def _failed(available: tuple[str, ...]) -> dict[str, str]:
    """Load a graph of nano's: a provider that is named may lack its libraries."""
    failed: dict[str, str] = {}
    if not available:
        return failed
    from varedit_runtime.backends.onnxruntime import PROVIDERS, Session

    nano = Bundle.open(embedded())
    (variant,) = nano.manifest.variants
    graph = nano.graph_bytes(variant.name, "references")  # the one without weights
    for provider, name in PROVIDERS.items():
        if name in available:
            try:
                Session("references", graph, nano.graphs_folder, provider, threads=1)
            except VareditError as error:
                failed[provider] = one_line(error)
    return failed


def _bundle_facts(bundle: Bundle) -> BundleFacts:
    manifest = bundle.manifest
    return BundleFacts(
        path=bundle.path,
        precision=manifest.precision,
        weights=sum(manifest.files[weights_file(name)].size for name in bundle.components),
        variants=tuple(variant.name for variant in manifest.variants),
        engines=tuple(_engines(bundle, path) for path in EngineSets(bundle).folders),
    )


def _engines(bundle: Bundle, path: Path) -> Engines:
    cache = EngineSets(bundle)
    try:
        recipe = EngineSet.open(path).manifest.recipe
        if not cache.of_this_bundle(recipe):
            return Engines(path, None, "they are of other graphs or weights than the bundle's")
        cache.open(recipe)  # says whether they were built here
        needed = budget(bundle, bundle.manifest.variant(recipe.variant), recipe.layout)
    except BundleError as error:
        return Engines(path, None, one_line(error))
    return Engines(path, recipe, gpu_memory=needed.total)


def _standing(path: Path) -> Path:
    """The folder itself or, where it is yet to be made, the nearest one above it."""
    return next(place for place in (path, *path.parents) if place.exists())

"""What a machine has for editing and compiling: the facts that backends judge by.

They are data without behaviour, so that a test can make up a machine. `detect.py` collects them, by
the probes of `host.py`. Nothing here needs PyTorch, TensorRT or a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from varedit_runtime.precision import Precision

if TYPE_CHECKING:
    from varedit_runtime.backends.engines.engine_set import EngineRecipe


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

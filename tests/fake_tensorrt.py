"""A `tensorrt` that compiles nothing: the real one is not to be had everywhere, and needs a GPU.

Its names are tensorrt_rtx's, which has the same API: what has no effect of its own is taken from
there, and for the rest `test_tensorrt.py` compares them.
"""

import json
from types import ModuleType
from typing import Any

import tensorrt_rtx

RTX: Any = tensorrt_rtx
VERSION = "11.0"
REAL = (
    *("BuilderFlag", "ComputeCapability", "HardwareCompatibilityLevel", "ILogger"),
    *("IProgressMonitor", "MemoryPoolType", "NetworkDefinitionCreationFlag", "ProfilingVerbosity"),
)


class TimingCache:
    """Timings of kernels by name, on one GPU."""

    def __init__(self, gpu: str, timings: dict[str, int]) -> None:
        self.gpu, self.timings = gpu, timings

    def combine(self, input_cache: "TimingCache", ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or input_cache.gpu == self.gpu
        if fits:
            self.timings = input_cache.timings | self.timings
        return fits

    def serialize(self) -> bytes:
        return json.dumps([self.gpu, self.timings]).encode()


class BuilderConfig:
    """A builder's configuration.

    gpu: the one that this machine has. refused: architectures that it does not take.
    """

    gpu = "H100"
    refused: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.flags = 1 << int(RTX.BuilderFlag.TF32)
        self.hardware_compatibility_level = RTX.HardwareCompatibilityLevel.NONE
        self.max_aux_streams = -1
        self.profiling_verbosity = RTX.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.num_compute_capabilities = 0
        self.progress_monitor: Any = None
        self._timings: TimingCache | None = None
        self._capabilities: dict[int, Any] = {}

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        assert index < self.num_compute_capabilities
        taken = compute_capability not in self.refused
        if taken:
            self._capabilities[index] = compute_capability
        return taken

    def get_compute_capability(self, index: int) -> Any:
        return self._capabilities[index]

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        if not serialized_timing_cache:
            return TimingCache(self.gpu, {})
        try:
            return TimingCache(*json.loads(serialized_timing_cache))
        except ValueError:
            return None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or cache.gpu == self.gpu
        if fits:
            self._timings = cache
        return fits

    def get_timing_cache(self) -> TimingCache | None:
        return self._timings


class Builder:
    """A builder; configs: all it was used with; measured: kernels timed, one per graph."""

    configs: list[BuilderConfig]
    measured: list[str]

    def __init__(self, logger: Any) -> None:
        self.network: list[str] = []

    def create_network(self, flags: int) -> list[str]:
        return self.network

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def build_serialized_network(self, network: list[str], config: BuilderConfig) -> bytes:
        self.configs.append(config)
        (kernel,) = network
        timings = config.get_timing_cache()
        if timings is None or kernel not in timings.timings:
            self.measured.append(kernel)
        if timings is not None:
            timings.timings[kernel] = 1
        return f"plan of {kernel}".encode()


class OnnxParser:
    """A parser that takes a graph's file for the name of the one kernel it needs."""

    def __init__(self, network: list[str], logger: Any) -> None:
        self._network = network

    def parse(self, model: bytes, path: str) -> bool:
        self._network.append(model.decode())
        return True


def fake_tensorrt() -> Any:
    """Make the module, with its own builder."""
    module = ModuleType("tensorrt")
    for name in REAL:
        setattr(module, name, getattr(RTX, name))
    own = type("Builder", (Builder,), {"configs": [], "measured": []})
    vars(module).update(__version__=VERSION, Builder=own, OnnxParser=OnnxParser)
    return module

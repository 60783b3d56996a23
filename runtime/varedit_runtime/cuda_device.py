"""An NVIDIA GPU with TensorRT, or TensorRT for RTX, through cuda-python."""

import ctypes
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from varedit_runtime.device import Launch
from varedit_runtime.errors import BackendError, needs_extra
from varedit_runtime.kept_file import keep, read_kept
from varedit_runtime.locate import cache_folder
from varedit_runtime.tensorrt_module import EngineKind, import_tensorrt, quiet_logger

TYPES = {  # of TensorRT, as manifests call them
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class CudaDevice:
    """This process's current GPU, and one stream of it."""

    def __init__(self, backend: EngineKind) -> None:
        """Raises MissingExtraError without the backend, BackendError without a GPU."""
        self._trt: Any = import_tensorrt(backend)
        with needs_extra(backend):
            cuda: Any = importlib.import_module("cuda.core")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self.tools = {backend: str(self._trt.__version__)}
        with _explained("use a GPU"):
            self._gpu = cuda.Device()
            self._gpu.set_current()
            major, minor = self._gpu.compute_capability
            self._stream = self._gpu.create_stream()
            self._pinned = cuda.LegacyPinnedMemoryResource()
        self.architecture = f"sm{major}{minor}"
        self._logger = quiet_logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        # Version-compatible plans bring a library; plans are native code that was vouched for.
        self._runtime.engine_host_code_allowed = True
        self._blocks: list[Any] = []
        self._graphs: list[Any] = []
        version = f"{backend}-{self._trt.__version__}"
        self._kernels = _KernelCache(self._trt, f"{version}-{self._gpu.name}")

    def free_memory(self) -> int:
        with self._current("tell its free memory"):
            free, _ = self._asked(self._driver.cuMemGetInfo())
        return int(free)

    def allocate(self, size: int) -> int:
        with self._current(f"allocate {size} bytes"):
            block = self._gpu.allocate(size, stream=self._stream)
        self._blocks.append(block)
        return int(block.handle)

    def allocate_host(self, size: int) -> np.ndarray:
        with self._current(f"allocate {size} bytes of the host's memory"):
            block = self._pinned.allocate(size)
        self._blocks.append(block)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(block.handle)))

    def copy(self, target: int, source: int, size: int) -> None:
        with self._current("copy"):
            self._asked(self._driver.cuMemcpyAsync(target, source, size, self._stream.handle))

    def clear(self, address: int, size: int) -> None:
        with self._current("clear memory"):
            self._asked(self._driver.cuMemsetD8Async(address, 0, size, self._stream.handle))

    def load(self, name: str, plan: bytes) -> "CudaEngine":
        with self._current(f"load the engine {name}"):
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"the engine {name} cannot be loaded ({self._logger.worst or 'no reason given'}): "
                "compile it again with `varedit-export engines`"
            )
        return CudaEngine(self, name, engine)

    def capture(self, record: Launch) -> Launch:
        with self._current("capture a graph"):
            builder = self._stream.create_graph_builder()
            builder.begin_building("thread_local")
            try:
                record()
            finally:
                builder.end_building()
            graph = builder.complete()
            graph.upload(self._stream)
        self._graphs.append(graph)

        def launch() -> None:
            with self._current("launch a graph"):
                graph.launch(self._stream)

        return launch

    def settle(self) -> None:
        self._kernels.keep()

    def wait(self) -> None:
        with self._current("finish its work"):
            self._stream.sync()

    def close(self) -> None:
        self.wait()
        for graph in self._graphs:
            graph.close()
        for block in self._blocks:
            block.close()
        self._graphs, self._blocks = [], []

    def context_of(self, engine: Any, profile: int) -> Any:
        """An execution context of an engine that takes its scratch from us."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._kernels.serve(config)
        with self._current("create an execution context"):
            context = engine.create_execution_context(config)
            if context is None:
                raise BackendError(self._logger.worst or "no reason given")
            if engine.num_optimization_profiles > 1:
                context.set_optimization_profile_async(profile, self.stream)
        return context

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    @contextmanager
    def _current(self, what: str) -> Iterator[None]:
        """Whichever thread asks, and whatever the driver raises."""
        with _explained(what):
            self._gpu.set_current()
            yield

    def _asked(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the driver's binding returns behind its error code."""
        error, *rest = answer
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"the driver says {error.name}")
        return tuple(rest)


class CudaEngine:
    """An engine, loaded."""

    def __init__(self, device: CudaDevice, name: str, engine: Any) -> None:
        self._device, self._name, self._engine = device, name, engine

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        engine = self._engine
        names = map(engine.get_tensor_name, range(engine.num_io_tensors))
        return {
            name: (TYPES[engine.get_tensor_dtype(name).name], tuple(engine.get_tensor_shape(name)))
            for name in names
        }

    def scratch(self, profile: int) -> int:
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> Launch:
        context = self._device.context_of(self._engine, profile)
        taken = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        context.set_device_memory(*scratch)
        taken += [context.set_tensor_address(name, at) for name, at in addresses.items()]
        if not all(taken):
            raise BackendError(
                f"the engine {self._name} does not take its tensors: compile it again with "
                "`varedit-export engines`"
            )
        stream = self._device.stream

        def run() -> None:
            if not context.execute_async_v3(stream):
                raise BackendError(f"the engine {self._name} cannot be run")

        return run


class _KernelCache:
    """What TensorRT for RTX compiles when an engine first runs, kept for the next process."""

    def __init__(self, trt: Any, name: str) -> None:
        self._file = cache_folder() / "kernels" / f"{_plain(name)}.bin"
        self._exists = hasattr(trt, "IRuntimeCache")
        self._cache: Any = None

    def serve(self, config: Any) -> None:
        if not self._exists:
            return
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if kept := read_kept(self._file):  # one of another machine or version is not taken
                self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        if self._cache is not None:
            keep(self._file, bytes(self._cache.serialize()))


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except BackendError as error:
        raise BackendError(
            f"the GPU cannot {what}: {error}; run `varedit-export doctor`"
        ) from error
    except Exception as error:  # cuda-python's errors have no common base
        raise BackendError(
            f"the GPU cannot {what} ({' '.join(str(error).split()) or type(error).__name__}): run "
            "`varedit-export doctor`"
        ) from error

"""An NVIDIA GPU with TensorRT or TensorRT for RTX, driven through cuda-python.

Calls are prepared for three facts: the current GPU is a setting of each thread, so every call sets
it; TensorRT reports why it failed to a logger only; and no object can be freed after what it runs
on, so all are freed in one place, the latest first.
"""

import ctypes
import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from varedit_runtime.backends.engines.device import Launch
from varedit_runtime.backends.engines.import_tensorrt import (
    EngineKind,
    import_tensorrt,
    quiet_logger,
)
from varedit_runtime.errors import BackendError, needs_extra, one_line
from varedit_runtime.files import keep, plain_name, read_kept
from varedit_runtime.locate import cache_folder

# TensorRT's types that manifests name differently.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class CudaDevice:
    """This process's current GPU, and one stream on it. See `device.Device`."""

    def __init__(self, backend: EngineKind) -> None:
        """Raise MissingExtraError without the backend's library, BackendError without a GPU."""
        self._trt: Any = import_tensorrt(backend)
        with needs_extra(backend):
            cuda: Any = importlib.import_module("cuda.core")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self.tools = {backend: str(self._trt.__version__)}
        self._logger = quiet_logger(self._trt)
        self._held = ExitStack()  # callbacks that free everything, the latest first
        with _explained("be used"):
            self._gpu = cuda.Device()
            self._gpu.set_current()
            major, minor = self._gpu.compute_capability
            self._stream = self._gpu.create_stream()
            self._runtime = self._trt.Runtime(self._logger)
            # Version-compatible plans contain a library. Only trusted plans get here: `EngineSets`.
            self._runtime.engine_host_code_allowed = True
            version = f"{backend}-{self._trt.__version__}"
            self._kernels = _Kernels(self._trt, f"{version}-{self._gpu.name}")
        self.gpu = f"sm{major}{minor} {self._gpu.name}"

    def free_memory(self) -> int:
        with self.current("tell its free memory"):
            free, _ = self._ask("cuMemGetInfo")
        return int(free)

    # Memory comes from the driver, not from a pool, which keeps freed memory and counts it as used.

    def allocate(self, size: int) -> int:
        with self.current(f"allocate {size} bytes"):
            (block,) = self._ask("cuMemAlloc", size)
            self._held.callback(self._ask, "cuMemFree", block)
        return int(block)

    def allocate_host(self, size: int) -> np.ndarray:
        with self.current(f"allocate {size} bytes of the host's memory"):
            (block,) = self._ask("cuMemAllocHost", size)
            self._held.callback(self._ask, "cuMemFreeHost", block)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(block)))

    def copy(self, target: int, source: int, size: int) -> None:
        with self.current("copy"):
            self._ask("cuMemcpyAsync", target, source, size, self._stream.handle)

    def clear(self, address: int, size: int) -> None:
        with self.current("clear memory"):
            self._ask("cuMemsetD8Async", address, 0, size, self._stream.handle)

    def load(self, name: str, plan: bytes | bytearray) -> "CudaEngine":
        with self.asking(f"load the engine {name}"):
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BackendError(
                    f"the engine {name} cannot be loaded ({self.reason()}): compile it again with "
                    "`varedit-export engines --again`"
                )
            return CudaEngine(self, name, engine, self._config(engine))

    def _config(self, engine: Any) -> Any:
        """Configure an engine to run in scratch memory that we give it, shared by all engines."""
        config = engine.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        self._kernels.serve(config)
        return config

    # The driver captures: cuda.core's GraphBuilder crashes the process if a capture was invalidated
    # (NVIDIA/cuda-python #2834, up to 1.2).

    def capture(self, record: Launch) -> Launch:
        stream = self._stream.handle
        with self.current("capture a graph"):
            graph = self._recorded(record)
            try:
                held = self._ask("cuGraphInstantiate", graph, 0)
                self._held.callback(lambda: self._ask("cuGraphExecDestroy", held.pop()))
            finally:
                self._ask("cuGraphDestroy", graph)
            self._ask("cuGraphUpload", held[0], stream)

        def launch() -> None:
            with self.current("launch a graph"):
                self._ask("cuGraphLaunch", _still(held), stream)

        return launch

    def _recorded(self, record: Launch) -> Any:
        """Capture the work that `record` submits as a graph, without running it."""
        stream = self._stream.handle
        # Relaxed: otherwise memory of another editor that Python frees meanwhile invalidates it.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._ask("cuStreamBeginCapture", stream, mode)
        try:
            record()
        except BaseException:
            with suppress(RuntimeError):  # it only repeats that the capture is invalid
                self._ask("cuGraphDestroy", *self._ask("cuStreamEndCapture", stream))
            raise
        (graph,) = self._ask("cuStreamEndCapture", stream)
        return graph

    def hold(self, context: Any) -> list[Any]:
        """Put an engine's context in a list, which is emptied before what it runs on is freed.

        Nothing else may refer to it, not even a traceback: it cannot be freed later, without a
        current GPU, its memory and the kernels' cache.
        """
        held = [context]
        self._held.callback(held.clear)
        return held

    def settle(self) -> None:
        with self.current("tell its kernels"):
            self._kernels.keep()

    def wait(self) -> None:
        with self.current("finish its work"):
            self._stream.sync()

    def close(self) -> None:
        """Free everything; if the GPU has failed, which was reported, the process's end does."""
        with suppress(BackendError), self.current("free its memory"), self._held:
            self._stream.sync()

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    def reason(self, otherwise: object = "no reason given") -> str:
        """Return why TensorRT failed since the last `asking`, by its logger or else otherwise."""
        return self._logger.worst or one_line(otherwise)

    @contextmanager
    def current(self, what: str) -> Iterator[None]:
        """Make the GPU current in this thread; turn any exception into a BackendError."""
        with _explained(what):
            self._gpu.set_current()
            yield

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Do as `current`, and forget TensorRT's earlier errors, which explain nothing here."""
        with self.current(what):
            self._logger.worst = ""
            yield

    def _ask(self, function: str, *arguments: Any) -> list[Any]:
        """Call a function of the driver; return its results, without the error code."""
        error, *answer = getattr(self._driver, function)(*arguments)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function}: {error.name}")
        return answer


class CudaEngine:
    """A loaded engine. See `device.Engine`."""

    def __init__(self, device: CudaDevice, name: str, engine: Any, config: Any) -> None:
        self._device, self._name, self._engine, self._config = device, name, engine, config

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        engine = self._engine
        names = map(engine.get_tensor_name, range(engine.num_io_tensors))
        return {
            name: (_type(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
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
        device, stream = self._device, self._device.stream
        with device.asking(f"prepare the engine {self._name}"):
            held = device.hold(self._engine.create_execution_context(self._config))
            if held[0] is None:
                raise RuntimeError(device.reason())
            # Profile first: it resets shapes. Its copies run on the stream, before the engine.
            try:
                taken = [held[0].set_optimization_profile_async(profile, stream)]
            except RuntimeError as error:  # unlike the setters below, which return False
                raise self._refused(device.reason(error)) from error
            taken += [held[0].set_input_shape(name, shape) for name, shape in shapes.items()]
            taken += [held[0].set_tensor_address(name, at) for name, at in addresses.items()]
            held[0].set_device_memory(*scratch)
            if not all(taken):
                raise self._refused(device.reason())

        def run() -> None:
            with device.asking(f"run the engine {self._name}"):
                if not _still(held).execute_async_v3(stream):
                    raise RuntimeError(device.reason())

        return run

    def _refused(self, reason: str) -> BackendError:
        return BackendError(
            f"the engine {self._name} does not take its tensors ({reason}): compile it again with "
            "`varedit-export engines --again`"
        )


class _Kernels:
    """A file with the kernels that TensorRT for RTX compiles when an engine first runs."""

    def __init__(self, trt: Any, name: str) -> None:
        self._file = cache_folder() / "kernels" / f"{plain_name(name)}.bin"
        self._strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        self._cache: Any = None

    def serve(self, config: Any) -> None:
        if self._strategies is None:  # TensorRT compiles nothing at run time
            return
        # By default, kernels for exact shapes come later: slower ones would have been captured.
        config.dynamic_shapes_kernel_specialization_strategy = self._strategies.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if kept := read_kept(self._file):  # of another machine or version: TensorRT ignores it
                self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        if self._cache is not None:
            keep(self._file, bytes(self._cache.serialize()))


def _still(held: list[Any]) -> Any:
    """Return a held object. Raises RuntimeError if it was freed."""
    if not held:
        raise RuntimeError("it has been closed")
    return held[0]


def _type(dtype: Any) -> str:
    name: str = dtype.name
    return TYPES.get(name, name.lower())


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # cuda-python's errors have no common base
        raise BackendError(
            f"the GPU cannot {what} ({one_line(error) or type(error).__name__}): run "
            "`varedit-export doctor`"
        ) from error

"""An NVIDIA GPU with TensorRT or TensorRT for RTX, driven through cuda-python.

Calls are prepared for three facts: the current GPU is a setting of each thread, so every call sets
it, and restores it; TensorRT reports why it failed to a logger only; and no object can be freed
after what it runs on, so all are freed in one place, the latest first, on the GPU they are on.
"""

import ctypes
import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import finalize

import numpy as np

from varedit_runtime.backends.engines.device import Launch
from varedit_runtime.backends.engines.import_tensorrt import (
    RTX,
    TYPES,
    EngineKind,
    Log,
    create,
    import_tensorrt,
    listening,
    no_engines_for,
    rtx_architectures,
)
from varedit_runtime.backends.host import available_memory
from varedit_runtime.errors import BackendError, needs_extra, reason
from varedit_runtime.files import keep, plain_name, read_kept
from varedit_runtime.locate import cache_folder


class CudaDevice:
    """This process's current GPU, and one stream on it. See `device.Device`.

    One that is not closed frees everything when Python collects it, in whatever thread.
    """

    def __init__(self, backend: EngineKind) -> None:
        """Raise MissingExtraError without the library, BackendError without a GPU it runs on."""
        self._trt: Any = import_tensorrt(backend)
        with needs_extra("cuda"):
            cuda: Any = importlib.import_module("cuda.core")
            functions: Any = importlib.import_module("cuda.bindings.driver")
        self.tools = {backend: str(self._trt.__version__)}
        self._held = ExitStack()  # callbacks that free everything, the latest first
        with _explained("be used"):
            gpu = cuda.Device()
            gpu.set_current()
            major, minor = gpu.compute_capability
            if backend == RTX:
                _check_supported(self._trt, f"sm{major}{minor}")
            self._integrated = bool(gpu.properties.integrated)
            self._stream = gpu.create_stream()
            self._held.callback(self._stream.close)
            self._driver = _Driver(functions)
            self._free = finalize(self, _free, self._driver, self._stream, self._held)
            self._runtime = self.hold(create(self._trt, "Runtime"))
            # Version-compatible plans contain a library. Only trusted plans get here: `EngineSets`.
            self._runtime[0].engine_host_code_allowed = True
            version = f"{backend}-{self._trt.__version__}"
            self._kernels = self.hold(_Kernels(self._trt, f"{version}-{gpu.name}"))
        self.gpu = f"sm{major}{minor} {gpu.name}"

    def free_memory(self) -> int:
        # An integrated GPU has the system's memory, of which CUDA counts cached files as taken.
        if self._integrated and (available := available_memory()) is not None:
            return available
        with self.current("tell its free memory"):
            free, _ = self._driver.ask("cuMemGetInfo")
        return int(free)

    # Memory comes from the driver, not from a pool, which keeps freed memory and counts it as used.

    def allocate(self, size: int) -> int:
        with self.current(f"allocate {size} bytes"):
            (block,) = self._driver.ask("cuMemAlloc", size)
            self._held.callback(self._driver.ask, "cuMemFree", block)
        return int(block)

    def allocate_host(self, size: int) -> np.ndarray:
        with self.current(f"allocate {size} bytes of the host's memory"):
            (block,) = self._driver.ask("cuMemAllocHost", size)
            self._held.callback(self._driver.ask, "cuMemFreeHost", block)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(block)))

    def copy(self, target: int, source: int, size: int) -> None:
        with self.current("copy"):
            self._driver.ask("cuMemcpyAsync", target, source, size, self._stream.handle)

    def copy_runs(self, target: int, source: int, width: int, count: int) -> None:
        functions = self._driver.functions
        runs = functions.CUDA_MEMCPY2D()
        runs.srcMemoryType = runs.dstMemoryType = functions.CUmemorytype.CU_MEMORYTYPE_DEVICE
        runs.srcDevice, runs.srcPitch = source, 2 * width
        runs.dstDevice, runs.dstPitch = target, width
        runs.WidthInBytes, runs.Height = width, count
        with self.current("copy"):
            self._driver.ask("cuMemcpy2DAsync", runs, self._stream.handle)

    def clear(self, address: int, size: int) -> None:
        with self.current("clear memory"):
            self._driver.ask("cuMemsetD8Async", address, 0, size, self._stream.handle)

    def load(self, name: str, plan: bytes | bytearray) -> "CudaEngine":
        with self.asking(f"load the engine {name}") as log:
            engine = self.hold(_still(self._runtime).deserialize_cuda_engine(plan))
            if engine[0] is None:
                raise BackendError(
                    f"the engine {name} cannot be loaded ({log.reason()}): compile it again with "
                    "`varedit-export engines --again`"
                )
            return CudaEngine(self, name, engine, self.hold(self._config(engine[0])))

    def _config(self, engine: Any) -> Any:
        """Configure an engine to run in scratch memory that we give it, shared by all engines."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(engine, "create_runtime_config"):  # TensorRT before 10.11
            return strategy  # which contexts are then created from
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._kernels[0].serve(config)
        return config

    # The driver captures: cuda.core's GraphBuilder crashes the process if a capture was invalidated
    # (NVIDIA/cuda-python #2834, up to 1.2).

    def capture(self, record: Launch) -> Launch:
        stream = self._stream.handle
        with self.current("capture a graph"):
            graph = self._recorded(record)
            try:
                held = self._driver.ask("cuGraphInstantiate", graph, 0)
                destroy = partial(self._driver.ask, "cuGraphExecDestroy")
                self._held.callback(lambda: destroy(held.pop()))
            finally:
                self._driver.ask("cuGraphDestroy", graph)
            self._driver.ask("cuGraphUpload", held[0], stream)

        def launch() -> None:
            with self.current("launch a graph"):
                self._driver.ask("cuGraphLaunch", _still(held), stream)

        return launch

    def _recorded(self, record: Launch) -> Any:
        """Capture the work that `record` submits as a graph, without running it."""
        stream = self._stream.handle
        # Relaxed: otherwise memory of another editor that Python frees meanwhile invalidates it.
        mode = self._driver.functions.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._driver.ask("cuStreamBeginCapture", stream, mode)
        try:
            record()
        except BaseException:
            with suppress(RuntimeError):  # it only repeats that the capture is invalid
                self._driver.ask("cuGraphDestroy", *self._driver.ask("cuStreamEndCapture", stream))
            raise
        (graph,) = self._driver.ask("cuStreamEndCapture", stream)
        return graph

    def hold(self, made: Any) -> list[Any]:
        """Put an object of TensorRT in a list, which is emptied before what it uses is freed.

        Nothing else may refer to it, not even a traceback: it cannot be freed later, without a
        current GPU, its memory and the kernels' cache.
        """
        held = [made]
        self._held.callback(held.clear)
        return held

    def settle(self) -> None:
        with self.current("tell its kernels"):
            _still(self._kernels).keep()

    def mark(self) -> Launch:
        with self.current("mark its work"):
            event = self._stream.record()

        def wait() -> None:
            with self.current("finish its work"):
                event.sync()

        return wait

    def wait(self) -> None:
        with self.current("finish its work"):
            self._stream.sync()

    def close(self) -> None:
        """Free everything; if the GPU has failed, which was reported, the process's end does."""
        self._free()

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    @contextmanager
    def current(self, what: str) -> Iterator[None]:
        """Make the GPU current in this thread; turn any exception into a BackendError."""
        with _explained(what), self._driver.current():
            yield

    @contextmanager
    def asking(self, what: str) -> Iterator[Log]:
        """Do as `current`, and collect TensorRT's errors."""
        with self.current(what), listening(self._trt) as log:
            yield log


class _Driver:
    """The driver's functions, and the context of the GPU that is current now."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions
        (self._context,) = self.ask("cuCtxGetCurrent")

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU current in this thread; afterwards, the one that was."""
        self.ask("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            with suppress(RuntimeError):  # a GPU that failed repeats its error
                self.ask("cuCtxPopCurrent")

    def ask(self, function: str, *arguments: Any) -> list[Any]:
        """Call a function; return its results, without the error code."""
        error, *answer = getattr(self.functions, function)(*arguments)
        if error != self.functions.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function}: {error.name}")
        return answer


def _free(driver: _Driver, stream: Any, held: ExitStack) -> None:
    """Free what is held; a GPU that failed has reported it already."""
    with suppress(Exception), driver.current(), held:  # cuda-python's errors have no common base
        stream.sync()


class CudaEngine:
    """A loaded engine. See `device.Engine`. engine, config: lists that hold them."""

    def __init__(self, device: CudaDevice, name: str, engine: list[Any], config: list[Any]) -> None:
        self._device, self._name, self._engine, self._config = device, name, engine, config

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        engine = _still(self._engine)
        names = map(engine.get_tensor_name, range(engine.num_io_tensors))
        return {
            name: (_type(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
            for name in names
        }

    def scratch(self, profile: int) -> int:
        return int(_still(self._engine).get_device_memory_size_for_profile_v2(profile))

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> Launch:
        device, stream = self._device, self._device.stream
        with device.asking(f"prepare the engine {self._name}") as log:
            held = device.hold(_still(self._engine).create_execution_context(*self._config))
            if held[0] is None:
                raise RuntimeError(log.reason())
            # Profile first: it resets shapes. Its copies run on the stream, before the engine.
            try:
                taken = [held[0].set_optimization_profile_async(profile, stream)]
            except RuntimeError as error:  # unlike the setters below, which return False
                raise self._refused(log.reason(error)) from error
            taken += [held[0].set_input_shape(name, shape) for name, shape in shapes.items()]
            taken += [held[0].set_tensor_address(name, at) for name, at in addresses.items()]
            held[0].set_device_memory(*scratch)
            if not all(taken):
                raise self._refused(log.reason())

        def run() -> None:
            with device.asking(f"run the engine {self._name}") as log:
                if not _still(held).execute_async_v3(stream):
                    raise RuntimeError(log.reason())

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


def _check_supported(trt: Any, gpu: str) -> None:
    """Raise BackendError if TensorRT for RTX has no engines for a GPU; it would say so late."""
    if gpu not in (known := rtx_architectures(trt)):
        raise BackendError(no_engines_for(gpu, known))


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
            f"the GPU cannot {what} ({reason(error)}): run `varedit-export doctor`"
        ) from error

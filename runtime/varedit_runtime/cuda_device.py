"""An NVIDIA GPU with TensorRT, or TensorRT for RTX, through cuda-python."""

import ctypes
import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from varedit_runtime.device import Launch
from varedit_runtime.errors import BackendError, needs_extra
from varedit_runtime.kept_file import keep, plain_name, read_kept
from varedit_runtime.locate import cache_folder
from varedit_runtime.tensorrt_module import EngineKind, import_tensorrt, quiet_logger

# Of TensorRT's types those that manifests call otherwise.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class CudaDevice:
    """This process's current GPU, and one stream of it."""

    def __init__(self, backend: EngineKind) -> None:
        """Raises MissingExtraError without the backend, BackendError without a GPU."""
        self._trt: Any = import_tensorrt(backend)
        with needs_extra(backend):
            cuda: Any = importlib.import_module("cuda.core")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self.tools = {backend: str(self._trt.__version__)}
        self._logger = quiet_logger(self._trt)
        self._held = ExitStack()  # what is to be freed, first what was taken last
        with _explained("be used"):
            self._gpu = cuda.Device()
            self._gpu.set_current()
            major, minor = self._gpu.compute_capability
            self._stream = self._gpu.create_stream()
            self._runtime = self._trt.Runtime(self._logger)
            # Version-compatible plans bring a library; plans are native code that was vouched for.
            self._runtime.engine_host_code_allowed = True
            version = f"{backend}-{self._trt.__version__}"
            self._kernels = _Kernels(self._trt, f"{version}-{self._gpu.name}")
        self.gpu = f"sm{major}{minor} {self._gpu.name}"

    def free_memory(self) -> int:
        with self.current("tell its free memory"):
            free, _ = self._ask("cuMemGetInfo")
        return int(free)

    # Memory is the driver's own, not a pool's: a pool keeps what is freed, and counts it as used.

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
        with self.current(f"load the engine {name}"):
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BackendError(
                    f"the engine {name} cannot be loaded ({self.reason}): compile it again with "
                    "`varedit-export engines --again`"
                )
            return CudaEngine(self, name, engine, self._config(engine))

    def _config(self, engine: Any) -> Any:
        """How an engine runs: on scratch that it is given."""
        config = engine.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        self._kernels.serve(config)
        return config

    def capture(self, record: Launch) -> Launch:
        with self.current("capture a graph"):
            builder = self._stream.create_graph_builder()
            # Relaxed: what Python frees meanwhile, of another editor, would spoil it otherwise.
            builder.begin_building("relaxed")
            try:
                record()
                graph = builder.end_building().complete()
            except BaseException:
                with suppress(Exception):  # which only says again that it is spoilt
                    builder.close()
                raise
            self._held.callback(graph.close)
            graph.upload(self._stream)

        def launch() -> None:
            with self.current("launch a graph"):
                graph.launch(self._stream)

        return launch

    def settle(self) -> None:
        with self.current("tell its kernels"):
            self._kernels.keep()

    def wait(self) -> None:
        with self.current("finish its work"):
            self._stream.sync()

    def close(self) -> None:
        """A GPU that has failed, and said so, frees its memory when the process ends."""
        with suppress(BackendError), self.current("free its memory"), self._held:
            self._stream.sync()

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    @property
    def reason(self) -> str:
        """Of the last thing that TensorRT refused."""
        return self._logger.worst or "no reason given"

    @contextmanager
    def current(self, what: str) -> Iterator[None]:
        """Whichever thread asks, and whatever the driver raises."""
        with _explained(what):
            self._gpu.set_current()
            yield

    def _ask(self, function: str, *arguments: Any) -> list[Any]:
        """What a function of the driver returns behind its error code."""
        error, *answer = getattr(self._driver, function)(*arguments)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function}: {error.name}")
        return answer


class CudaEngine:
    """An engine, loaded."""

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
        with device.current(f"prepare the engine {self._name}"):
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise RuntimeError(device.reason)
            # In this order: a profile forgets the shapes. What it copies runs before the engine.
            taken = [context.set_optimization_profile_async(profile, stream)]
            taken += [context.set_input_shape(name, shape) for name, shape in shapes.items()]
            taken += [context.set_tensor_address(name, at) for name, at in addresses.items()]
            context.set_device_memory(*scratch)
            if not all(taken):
                raise BackendError(
                    f"the engine {self._name} does not take its tensors ({device.reason}): "
                    "compile it again with `varedit-export engines --again`"
                )

        def run() -> None:
            with device.current(f"run the engine {self._name}"):
                if not context.execute_async_v3(stream):
                    raise RuntimeError(device.reason)

        return run


class _Kernels:
    """What TensorRT for RTX compiles when an engine first runs, kept for the next process."""

    def __init__(self, trt: Any, name: str) -> None:
        self._file = cache_folder() / "kernels" / f"{plain_name(name)}.bin"
        self._strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        self._cache: Any = None

    def serve(self, config: Any) -> None:
        if self._strategies is None:  # TensorRT compiles nothing at run time
            return
        # By default the kernels for a shape come later, when slower ones have been captured.
        config.dynamic_shapes_kernel_specialization_strategy = self._strategies.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if kept := read_kept(self._file):  # one of another machine or version is not taken
                self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        if self._cache is not None:
            keep(self._file, bytes(self._cache.serialize()))


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
            f"the GPU cannot {what} ({' '.join(str(error).split()) or type(error).__name__}): run "
            "`varedit-export doctor`"
        ) from error

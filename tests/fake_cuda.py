"""cuda.core, cuda.bindings.driver and TensorRT for RTX on a simulated GPU.

What needs no GPU is the real ones' own; `test_cuda.py` compares the rest with them by names
and parameters. Unlike the real ones they notice calls from a thread that no GPU is current in.
"""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakSet, ref

import cuda.bindings.driver
import tensorrt_rtx
from simulated_gpu import SimulatedEngine, SimulatedGpu
from uncompiled import VERSIONS

from varedit_runtime.backends.engines.device import Launch, address_of
from varedit_runtime.backends.engines.import_tensorrt import MODULES, EngineKind

RTX: Any = tensorrt_rtx
driver: Any = cuda.bindings.driver
DTYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}
STREAM, CONTEXT = 7, 8


@dataclass
class Machine:
    """A machine with a simulated GPU, and what happened on it.

    failing: names of calls that fail. messages: what TensorRT logs at a call, by name. graphs:
    captured and not destroyed, by handle. loaded: engines and contexts. orphans: those freed
    without a current GPU, or after what they use. compiled: kernels that TensorRT for RTX compiled.
    current: the contexts of GPUs that each thread pushed. streams: open ones. integrated: whether
    the GPU has the system's memory. cached: bytes of it that CUDA counts as taken, though they
    only hold files.
    """

    gpu: SimulatedGpu
    kind: EngineKind = "tensorrt-rtx"
    failing: set[str] = field(default_factory=set)
    messages: dict[str, str] = field(default_factory=dict)
    graphs: dict[int, Launch] = field(default_factory=dict)
    handles: Iterator[int] = field(default_factory=partial(count, 1))
    compiled: list[str] = field(default_factory=list)
    current: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    streams: int = 0
    integrated: bool = False
    cached: int = 0
    loaded: WeakSet[Any] = field(default_factory=WeakSet)
    orphans: list[Any] = field(default_factory=list)
    logger: Any = None
    capture_mode: Any = None
    spoilt: bool = False

    @property
    def modules(self) -> dict[str, Any]:
        """The fake modules by name."""
        names = ["ILogger", "ExecutionContextAllocationStrategy"]
        if self.kind == "tensorrt-rtx":
            names += ["ComputeCapability", "DynamicShapesKernelSpecializationStrategy"]
        own = {name: getattr(RTX, name) for name in names}
        return {
            "cuda.core": SimpleNamespace(Device=partial(Device, self)),
            "cuda.bindings.driver": Driver(self),
            MODULES[self.kind]: self._tensorrt(
                __version__=VERSIONS[self.kind], Runtime=partial(Runtime, self), **own
            ),
        }

    def _tensorrt(self, **names: Any) -> ModuleType:
        module = ModuleType(MODULES[self.kind])
        vars(module).update(names)
        return module

    @property
    def is_current(self) -> bool:
        """Whether the GPU is current in this thread."""
        return bool(self.current[threading.get_ident()])

    def check(self, call: str) -> None:
        assert self.is_current, f"{call}: no GPU is current"
        if call in self.messages:
            self.logger.log(RTX.ILogger.Severity.ERROR, self.messages[call])
        if call in self.failing:
            raise RuntimeError(f"CUDA_ERROR_UNKNOWN: {call}\n  has failed")


def called(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of cuda.core or TensorRT fail by raising, if it is to fail."""

    @wraps(method)
    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        self.machine.check(method.__name__)
        return method(self, *arguments, **named)

    return checked


def answered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of the driver fail by the code it returns, if it is to fail."""

    @wraps(method)
    def checked(self: Any, *arguments: Any) -> tuple[Any, ...]:
        try:
            self.machine.check(method.__name__)
        except RuntimeError:
            if method.__name__ == "cuStreamEndCapture":  # a capture ends whatever comes of it
                self.gpu.end()
            return driver.CUresult.CUDA_ERROR_UNKNOWN, None
        return driver.CUresult.CUDA_SUCCESS, *(method(self, *arguments) or ())

    return checked


class Of:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.gpu = machine, machine.gpu


class Driver(Of):
    CUresult, CUstreamCaptureMode = driver.CUresult, driver.CUstreamCaptureMode
    CUDA_MEMCPY2D, CUmemorytype = driver.CUDA_MEMCPY2D, driver.CUmemorytype

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        contexts = self.machine.current[threading.get_ident()]
        return driver.CUresult.CUDA_SUCCESS, contexts[-1] if contexts else 0

    def cuCtxPushCurrent(self, ctx: Any) -> tuple[Any]:
        assert ctx == CONTEXT
        if "cuCtxPushCurrent" in self.machine.failing:
            return (driver.CUresult.CUDA_ERROR_UNKNOWN,)
        self.machine.current[threading.get_ident()].append(ctx)
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return driver.CUresult.CUDA_SUCCESS, self.machine.current[threading.get_ident()].pop()

    @answered
    def cuMemGetInfo(self) -> tuple[int, int]:
        return self.gpu.free_memory() - self.machine.cached, 10**10

    @answered
    def cuMemAlloc(self, bytesize: int) -> tuple[Any]:
        return (driver.CUdeviceptr(self.gpu.allocate(bytesize)),)

    @answered
    def cuMemFree(self, dptr: Any) -> None:
        self._free(int(dptr))

    @answered
    def cuMemAllocHost(self, bytesize: int) -> tuple[int]:
        return (address_of(self.gpu.allocate_host(bytesize)),)

    @answered
    def cuMemFreeHost(self, p: int) -> None:
        self._free(p)

    @answered
    def cuMemcpyAsync(self, dst: Any, src: Any, ByteCount: int, hStream: Any) -> None:
        assert int(hStream) == STREAM
        # Which take what the real function takes.
        self.gpu.copy(int(driver.CUdeviceptr(dst)), int(driver.CUdeviceptr(src)), ByteCount)

    @answered
    def cuMemcpy2DAsync(self, pCopy: Any, hStream: Any) -> None:
        device = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert int(hStream) == STREAM and pCopy.srcMemoryType == pCopy.dstMemoryType == device
        width, count = pCopy.WidthInBytes, pCopy.Height
        assert (pCopy.srcPitch, pCopy.dstPitch) == (2 * width, width)
        self.gpu.copy_runs(int(pCopy.dstDevice), int(pCopy.srcDevice), width, count)

    @answered
    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> None:
        assert int(hStream) == STREAM and uc == 0
        self.gpu.clear(int(driver.CUdeviceptr(dstDevice)), N)

    @answered
    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> None:
        assert int(hStream) == STREAM
        self.machine.capture_mode, self.machine.spoilt = mode, False
        self.gpu.begin()

    @answered
    def cuStreamEndCapture(self, hStream: Any) -> tuple[Any]:
        assert int(hStream) == STREAM and not self.machine.spoilt
        return (driver.CUgraph(self._keep(self.gpu.end())),)

    @answered
    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> tuple[Any]:
        assert flags == 0
        return (driver.CUgraphExec(self._keep(self._graph(hGraph, driver.CUgraph))),)

    @answered
    def cuGraphDestroy(self, hGraph: Any) -> None:
        self._graph(hGraph, driver.CUgraph)
        del self.machine.graphs[int(hGraph)]

    @answered
    def cuGraphUpload(self, hGraphExec: Any, hStream: Any) -> None:
        assert int(hStream) == STREAM and self._graph(hGraphExec, driver.CUgraphExec)

    @answered
    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> None:
        assert int(hStream) == STREAM
        self._graph(hGraphExec, driver.CUgraphExec)()

    @answered
    def cuGraphExecDestroy(self, hGraphExec: Any) -> None:
        self._graph(hGraphExec, driver.CUgraphExec)
        del self.machine.graphs[int(hGraphExec)]

    def _keep(self, run: Launch) -> int:
        handle = next(self.machine.handles)
        self.machine.graphs[handle] = run
        return handle

    def _graph(self, handle: Any, kind: type) -> Launch:
        assert isinstance(handle, kind) and int(handle) in self.machine.graphs, "there is none"
        return self.machine.graphs[int(handle)]

    def _free(self, address: int) -> None:
        assert not self.gpu.queue, "memory is freed before the work on it is done"
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        if self.gpu.recording is not None and self.machine.capture_mode != relaxed:
            self.machine.spoilt = True
        self.gpu.release(address)


class ComputeCapability(NamedTuple):
    major: int
    minor: int


class Device(Of):
    name = "Simulated GPU"
    compute_capability = ComputeCapability(8, 9)

    @property
    def properties(self) -> Any:
        return SimpleNamespace(integrated=self.machine.integrated)

    def set_current(self, ctx: Any = None) -> None:
        self.machine.current[threading.get_ident()][:] = [CONTEXT]
        self.machine.check("set_current")

    @called
    def create_stream(self, obj: Any = None, options: Any = None) -> "Stream":
        self.machine.streams += 1
        return Stream(self.machine)


class Stream(Of):
    handle = driver.CUstream(STREAM)

    @called
    def sync(self) -> None:
        assert self.gpu.recording is None, "a stream that is captured cannot be waited for"
        self.gpu.wait()

    @called
    def record(self, event: Any = None, options: Any = None) -> "Event":
        return Event(self.machine, self.gpu.mark())

    @called
    def close(self) -> None:
        self.machine.streams -= 1


class Event(Of):
    def __init__(self, machine: Machine, wait: Launch) -> None:
        super().__init__(machine)
        self._wait = wait

    @called
    def sync(self) -> None:
        self._wait()


class Loaded(Of):
    """What TensorRT frees on its GPU. Unlike the real one it can be freed anywhere: see orphans."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        machine.loaded.add(self)

    def __del__(self) -> None:
        if not self.machine.is_current:
            self.machine.orphans.append(self)


class Runtime(Loaded):
    _allowed = False

    def __init__(self, machine: Machine, logger: Any) -> None:
        super().__init__(machine)
        machine.logger = self._logger = logger
        machine.check("Runtime")

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        assert "Runtime" not in self.machine.messages, "the real one would kill the process"
        self._allowed = allowed

    @called
    def deserialize_cuda_engine(self, serialized_engine: bytes | bytearray) -> "OldEngine | None":
        try:
            simulated = self.gpu.load("engine", serialized_engine)
        except Exception as error:
            self._logger.log(RTX.ILogger.Severity.ERROR, str(error))
            return None
        kernels = hashlib.sha256(serialized_engine).hexdigest()
        old = VERSIONS[self.machine.kind].startswith("10.")
        return (OldEngine if old else Engine)(self.machine, simulated, kernels)


class OldEngine(Loaded):
    """An engine of TensorRT 10.3; kernels: the name of those that it needs."""

    def __init__(self, machine: Machine, simulated: SimulatedEngine, kernels: str) -> None:
        super().__init__(machine)
        self.simulated, self.kernels = simulated, kernels

    @property
    def num_io_tensors(self) -> int:
        return len(self.simulated.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.simulated.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        dtype, _ = self.simulated.tensors[name]
        return RTX.DataType.__members__[DTYPES[dtype]]

    def get_tensor_shape(self, name: str) -> Any:
        _, shape = self.simulated.tensors[name]
        return RTX.Dims(shape)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self.simulated.scratch(profile_index)

    @called
    def create_execution_context(self, strategy: Any) -> "Context | None":
        return Context(self, RuntimeConfig(strategy))


class Engine(OldEngine):
    """An engine of TensorRT since 10.11, or of TensorRT for RTX."""

    @called
    def create_runtime_config(self) -> "RuntimeConfig":
        return RtxConfig() if self.machine.kind == "tensorrt-rtx" else RuntimeConfig()

    @called
    def create_execution_context(self, runtime_config: "RuntimeConfig") -> "Context | None":
        if "context" in self.machine.failing:
            return None
        return Context(self, runtime_config)


class RuntimeConfig:
    """TensorRT's."""

    def __init__(self, strategy: Any = None) -> None:
        self._strategy = strategy

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class RuntimeCache:
    """A runtime cache: which kernels are compiled, by their names."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def serialize(self) -> bytearray:
        return bytearray(json.dumps(self.kernels).encode())

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.kernels = json.loads(blob)
        except ValueError:
            return False
        return True


class RtxConfig(RuntimeConfig):
    """TensorRT for RTX's."""

    cache: ReferenceType[RuntimeCache]  # as the real one has a pointer

    def __init__(self) -> None:
        super().__init__()
        strategies = RTX.DynamicShapesKernelSpecializationStrategy
        self.dynamic_shapes_kernel_specialization_strategy = strategies.LAZY

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = ref(cache)
        return True


class Context(Loaded):
    """An IExecutionContext: as the real one it forgets shapes with every new profile."""

    def __init__(self, engine: OldEngine, config: RuntimeConfig) -> None:
        super().__init__(engine.machine)
        self._engine, self._config = engine, config
        self._profile, self._scratch = 0, (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def __del__(self) -> None:
        addresses = [*self._addresses.values(), *self._scratch[:1]]
        config = self._config
        whole = self.machine.is_current and all(
            self.gpu.on_gpu(address) for address in addresses if address
        )
        whole &= not isinstance(config, RtxConfig) or config.cache() is not None
        if not whole:
            self.machine.orphans.append(self)

    @called
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _, expected = self._engine.simulated.tensors[name]
        self._shapes[name] = shape
        return all(b in (a, -1) for a, b in zip(shape, expected, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.simulated.tensors

    def set_device_memory(self, memory: int, size: int) -> None:
        strategies = RTX.ExecutionContextAllocationStrategy
        assert self._config._strategy == strategies.USER_MANAGED
        self._scratch = memory, size

    @called
    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        if "execute" in self.machine.failing:
            return False
        if isinstance(self._config, RtxConfig):
            self._compile(self._config)
        simulated = self._engine.simulated
        simulated.bind(self._profile, self._shapes, self._addresses, self._scratch)()
        return True

    def _compile(self, config: RtxConfig) -> None:
        strategies = RTX.DynamicShapesKernelSpecializationStrategy
        assert config.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
        cache = config.cache()
        assert cache is not None
        if self._engine.kernels not in cache.kernels:
            cache.kernels.append(self._engine.kernels)
            self.machine.compiled.append(self._engine.kernels)

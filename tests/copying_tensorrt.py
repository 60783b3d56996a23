"""A `tensorrt` whose engines copy their input to their output, on a real GPU.

It stands in where TensorRT is not installed, so that everything else of the engines' runtime can
be tried: memory, streams, captured graphs. Its names are those of TensorRT 10.3.
"""

import enum
import importlib
import sys
from types import ModuleType
from typing import Any

SCRATCH = 1024  # bytes of scratch memory that an engine asks for


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None: ...


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DataType(enum.Enum):
    UINT8 = 0


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger) -> None: ...

    def deserialize_cuda_engine(self, serialized_engine: bytes | bytearray) -> "ICudaEngine":
        """Load a plan: the bytes that an engine copies, as text."""
        return ICudaEngine(int(serialized_engine))


class ICudaEngine:
    num_io_tensors = 2

    def __init__(self, size: int) -> None:
        self._size = size

    def get_tensor_name(self, index: int) -> str:
        return ("source", "target")[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.UINT8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._size,)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> "IExecutionContext":
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self._size)


class IExecutionContext:
    def __init__(self, size: int) -> None:
        self._size, self._addresses = size, dict[str, int]()
        self._driver: Any = importlib.import_module("cuda.bindings.driver")

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return shape == (self._size,)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= SCRATCH

    def execute_async_v3(self, stream_handle: int) -> bool:
        target, source = self._addresses["target"], self._addresses["source"]
        error, *_ = self._driver.cuMemcpyAsync(target, source, self._size, stream_handle)
        return error == self._driver.CUresult.CUDA_SUCCESS


def copying_tensorrt() -> ModuleType:
    """Make the module; `sys.modules["tensorrt"]` is where it is looked for."""
    module = ModuleType("tensorrt")
    own = sys.modules[__name__]
    kinds = (ILogger, ExecutionContextAllocationStrategy, DataType, Runtime)
    vars(module).update({kind.__name__: getattr(own, kind.__name__) for kind in kinds})
    vars(module)["__version__"] = "10.3.0"
    return module

"""A GPU of this machine's memory, whose engines are ONNX graphs: the runtime's other end in tests.

As a real one it does nothing before it is waited for, and its memory starts as garbage. Unlike a
real one it notices: addresses that are not aligned or not allocated, engines run for the first
time in a capture, and scratch that something else relies on, which it overwrites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from varedit_runtime.backends.engines.device import ALIGNMENT, Launch, address_of
from varedit_runtime.backends.wiring import item_size
from varedit_runtime.errors import BackendError

GARBAGE = 0xFF  # NaN in every floating-point type
FP8 = "float8_e4m3fn"  # whose bytes NumPy holds as uint8
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(float8e4m3fn)": FP8,
    "tensor(int8)": "int8",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@dataclass
class SimulatedGpu:
    """A GPU; folder: where the graphs' weights are. free: bytes of memory left."""

    folder: Path
    free: int = 10**9
    scratch: int = 1000
    allocated: list[np.ndarray] = field(default_factory=list)
    host: list[np.ndarray] = field(default_factory=list)
    queue: list[Launch] = field(default_factory=list)
    recording: list[Launch] | None = None
    launches: int = 0
    submitted: int = 0
    done: int = 0
    closed: bool = False

    def free_memory(self) -> int:
        return self.free

    def allocate(self, size: int) -> int:
        assert not self.closed
        if size > self.free:
            raise BackendError(f"{size} bytes are more than {self.free}")
        self.free -= size
        block = _aligned_block(size)
        self.allocated.append(block)
        return address_of(block)

    def allocate_host(self, size: int) -> np.ndarray:
        block = _aligned_block(size)
        self.host.append(block)
        return block

    def copy(self, target: int, source: int, size: int) -> None:
        into, out_of = self.memory(target, size), self.memory(source, size)
        self._do(lambda: np.copyto(into, out_of))

    def copy_runs(self, target: int, source: int, width: int, count: int) -> None:
        assert target + width * count <= source, "what is copied overlaps its target"
        into = self.memory(target, width * count).reshape(count, width)
        out_of = self.memory(source, 2 * width * count).reshape(count, 2 * width)[:, :width]
        self._do(lambda: np.copyto(into, out_of))

    def clear(self, address: int, size: int) -> None:
        memory = self.memory(address, size)
        self._do(lambda: memory.fill(0))

    def load(self, name: str, plan: bytes | bytearray) -> "SimulatedEngine":
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder)
        )
        return SimulatedEngine(self, name, ort.InferenceSession(bytes(plan), settings))

    def capture(self, record: Launch) -> Launch:
        self.begin()
        try:
            record()
        finally:
            launch = self.end()
        return launch

    def begin(self) -> None:
        assert self.recording is None, "one capture at a time"
        self.recording = []

    def end(self) -> Launch:
        assert self.recording is not None
        work, self.recording = self.recording, None

        def launch() -> None:
            assert not self.closed
            self.launches += 1
            self._submit(*work)

        return launch

    def settle(self) -> None:
        assert not self.queue, "engines settle once they have run"

    def mark(self) -> Launch:
        until = self.submitted
        return lambda: self._finish(until)

    def wait(self) -> None:
        self._finish(self.submitted)

    def _submit(self, *work: Launch) -> None:
        self.queue += work
        self.submitted += len(work)

    def _finish(self, until: int) -> None:
        """Do the work that was submitted up to here, and no more."""
        while self.done < until:
            self.done += 1
            self.queue.pop(0)()

    def close(self) -> None:
        self.closed = True

    def release(self, address: int) -> None:
        """Free one allocation."""
        for blocks in (self.allocated, self.host):
            for i, block in enumerate(blocks):
                if address_of(block) == address:
                    self.free += len(block) if blocks is self.allocated else 0
                    del blocks[i]
                    return
        raise AssertionError(f"{address} was never allocated")

    def memory(self, address: int, size: int) -> np.ndarray:
        """Return bytes of one of the allocations."""
        for block in (*self.allocated, *self.host):
            start = address - address_of(block)
            if start >= 0 and start + size <= len(block):
                return block[start : start + size]
        raise AssertionError(f"{size} bytes at {address} were never allocated")

    def on_gpu(self, address: int) -> bool:
        return any(0 <= address - address_of(b) < len(b) for b in self.allocated)

    def _do(self, work: Launch) -> None:
        if self.recording is None:
            self._submit(work)
        else:
            self.recording.append(work)


@dataclass
class SimulatedEngine:
    gpu: SimulatedGpu
    name: str
    session: ort.InferenceSession
    has_run: bool = False

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            arg.name: (
                TYPES[arg.type],
                tuple(size if isinstance(size, int) else -1 for size in arg.shape),
            )
            for arg in (*self._inputs, *self._outputs)
        }

    def scratch(self, profile: int) -> int:
        return self.gpu.scratch + profile

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> Launch:
        for name, address in addresses.items():
            assert address % ALIGNMENT == 0, f"{self.name}: {name} is not aligned"
            assert self.gpu.on_gpu(address), f"{self.name}: {name} is not on the GPU"
        own = self.gpu.memory(*scratch)
        assert len(own) >= self.scratch(profile)
        inputs = {
            arg.name: self._array(
                addresses[arg.name], shapes.get(arg.name, tuple(arg.shape)), TYPES[arg.type]
            )
            for arg in self._inputs
        }

        def run() -> None:
            assert self.has_run or self.gpu.recording is None, f"{self.name} was never run"
            self.has_run = True
            self.gpu._do(lambda: self._compute(inputs, addresses, own))

        return run

    def _compute(
        self, inputs: Mapping[str, np.ndarray], addresses: Mapping[str, int], own: np.ndarray
    ) -> None:
        own.fill(GARBAGE)
        given = {arg.name: _given(inputs[arg.name], arg) for arg in self._inputs}
        for arg, output in zip(self._outputs, self.session.run(None, given), strict=True):
            data = np.asarray(output).reshape(-1).view(np.uint8)
            self.gpu.memory(addresses[arg.name], len(data))[:] = data

    def _array(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        size = int(np.prod(shape)) * item_size(dtype)
        memory = self.gpu.memory(address, size)
        return (memory if dtype == FP8 else memory.view(dtype)).reshape(shape)

    @property
    def _inputs(self) -> Sequence[ort.NodeArg]:
        return self.session.get_inputs()

    @property
    def _outputs(self) -> Sequence[ort.NodeArg]:
        return self.session.get_outputs()


def _aligned_block(size: int) -> np.ndarray:
    raw = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
    start = -address_of(raw) % ALIGNMENT
    return raw[start : start + size]


def _given(array: np.ndarray, arg: ort.NodeArg) -> np.ndarray | ort.OrtValue:
    """Return an input as ONNX Runtime takes it."""
    if TYPES[arg.type] != FP8:
        return array
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.FLOAT8E4M3FN)

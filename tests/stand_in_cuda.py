"""A stand-in for ONNX Runtime's CUDA provider: it computes on the CPU, and captures as CUDA does.

Every buffer is a CPU's. A run with a `gpu_graph_id` that was seen before is a replay: like CUDA it
repeats the captured run, on the captured addresses, whatever is bound now.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort
import pytest

from varedit_runtime.backends.onnxruntime import cuda

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclass
class Node:
    name: str
    op_type: str


@dataclass
class Assigned:
    """Nodes of a provider, as ONNX Runtime reports them."""

    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


@dataclass
class Binding:
    """An io_binding that takes CUDA's tensors for the CPU's."""

    real: Any
    bound: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def bind_input(self, name: str, device: str, *rest: Any) -> None:
        assert device == "cuda"  # a captured graph reads nothing else again
        self.bound[name] = rest
        self.real.bind_input(name, "cpu", *rest)

    def bind_output(self, name: str, device: str, *rest: Any) -> None:
        assert device == "cuda"
        self.bound[name] = rest
        self.real.bind_output(name, "cpu", *rest)


class StandInSession:
    """An InferenceSession on CUDA. made: all sessions. on_cpu: nodes that are left to the CPU."""

    made: list["StandInSession"]
    on_cpu: Sequence[Node] = ()

    def __init__(
        self, graph: bytes, settings: ort.SessionOptions, providers: Any, enable_fallback: int
    ) -> None:
        ((provider, self.options),) = providers
        assert provider == CUDA and enable_fallback == 0
        self.settings = settings
        self.real = REAL_SESSION(graph, settings, providers=[CPU])
        self.captured: dict[str, Binding] = {}
        self.runs: list[str] = []
        self.made.append(self)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def get_provider_graph_assignment_info(self) -> list[Assigned]:
        assert self.real.get_provider_graph_assignment_info()  # it was asked to record them
        return [Assigned(CUDA, [Node("mlp_up", "MatMul")]), Assigned(CPU, list(self.on_cpu))]

    def io_binding(self) -> Binding:
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions) -> None:
        number = _setting(options, "gpu_graph_id")
        shrunk = _setting(options, "memory.enable_memory_arena_shrinkage")
        self.runs.append(number or shrunk)
        if self.options["enable_cuda_graph"] == "1":
            assert int(number) > 0 and not shrunk
            binding = self.captured.setdefault(number, binding)
        self.real.run_with_iobinding(binding.real, ort.RunOptions())


REAL_SESSION = ort.InferenceSession
_ALLOCATE = ort.OrtValue.ortvalue_from_shape_and_type


def _setting(options: ort.RunOptions, key: str) -> str:
    try:
        return options.get_run_config_entry(key)
    except RuntimeError:  # it is not set
        return ""


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[StandInSession]:
    """Let ONNX Runtime seem to have a CUDA provider; return the sessions that are made."""
    monkeypatch.setattr(StandInSession, "made", [], raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", StandInSession)
    monkeypatch.setattr(
        ort.OrtValue,
        "ortvalue_from_shape_and_type",
        staticmethod(lambda shape, dtype, device: _ALLOCATE(shape, dtype, "cpu")),
    )
    monkeypatch.setattr(cuda, "copy_runs", _copy_runs)
    return StandInSession.made


def _copy_runs(target: int, source: int, width: int, count: int) -> None:
    for run in range(count):
        ctypes.memmove(target + run * width, source + 2 * run * width, width)

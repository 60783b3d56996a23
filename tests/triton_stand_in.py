"""A stand-in of `triton_python_backend_utils`, which exists inside of Triton alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class TritonError:
    text: str
    code: str

    INTERNAL, INVALID_ARG, CANCELLED = "internal", "invalid", "cancelled"


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class InferenceRequest:
    """A request. cancelled_after: how often it is asked about before its client goes away."""

    inputs: Mapping[str, np.ndarray]
    cancelled_after: int = 10**9

    def is_cancelled(self) -> bool:
        self.cancelled_after -= 1
        return self.cancelled_after < 0


@dataclass
class InferenceResponse:
    output_tensors: Sequence[Tensor] = ()
    error: TritonError | None = None


@dataclass
class _Logger:
    lines: list[str] = field(default_factory=list)

    def log_info(self, line: str) -> None:
        self.lines.append(line)

    log_error = log_info


Logger = _Logger()


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None

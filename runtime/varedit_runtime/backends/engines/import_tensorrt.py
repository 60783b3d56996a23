"""Import TensorRT or TensorRT for RTX, which have the same interface."""

import importlib
from types import ModuleType
from typing import Any, Literal, get_args

from varedit_runtime.errors import needs_extra, one_line

EngineKind = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)
RTX: EngineKind = "tensorrt-rtx"
MODULES: dict[EngineKind, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def import_tensorrt(kind: EngineKind) -> ModuleType:
    """Import a library. Raises MissingExtraError if it is not installed."""
    with needs_extra(kind):
        return importlib.import_module(MODULES[kind])


def quiet_logger(trt: ModuleType) -> Any:
    """Return a logger that prints nothing and keeps the last error as `worst`."""

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.worst = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.worst = one_line(message)

    return Messages()

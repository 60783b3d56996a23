"""The options of ONNX Runtime, which its spec and its backend share."""

import os
from dataclasses import dataclass

from varedit_runtime.backends.spec import OffloadOptions, option
from varedit_runtime.errors import ConfigError, shown

THREADS_PER_CORE = 8  # more only wait for each other, and thousands end the process
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class OnnxRuntimeOptions(OffloadOptions):
    """Where and how ONNX Runtime runs.

    provider: "cpu" or "cuda"; it never falls back to the other. threads: of the CPU that compute
    at once, from 1 to THREADS_PER_CORE for each core; None: one per core, or the process's pool.
    """

    provider: str = option("cpu", "Where onnxruntime runs: cpu (default) or cuda.")
    threads: int | None = option(None, "CPU threads of onnxruntime; by default one per core.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ConfigError(f"no provider is called {shown(self.provider)}; there are {known}")
        most = THREADS_PER_CORE * (os.cpu_count() or 1)
        if self.threads is not None and not 1 <= self.threads <= most:
            raise ConfigError(f"threads is {shown(self.threads)}; give 1 to {most} on this machine")

"""The options of ONNX Runtime, which its spec and its backend share."""

from dataclasses import dataclass

from varedit_runtime.backends.spec import BackendOptions, option
from varedit_runtime.errors import BackendError, ConfigError, shown

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class OnnxRuntimeOptions(BackendOptions):
    """Where and how ONNX Runtime runs.

    provider: "cpu" or "cuda"; it never falls back to the other. threads: of the CPU, at least 1;
    None: one per core.
    """

    provider: str = option("cpu", "Where onnxruntime runs: cpu or cuda; by default cpu.")
    threads: int | None = option(None, "CPU threads of onnxruntime; by default one per core.")

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise BackendError(f"no provider is called {shown(self.provider)}; there are {known}")
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
            raise ConfigError(
                f"threads is {shown(self.threads)}; it must be an integer of at least 1"
            )

"""Engines that are the graphs themselves, for GPUs that are this machine's memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from varedit_engines import engine_cache
from varedit_engines.compile_set import CompileJob, compile_engine_set
from varedit_engines.engine_compiler import Compiled
from varedit_engines.engine_report import EngineReport
from varedit_runtime.backends.engines import engine_set
from varedit_runtime.backends.engines.engine_set import EngineLayout, EngineSet
from varedit_runtime.bundle import Bundle

GPU = "sm89"
VERSIONS = {"tensorrt": "11.4", "tensorrt-rtx": "1.7"}


@dataclass
class Uncompiled:
    """A compiler whose plans are the graphs."""

    backend: str = "tensorrt-rtx"
    gpu: str = GPU
    settings: dict[str, str] = field(default_factory=dict)
    scratch: int | None = None
    resident: int | None = None

    @property
    def tools(self) -> dict[str, str]:
        return {self.backend: VERSIONS[self.backend]}

    @property
    def flags(self) -> dict[str, str]:
        return self.settings

    def compile(self, name: str, graph: bytes, *rest: Any) -> Compiled:
        return Compiled(memoryview(graph), EngineReport(len(graph), 1, self.scratch, self.resident))


def keep_engines_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give one test its own user folders."""
    for name in ("data_folder", "cache_folder"):
        monkeypatch.setattr(engine_set, name, lambda name=name: folder / name)


def compiled(
    path: Path,
    layout: EngineLayout = "external",
    backend: str = "tensorrt-rtx",
    settings: dict[str, str] | None = None,
    scratch: int | None = None,
    resident: int | None = None,
) -> tuple[Bundle, EngineSet]:
    """Make the bundle read-only, so that engines go to the user's cache: all tests share it."""
    bundle = Bundle.open(path)
    compiler = Uncompiled(backend, GPU, settings or {}, scratch, resident)
    job = CompileJob(bundle, layout, compiler)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as read_only:
        read_only.setattr(engine_cache, "_writable", lambda folder: False)
        return bundle, compile_engine_set(job, lambda *_: None)


def near(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray) -> bool:
    """Check that pictures are equal, except single values that the decoders round differently."""
    different = np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))
    return bool(different.max() <= 1 and different.mean() < 1e-3)

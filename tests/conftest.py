"""Small models and edits that several tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from varedit_export.graphs import trace
from varedit_export.graphs.stages import Stage

RECORDINGS = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small products are faster on one thread; tests of threads set their own number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def stages_are_traced_once() -> Iterator[None]:
    """Trace each model once: tests build the same few, and tracing is most of a small build."""
    templates: dict[tuple[object, ...], ir.Model] = {}

    def traced(stage: Stage, fake: FakeTensorMode) -> ir.Model:
        text = getattr(stage, "text_encoder", None)
        key = (stage.name, stage.shapes, text and text.config)
        if key not in templates:
            templates[key] = original(stage, fake)
        return templates[key]

    original = trace.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", traced)
        yield


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=sorted(p.name for p in RECORDINGS.iterdir()))
def recording_folder(request: pytest.FixtureRequest) -> Path:
    return RECORDINGS / request.param


@pytest.fixture
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: faster, and a killed process's writes survive without it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)

"""Small models and edits that several tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

RECORDINGS = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small products are faster on one thread; tests of threads set their own number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=sorted(p.name for p in RECORDINGS.iterdir()))
def recording_folder(request: pytest.FixtureRequest) -> Path:
    return RECORDINGS / request.param

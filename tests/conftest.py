"""Small models and edits that several tests share."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from bundles import run_folder

from varedit_runtime.editing.editor import Editor
from varedit_runtime.locate import VARIABLE, embedded

RECORDINGS = Path(__file__).parent / "golden"

# Before the hub's library reads them: no test asks the real hub, or finds what a cache has.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME="/nonexistent")
# The tests already run on all cores; a build that they start brings no more threads and processes.
os.environ["OMP_NUM_THREADS"] = "1"
# One cache for all processes of a run, empty at its start: each template is traced once.
os.environ["XDG_CACHE_HOME"] = str(run_folder() / "cache")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let fuzzing run longer than in CI: `pytest -k fuzz --fuzz 100`."""
    parser.addoption("--fuzz", type=int, default=1, help="Run N times as many random cases.")


# Files that take minutes come first, so that no core waits for another at the end. Of neighbours
# one builds what the other does not need.
LONGEST_FIRST = (
    "test_assemble",
    "test_export_cli",
    "test_blocks",
    "test_nano_bundle",
    "test_precision_paths",
    "test_published",
    "test_variants",
    "test_streamed",
    "test_editor",
    "test_compile_set",
    "test_training",
    "test_resume",
    "test_nano_training",
    "test_side_by_side",
    "test_training_processes",
    "test_training_nano",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


class _AtOnce:
    """Tells of each failure when it happens: a run that takes too long has no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\n{report.nodeid} failed:\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_AtOnce(config))


@pytest.fixture
def cases(pytestconfig: pytest.Config) -> Callable[[int], Iterator[Random]]:
    """Return a function that yields sources of randomness, one a case: `for random in cases(300)`.

    Case n is the same in every run; the report of a failure ends with its number.
    """

    times = int(pytestconfig.getoption("--fuzz") or 1)

    def numbered(count: int) -> Iterator[Random]:
        for number in range(count * times):
            print(f"case {number}")
            yield Random(number)

    return numbered


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Become a user who has never built anything, in an empty folder."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture(scope="module")
def nano() -> Iterator[Editor]:
    """Open an editor with the embedded bundle."""
    with Editor.open(embedded(), threads=1) as editor:
        yield editor


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small products are faster on one thread; tests of threads set their own number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Let Ctrl-C interrupt tests and what they start, also where a shell runs all behind itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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

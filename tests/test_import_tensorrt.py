"""What TensorRT logs: who hears it, and what is made where it cannot use CUDA.

`tensorrt_lean_bindings` is the real TensorRT, without its compiler: see pyproject.toml.
"""

import os
import subprocess
import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import tensorrt_lean_bindings as lean
import tensorrt_rtx as rtx

from varedit_runtime.backends.engines.import_tensorrt import create, listening, the_logger
from varedit_runtime.errors import BackendError

RTX: Any = rtx
LEAN: Any = lean
ERROR = RTX.ILogger.Severity.ERROR

CREATED = """
import tensorrt_lean_bindings as lean
from varedit_runtime.backends.engines.import_tensorrt import create
from varedit_runtime.errors import BackendError
try:
    create(lean, "Runtime")
except BackendError as error:
    print(error)
"""


def test_without_a_gpu_the_real_tensorrt_is_an_error_and_the_process_lives() -> None:
    """Its Runtime kills the process when it is used, and when it is freed."""
    done = subprocess.run(
        [sys.executable, "-c", CREATED],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "cannot be used here (createInferRuntime: " in done.stdout
    assert "CUDA initialization failure" in done.stdout and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("severity", ["ERROR", "INTERNAL_ERROR", "WARNING", "INFO", "VERBOSE"])
def test_both_libraries_log_with_the_same_severities(severity: str) -> None:
    theirs = (library.ILogger.Severity.__members__[severity] for library in (RTX, LEAN))
    assert len({int(one) for one in theirs}) == 1


@pytest.fixture
def library() -> Any:
    """Make a library whose Builder is refused, or logs and is made, as `behaviour` says."""
    module: Any = ModuleType("some_rt")
    module.ILogger, module.behaviour = RTX.ILogger, ""

    def builder(logger: Any) -> object:
        if module.behaviour:
            logger.log(ERROR, module.behaviour)
        if module.behaviour == "refused":
            raise TypeError("factory function returned nullptr")
        return None if module.behaviour == "nothing" else object()

    module.Builder = builder
    return module


def test_a_library_has_one_logger(library: Any) -> None:
    """It calls its first object's logger for all others too, as long as any of them lives."""
    assert the_logger(library) is the_logger(library) is not the_logger(RTX)
    assert create(library, "Builder")


@pytest.mark.parametrize("behaviour", ["refused", "nothing", "no\nCUDA"])
def test_what_cannot_be_made_is_an_error_of_one_line(library: Any, behaviour: str) -> None:
    library.behaviour = behaviour
    said = rf"some_rt cannot be used here \({' '.join(behaviour.split())}\): run `varedit-export do"
    with pytest.raises(BackendError, match=said):
        create(library, "Builder")


def test_what_one_thread_does_is_not_another_ones_error(library: Any) -> None:
    logger = the_logger(library)
    with listening(library) as here, listening(library) as inner:

        def elsewhere() -> None:
            with listening(library) as there:
                logger.log(ERROR, "there")
            assert there.errors == ["there"]

        run(elsewhere)
        assert here.errors == []
        logger.log(ERROR, "here\nand\nnow")
        logger.log(RTX.ILogger.Severity.WARNING, "a warning")
        assert here.errors == inner.errors == ["here and now"]
        run(lambda: logger.log(ERROR, "a thread of the library"))
        assert here.errors[1:] == ["a thread of the library"]
    logger.log(ERROR, "nobody listens")
    assert len(here.errors) == 2


def run(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_the_first_errors_tell_the_reason(library: Any) -> None:
    with listening(library) as log:
        assert (log.reason(), log.reason("a\nb")) == ("no reason given", "a b")
        for number in range(9):
            the_logger(library).log(ERROR, f"error {number}")
    assert log.reason("other") == "error 0; error 1; error 2"

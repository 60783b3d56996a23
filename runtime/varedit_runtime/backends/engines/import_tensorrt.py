"""Import TensorRT or TensorRT for RTX, which have the same interface, and hear what they log.

What differs between versions of TensorRT: 10.3, which JetPack 6 has, lacks runtime configurations
(`cuda.py`) and one level of hardware compatibility (`engine_compiler.py`).
"""

import ctypes
import importlib
import re
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from varedit_runtime.errors import BackendError, MissingExtraError, needs_extra, one_line, shown

EngineKind = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)
RTX: EngineKind = "tensorrt-rtx"
# TensorRT's types that manifests name differently.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
MODULES: dict[EngineKind, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TURING = "sm75"  # which TensorRT for RTX names, and has no matrix products in fp32 for
TOLD = 3  # errors of a failure that are shown: the first ones say why
OLDEST = (10, 3)  # TensorRT's version in JetPack 6
SYSTEM = Path("/usr/lib")  # where packages of Debian and JetPack have their Python modules


def import_tensorrt(kind: EngineKind, compiling: bool = False) -> ModuleType:
    """Import a library.

    Raises MissingExtraError, which names all extras, if it is not there; BackendError if it is too
    old.
    """
    with needs_extra(f"export,{kind}" if compiling else kind):
        try:
            library = importlib.import_module(MODULES[kind])
        except ModuleNotFoundError as error:
            if error.name == MODULES[kind] and (unseen := unseen_library(kind)):
                raise MissingExtraError(unseen) from error
            raise
    if outdated := too_old(kind, library):
        raise BackendError(outdated)
    return library


def too_old(kind: EngineKind, library: ModuleType) -> str:
    """Return why a library is too old; "" if it is not."""
    version = str(library.__version__)
    if kind == RTX or tuple(map(int, re.findall(r"\d+", version)[:2])) >= OLDEST:
        return ""
    return f"TensorRT {version} is installed, and 10.3 or later is needed"


def unseen_library(kind: EngineKind) -> str:
    """Return how to reach the system's TensorRT, if only this environment does not see it."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for module in sorted(SYSTEM.glob(f"python3*/dist-packages/{MODULES[kind]}/__init__.py")):
        folder = module.parents[1]
        version = folder.parent.name.removeprefix("python")
        if version not in ("3", here):
            return (
                f"the TensorRT in {folder} is for Python {version}, and this is Python {here}: "
                "docs/jetson.md says what to do"
            )
        return (
            f"the TensorRT in {folder} is not seen by this environment: make one with "
            "`/usr/bin/python3 -m venv --system-site-packages`"
        )
    return ""


def rtx_architectures(trt: ModuleType) -> dict[str, Any]:
    """Return the GPUs that TensorRT for RTX compiles a model for, by names such as "sm89"."""
    names = getattr(trt, "ComputeCapability", None)
    members = {} if names is None else names.__members__
    known = {name.lower(): member for name, member in members.items() if name.startswith("SM")}
    known.pop(TURING, None)
    return known


def no_engines_for(gpu: str, known: Collection[str]) -> str:
    """Say that TensorRT for RTX has no engines for a GPU, such as "sm90", and what has."""
    why = " (no matrix products in fp32, which all models have)" if gpu == TURING else ""
    return (
        f"{RTX} has no engines for {shown(gpu)}{why}, only for {', '.join(known)}: use tensorrt, "
        "which compiles on a machine with that GPU"
    )


@dataclass(eq=False)
class Log:
    """What a library logged while a `listening` lasted.

    thread: the one that listens. messages: all, errors too; None where only errors are kept.
    """

    messages: list[str] | None = None
    thread: int = field(default_factory=threading.get_ident)
    errors: list[str] = field(default_factory=list)

    def reason(self, otherwise: object = None) -> str:
        """Return the first errors on one line; without any, otherwise, if it is given."""
        return "; ".join(self.errors[:TOLD]) or one_line(otherwise or "no reason given")


@contextmanager
def listening(trt: ModuleType, to_all: bool = False) -> Iterator[Log]:
    """Collect the errors that a library logs in this thread, and in threads of its own.

    to_all: collect all its messages too.
    """
    log, logs = Log([] if to_all else None), the_logger(trt).logs
    logs.append(log)
    try:
        yield log
    finally:
        logs.remove(log)


@cache
def the_logger(trt: ModuleType) -> Any:
    """Return a library's logger, which prints nothing: see `listening`.

    It lives as long as the process: a library calls the logger of its first object for all others.
    """

    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.logs: list[Log] = []

        def log(self, severity: Any, message: str) -> None:
            failed = severity in (severities.ERROR, severities.INTERNAL_ERROR)
            logs = tuple(self.logs)
            own = [log for log in logs if log.thread == threading.get_ident()]
            for log in own or logs:  # the library's own threads work for anybody
                if failed:
                    log.errors.append(one_line(message))
                if log.messages is not None:
                    log.messages.append(message)

    return Logger()


def create(trt: ModuleType, name: Literal["Builder", "Runtime"]) -> Any:
    """Create a library's Builder or Runtime.

    Raises BackendError if the library logs an error, as it does where it cannot use CUDA.
    """
    made = error = None
    with listening(trt) as log:
        try:
            made = getattr(trt, name)(the_logger(trt))
        except TypeError as refused:  # which says only that nothing was made
            error = refused
    if made is None or log.errors:
        # What TensorRT makes without CUDA kills the process when it is used, and when it is freed.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        raise BackendError(
            f"{trt.__name__} cannot be used here ({log.reason(error)}): run `varedit-export doctor`"
        ) from error
    return made

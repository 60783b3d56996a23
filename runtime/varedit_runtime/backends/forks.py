"""Backends are of no use in a child of their process, which a fork made.

The threads of a backend's graphs, and what it holds on a GPU, exist in the parent alone: in the
child, running or freeing a graph would wait for those threads forever. So a child leaks backends.
"""

import ctypes
import os
from weakref import WeakSet

from varedit_runtime.errors import EditorError


class Home:
    """The process that a backend was loaded in."""

    def __init__(self, backend: object) -> None:
        self._process = os.getpid()
        _LOADED.add(backend)

    @property
    def here(self) -> bool:
        """Whether this is that process, and not a child that a fork made of it."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raise EditorError in a child."""
        if not self.here:
            raise EditorError(
                "the editor was opened before this process was forked, and works in the parent "
                "alone: open another one here, or start processes by `spawn`"
            )


_LOADED: WeakSet[object] = WeakSet()


def _never_free() -> None:
    """Keep all backends of the parent from being freed, also when the interpreter ends."""
    for backend in _LOADED:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(after_in_child=_never_free)

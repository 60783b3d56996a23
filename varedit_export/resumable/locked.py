"""Keep other processes out of a folder that a command works in for a long time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from varedit_runtime.errors import ConfigError
from varedit_runtime.files import writing

LOCK = ".lock"  # a file in the folder


@contextmanager
def locked(folder: Path, working: str = "works") -> Iterator[None]:
    """Lock a folder, which is made if only it is missing, while the block runs.

    working: says in an error what the other process does there. Raises ConfigError if there is one,
    or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    with writing(folder):
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout as error:
            told = f"another process {working} in {folder}: wait for it, or choose another folder"
            raise ConfigError(told) from error
    try:
        yield
    finally:
        lock.release()

"""Read files that others may replace, write files whole, and keep files that only save time."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EFBIG, EINVAL
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Any
from weakref import finalize

import msgspec

from varedit_runtime.errors import ConfigError, readable_size, reason
from varedit_runtime.manifest import DIGEST, MANIFEST


class HeldFile:
    """A file that stays open, so that a file that takes its path later is never read instead."""

    def __init__(self, path: Path) -> None:
        """Open a file to read it. Raises OSError."""
        self.path = path
        # Without a buffer, which could return what the file held before.
        self._file = path.open("rb", buffering=0)
        self._turn = Lock()  # threads share its position, where `_read_at` moves it
        finalize(self, self._file.close)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._file.fileno()).st_size

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill a buffer from a byte on; return how many bytes there were. Raises OSError."""
        view, done = memoryview(buffer), 0
        while count := self._read_at(view[done:], offset + done):
            done += count
        return done

    def _read_at(self, view: memoryview, offset: int) -> int:
        """Read once; where possible not by the position, which forked processes share."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._turn:
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def read(self, size: int, offset: int = 0) -> bytes:
        """Return at most size bytes from a byte on. Raises OSError."""
        data = bytearray(min(size, max(0, self.size - offset)))
        return bytes(memoryview(data)[: self.read_into(data, offset)])

    def stands(self) -> bool:
        """Return whether the path still leads to this file, and not through a link."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.lstat())
        return False


def plain_name(text: str) -> str:
    """Return a text as it can stand in a file's name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


def unwritable(path: Path) -> str | None:
    """Return why a file cannot be written there; None if nothing speaks against it."""
    if bundle := bundle_around(path):
        return f"it would lie in the bundle {bundle}, which never changes; choose another folder"
    if os.path.isdir(path):
        return "it is a folder; name a file in it"
    if os.path.exists(path) and not os.path.isfile(path):
        return "it is a device or a pipe, which a file would replace; name a file"
    if not os.path.isdir(path.parent):
        return f"there is no folder {path.parent}; make it"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"the folder {path.parent} cannot be written to; choose another"
    return None


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be once it is made."""
    return shutil.disk_usage(_existing(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Return whether two folders are on one disk, or will be once they are made."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths are one file, also through links or by case-insensitive names."""
    try:
        return one.samefile(other)
    except OSError:  # not both are there
        return os.path.realpath(one) == os.path.realpath(other)


def bundle_around(path: Path) -> Path | None:
    """Return the bundle that a path is or lies in, itself or by what it links to, if in one."""
    for place in (Path(os.path.realpath(path.parent), path.name), Path(os.path.realpath(path))):
        for folder in (place, *place.parents):
            if all(os.path.isfile(folder / name) for name in (MANIFEST, DIGEST)):
                return folder
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError, which says that the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or reason(error)}") from error


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a path to write to; rename it to `path` on success, delete it on any failure.

    replace: False leaves what is at `path` as it is, also if it came there meanwhile, and raises
    FileExistsError.

    It lies in a new folder beside `path`: nobody else knows its name, so no link planted under
    that name can be written through, and two writers never share it. Raises OSError.
    """
    # Named before it is made: wherever Ctrl-C comes, what is there can be deleted.
    folder = path.parent / f".{token_hex(16)}"
    try:
        folder.mkdir(mode=0o700)
        yield folder / path.name
        move = Path.replace if replace else _move_to_free
        move(folder / path.name, path)
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:  # again, if Ctrl-C came in the middle
            shutil.rmtree(folder, ignore_errors=True)


def _move_to_free(file: Path, path: Path) -> None:
    """Move a file to a path where nothing is. Raises FileExistsError if something is."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file takes the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            file.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def check_report(path: Path) -> None:
    """Raise ConfigError, before work is spent, if a report cannot be written there.

    A report replaces a file only if its name ends in .json, so never a picture or a text.
    """
    why = unwritable(path)
    if why is None and os.path.lexists(path) and not _is_json(path):
        why = "it exists, and a report replaces only files that end in .json; choose another name"
    if why is not None:
        raise ConfigError(f"{path} cannot be written: {why}")


def write_report(report: Any, path: Path) -> None:
    """Write structs as JSON, whole or not at all. Raises ConfigError if that fails."""
    with writing(path), atomic_file(path, replace=_is_json(path)) as whole:
        whole.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def read_regular(path: Path, most: int) -> bytes:
    """Return a file's bytes. Raises OSError if there are over `most`, or it is a pipe or device."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe could be waited for without end
        raise OSError(EINVAL, "it is not a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(EFBIG, f"it has over {readable_size(most)}")
    return content


def read_kept(path: Path) -> bytes:
    """Return the bytes of a file, none where it cannot be read."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def keep(path: Path, data: bytes) -> None:
    """Write a file that only saves time: where that fails, nothing is kept and nothing raised."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as whole:
            whole.write_bytes(data)

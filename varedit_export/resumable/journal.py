"""A file of JSON lines that a process which is killed leaves readable."""

import os
from errno import ELOOP
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from varedit_runtime.errors import ConfigError
from varedit_runtime.files import read_regular, writing

LARGEST = 2**28  # bytes: a line for each of a million edits
Line = TypeVar("Line", bound=msgspec.Struct)

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class Journal(Generic[Line]):
    """Lines of one kind. Each is on the disk before the next thing is done."""

    def __init__(self, path: Path, kind: type[Line]) -> None:
        """Read the lines that are there; one that was cut off counts for nothing.

        Raises ConfigError if the file cannot be read.
        """
        self._path, self.lines = path, list[Line]()
        try:
            content = read_regular(path, LARGEST) if os.path.lexists(path) else b""
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        self._cut_off = not content.endswith(b"\n") and content != b""
        for line in content.splitlines():
            try:
                self.lines.append(msgspec.json.decode(line, type=kind))
            except (msgspec.MsgspecError, RecursionError):
                continue

    def append(self, line: Line) -> None:
        """Write a line. Raises ConfigError if it cannot be written, such as on a full disk."""
        data = b"\n" * self._cut_off + msgspec.json.encode(line) + b"\n"
        with writing(self._path):
            if self._path.is_symlink():
                raise OSError(ELOOP, "it is a link; delete it, or choose another folder")
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINKS
            descriptor = os.open(self._path, flags, 0o666)
            try:
                self._cut_off = True  # until the line is there as a whole
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
                self._cut_off = False
            finally:
                os.close(descriptor)
        self.lines.append(line)

"""The record of a folder of results, by which an interrupted command goes on.

Every result has a line of JSON: what was edited and how, and the sha256 of the file. A result is
found again by a key, which is a digest of everything that it depends on: what the pictures hold,
the instructions, the settings, the bundle. So it is never taken for that of another edit, and a
file that was changed since is no result any more.

A line is written before its file. A process that is killed in between leaves a line without a
file, which counts for nothing.
"""

import hashlib
import json
import os
from collections.abc import Container, Mapping
from contextlib import suppress
from errno import ELOOP, ENOSPC
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import msgspec

from varedit_runtime.bundle import file_digest
from varedit_runtime.commands.orders import Order
from varedit_runtime.errors import ConfigError
from varedit_runtime.files import writing
from varedit_runtime.pictures import FileContent

RECORD = "varedit-run.jsonl"

_LONGEST_LINE = 2**20  # bytes
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # not even one that appears meanwhile


class Finished(msgspec.Struct):
    """What a line says about a result. output: its name in the folder. key: see `key_of`."""

    output: str
    key: str
    sha256: str
    seed: int


def key_of(
    order: Order, image: FileContent, mask: FileContent | None, settings: Mapping[str, Any]
) -> str:
    """Return a digest of what the result of an order depends on.

    image, mask: what is edited, as it was read. settings: what is the same for all orders of the
    command. The name of the picture counts, but not its folder, so that pictures and results may be
    moved.
    """
    told = {
        "image": [image.path.name, hashlib.sha256(image.content).hexdigest()],
        "instruction": order.instruction,
        "negative_prompt": order.negative_prompt,
        "mask": mask and hashlib.sha256(mask.content).hexdigest(),
        "seed": order.seed,
        **settings,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Record:
    """The record of the results in a folder."""

    def __init__(self, folder: Path) -> None:
        """Read the record that the folder has. Raises ConfigError if it cannot be read."""
        self.folder, self._path = folder, folder / RECORD
        self._finished: dict[str, list[Finished]] = {}
        self._cut_off = False
        try:
            self._read()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error

    def _read(self) -> None:
        with BufferedReader(FileIO(self._path, "rb", opener=_itself)) as file:
            while line := file.readline(_LONGEST_LINE):
                self._cut_off = not line.endswith(b"\n")
                try:
                    # msgspec's own reader refuses names that are no text.
                    found = msgspec.convert(json.loads(line), Finished)
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    continue  # a line that was cut off
                if found.output == Path(found.output).name:
                    self._finished.setdefault(found.key, []).append(found)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all results that it tells of, whether their files are still there or not."""
        return frozenset(self._finished)

    def take(self, key: str, taken: Container[str] = ()) -> Finished | None:
        """Return a result with a key whose file is as it was written, once for each result.

        taken: names of results that are of other edits. A line without a file may name one of them.
        """
        for number, found in enumerate(candidates := self._finished.get(key, [])):
            if found.output in taken:
                continue
            path = self._path.parent / found.output
            with suppress(OSError):
                if path.is_file() and file_digest(path) == found.sha256:
                    return candidates.pop(number)
        return None

    def add(self, content: bytes, **told: object) -> None:
        """Write a line about a file that is about to be written. Raises ConfigError."""
        line = json.dumps({**told, "sha256": hashlib.sha256(content).hexdigest()}) + "\n"
        data = b"\n" * self._cut_off + line.encode()
        with writing(self._path):
            # Without a buffer, so that a line is written at once: others may write to it too.
            with FileIO(self._path, "ab", opener=_itself) as file:
                self._cut_off = file.write(data) < len(data)
            if self._cut_off:
                raise OSError(ENOSPC, os.strerror(ENOSPC))


def _itself(path: str, flags: int) -> int:
    """Open a file, and not one elsewhere that somebody has planted a link to."""
    if os.path.islink(path):
        raise OSError(ELOOP, "it is a link; delete it, or choose another folder")
    return os.open(path, flags | _NO_LINKS, 0o666)

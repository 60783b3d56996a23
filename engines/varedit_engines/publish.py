"""Publishing a folder with a manifest whole or not at all.

Beside a bundle NAME, hidden:

    .NAME.lock                   held by the one that builds
    .NAME.partial/folder/        the bundle to be
    .NAME.partial/journal.json   the files in it that are finished, kept when a build is resumed
    .NAME.partial/previous/      the bundle that NAME was, from when it is replaced until deleted
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec
from filelock import FileLock, Timeout

from varedit_runtime.bundle import (
    Bundle,
    file_digest,
    work_folder,
)
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import FileEntry

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Finished(msgspec.Struct, frozen=True):
    """A journal's line. key: stands for everything that the file was made from."""

    key: str
    entry: FileEntry


class Staging:
    """A bundle being built. A context: published inside it, or left for the next build to resume.

        with Staging(target) as staging:
            if not staging.kept(name, key):
                write(staging.file(name))
                staging.record(name, key)
            staging.publish(Manifest(..., files=staging.files))

    target: the folder that the bundle will be. wait: for another builder of it to end.
    check: opens the finished folder just before it is published, raising BundleError.

    Raises BundleError when another process builds the same target, when target is something else
    than a bundle, and, also for what is written by others inside the context, when the disk is
    full. An earlier bundle stays as it is until the new one takes its place.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        wait: bool = False,
        check: Callable[[Path], object] = Bundle.open,
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.path = work_folder(self.target) / "folder"
        self.files: dict[str, FileEntry] = {}
        self._check = check
        self._lock = FileLock(self.target.with_name(f".{self.target.name}.lock"))
        self._timeout = -1 if wait else 0

    def __enter__(self) -> "Staging":
        with _writable(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=self._timeout)
            except Timeout as error:
                raise BundleError(
                    f"{self.target} is being built by another process; wait for it to end"
                ) from error
            try:
                self._recover()
                self._refuse_other_folders()
                self.path.mkdir(parents=True, exist_ok=True)
                self._journal = self._read_journal()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _no_space(self.target) from error

    def file(self, name: str) -> Path:
        """Where to write a file of the bundle. name: its path in the bundle, with forward slashes."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def kept(self, name: str, key: str) -> FileEntry | None:
        """The file as an earlier build finished it from the same key, whole; else it is deleted."""
        finished = self._journal.get(name)
        path = self.file(name)
        if finished and finished.key == key and path.is_file():
            if file_digest(path) == finished.entry.sha256:
                self.files[name] = finished.entry
                return finished.entry
        path.unlink(missing_ok=True)
        return None

    def record(self, name: str, key: str | None = None) -> FileEntry:
        """Take a finished file into the bundle. Without a key it is made again on resuming."""
        path = self.file(name)
        with _writable(path):
            _flush(path)
            entry = FileEntry(file_digest(path), path.stat().st_size)
        self.files[name] = entry
        if key is not None:
            self._journal[name] = _Finished(key, entry)
            self._write_journal()
        return entry

    def publish(self, manifest: msgspec.Struct) -> str:
        """Make the folder what the manifest says, and rename it to its place. -> its digest

        Raises BundleError, publishing nothing, when the manifest is not valid, lists other files
        than were recorded, or when the disk is full.
        """
        with _writable(self.target):
            self._delete_unlisted()
            digest = self._write_manifest(manifest)
            for folder, _, _ in os.walk(self.path):
                _flush(Path(folder))
            self._check(self.path)
            self._refuse_other_folders()
            self._swap()
        return digest

"""Publish a folder with a manifest atomically: it appears complete, or not at all.

A build writes beside its target NAME, in hidden places, and renames at the end:

    .NAME.lock                   held by the process that builds; an empty file, which stays
    .NAME.partial/folder/        the new bundle
    .NAME.partial/journal.json   its finished files, which a resumed build does not make again
    .NAME.partial/previous/      the replaced bundle, until it is deleted

Two renames replace a bundle: NAME to previous, folder to NAME. A process killed between them leaves
no NAME; readers then use previous (`bundle.standing_folder`), and the next build puts it back.

The lock's file is not deleted: a process that waits for it would then lock a file that nobody else
sees, and on network file systems it cannot tell.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from varedit_runtime.backends.engines.engine_set import EngineSets, sets_in
from varedit_runtime.bundle import Bundle, digest_line, file_digest, set_aside, work_folder
from varedit_runtime.errors import BundleError, shown
from varedit_runtime.files import atomic_file
from varedit_runtime.manifest import (
    DIGEST,
    ENGINES,
    MANIFEST,
    FileEntry,
    FolderManifest,
    canonical_json,
)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Finished(msgspec.Struct, frozen=True):
    """A journal's entry. key: a digest of everything that the file was made from."""

    key: str
    entry: FileEntry


class _Listing(msgspec.Struct):
    """What a manifest of any version says of its folder's files."""

    files: dict[str, Any]


class Staging:
    """A bundle being built: a context in which it is published, or kept for a build that resumes.

        with Staging(target) as staging:
            if not staging.kept(name, key):
                write(staging.file(name))
                staging.record(name, key)
            staging.publish(Manifest(..., files=staging.files))

    target: the bundle's folder. wait: wait for another process that builds it, instead of raising.
    check: called with the finished folder before it is published; raises BundleError on a fault.
    journal: the file that lists finished files; by default in the work folder.

    An earlier bundle stays until the new one replaces it; engine sets of it that share a graph
    with the new one move there. Raises BundleError if another process builds the same target, if
    target exists and is not a bundle, or if the disk is full (whatever in the context filled it).
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        wait: bool = False,
        check: Callable[[Path], object] = Bundle.open,
        journal: Path | None = None,
    ) -> None:
        try:
            self.target = Path(os.path.realpath(target))
        except ValueError as error:  # such as a NUL in it
            raise BundleError(f"{shown(str(target))} cannot be written: {error}") from error
        self.path = work_folder(self.target) / "folder"
        self.files: dict[str, FileEntry] = {}
        self._check = check
        self._journal_path = journal or work_folder(self.target) / "journal.json"
        lock = self.target.parent / f".{self.target.name}.lock"
        self._lock = FileLock(lock, timeout=-1 if wait else 0)

    def __enter__(self) -> "Staging":
        with _writable(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._prepare()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._lock.release()
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _no_space(self.target) from error

    def file(self, name: str) -> Path:
        """Return where to write a file. name: its path in the bundle, with forward slashes."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def kept(self, name: str, key: str) -> bool:
        """Keep a file that an earlier build finished with the same key; delete any other.

        Return whether it was kept, and need not be written. A key: see `record`.
        """
        finished = self._journal.get(name)
        path = self.file(name)
        if (
            finished
            and finished.key == key
            and path.is_file()
            and file_digest(path) == finished.entry.sha256
        ):
            self.files[name] = finished.entry
            return True
        path.unlink(missing_ok=True)
        return False

    def record(self, name: str, key: str | None = None) -> None:
        """Add a finished file to the bundle.

        key: a digest of what it was made from; without one, a resumed build makes it again.
        """
        path = self.file(name)
        with _writable(path):
            entry = FileEntry(file_digest(path), path.stat().st_size)
        self.files[name] = entry
        if key is not None:
            self._journal[name] = _Finished(key, entry)
            self._write_journal()

    def publish(self, manifest: FolderManifest) -> str:
        """Write the manifest, check the folder and rename it to its place; return its digest.

        Raises BundleError, and publishes nothing, if the manifest is not valid or does not list
        exactly the recorded files, or if the disk is full.
        """
        with _writable(self.target):
            self._compare_files(manifest.files)
            self._delete_unlisted()
            digest = self._write_manifest(manifest)
            self._check(self.path)
            for path in (self.path, *self.path.rglob("*")):
                _flush(path)
            self._refuse_other_folders()
            self._swap()
        return digest

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise BundleError(
                f"{self.target} is being built by another process: wait for it to end"
            ) from error

    def _prepare(self) -> None:
        self._refuse_other_folders()
        self._refuse_links()
        self._recover()
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = self._read_journal()

    def _recover(self) -> None:
        """Finish an interrupted replacement: put the earlier bundle back, or delete it if replaced.

        Before that, its engine sets that share a graph with the new bundle move there.
        """
        previous = set_aside(self.target)
        whole = (previous / MANIFEST).exists()
        if whole and not self.target.exists():
            previous.rename(self.target)
        elif previous.exists():
            if whole:
                _move_engines(previous, self.target)
            # The manifest first: an interrupted deletion must not leave what looks like a bundle.
            (previous / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(previous, ignore_errors=True)

    def _refuse_other_folders(self) -> None:
        try:
            names = os.listdir(self.target)
        except FileNotFoundError:
            return
        if names and not {MANIFEST, DIGEST} <= set(names):
            raise BundleError(
                f"{self.target} exists and is not a bundle, so it is not replaced: "
                "choose another folder"
            )
        if names and (others := _unlisted(self.target)):
            raise BundleError(
                f"{others[0]} is no file of the bundle in {self.target}, which replacing it would "
                "delete: move it, or choose another folder"
            )

    def _refuse_links(self) -> None:
        """Refuse symlinks: one planted here would make us write outside the build folder."""
        work = work_folder(self.target)
        if links := list(filter(Path.is_symlink, (work, *work.rglob("*")))):
            raise BundleError(f"{links[0]} is a link, which a build never makes: delete it")

    def _compare_files(self, listed: Mapping[str, FileEntry]) -> None:
        different = {name for name, _ in listed.items() ^ self.files.items()}
        if different:
            raise BundleError(
                f"the manifest of {self.target} does not list what was recorded: "
                f"{', '.join(sorted(different))}"
            )

    def _delete_unlisted(self) -> None:
        """Delete files that an interrupted build of another bundle left in the folder."""
        for path in sorted(self.path.rglob("*"), reverse=True):  # a folder after what is in it
            if path.is_dir():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif path.relative_to(self.path).as_posix() not in self.files:
                path.unlink()

    def _write_manifest(self, manifest: FolderManifest) -> str:
        data = canonical_json(manifest)
        digest = hashlib.sha256(data).hexdigest()
        (self.path / MANIFEST).write_bytes(data)
        (self.path / DIGEST).write_bytes(digest_line(digest))
        return digest

    def _swap(self) -> None:
        try:
            if self.target.exists():
                self.target.rename(set_aside(self.target))
            self.path.rename(self.target)
            _flush(self.target.parent)
        finally:
            self._recover()
        shutil.rmtree(work_folder(self.target), ignore_errors=True)
        self._journal_path.unlink(missing_ok=True)

    def _read_journal(self) -> dict[str, _Finished]:
        try:
            return msgspec.json.decode(self._journal_path.read_bytes(), type=dict[str, _Finished])
        except (OSError, ValueError):  # none, or cut short: then all is made again
            return {}

    def _write_journal(self) -> None:
        self._journal_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._journal_path) as whole:
            whole.write_bytes(msgspec.json.encode(self._journal))


def _unlisted(bundle: Path) -> list[Path]:
    """Return the files in a bundle that are not its own: neither listed nor of engine sets."""
    try:
        listed = msgspec.json.decode((bundle / MANIFEST).read_bytes(), type=_Listing).files
    except (OSError, ValueError):  # a damaged bundle is replaced, as errors advise
        return []
    own = {bundle / name for name in (MANIFEST, DIGEST, *listed)}
    others = (path for path in bundle.rglob("*") if path not in own and not path.is_dir())
    return sorted(path for path in others if bundle / ENGINES not in path.parents)


def _move_engines(previous: Path, target: Path) -> None:
    """Move the engine sets that share a graph with the new bundle; those that cannot are lost."""
    with suppress(BundleError, OSError):
        folders = sets_in(previous / ENGINES)
        kept = list(filter(EngineSets(Bundle.open(target)).shares, folders)) if folders else []
        for folder in kept:
            (target / ENGINES).mkdir(exist_ok=True)
            with suppress(OSError):  # the new bundle has that set already
                folder.rename(target / ENGINES / folder.name)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk (fsync)."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(path) from error
        raise BundleError(f"{path} cannot be written: {error.strerror}") from error


def _no_space(path: Path) -> BundleError:
    return BundleError(
        f"{path} cannot be written: no space is left; free some and run the command again: "
        "finished files are kept"
    )

"""Publishing a folder with a manifest whole or not at all.

Beside a bundle NAME, hidden:

    .NAME.lock                   held by the one that builds
    .NAME.partial/folder/        the bundle to be
    .NAME.partial/journal.json   the files in it that are finished, kept when a build is resumed
    .NAME.partial/previous/      the bundle that NAME was, from when it is replaced until deleted
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import msgspec
from filelock import FileLock, Timeout

from varedit_runtime.backends.engines.engine_set import EngineSets, sets_in
from varedit_runtime.bundle import Bundle, digest_line, file_digest, set_aside, work_folder
from varedit_runtime.errors import BundleError
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
    journal: where to note which files are finished; by default beside them.

    Raises BundleError when another process builds the same target, when target is something else
    than a bundle, and, also for what is written by others inside the context, when the disk is
    full. An earlier bundle stays as it is until the new one takes its place, and takes over those
    of its engine sets that share a graph with it.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        wait: bool = False,
        check: Callable[[Path], object] = Bundle.open,
        journal: Path | None = None,
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.path = work_folder(self.target) / "folder"
        self.files: dict[str, FileEntry] = {}
        self._check = check
        self._journal_path = journal or work_folder(self.target) / "journal.json"
        self._lock = FileLock(self.target.parent / f".{self.target.name}.lock")
        self._timeout = -1 if wait else 0

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
        """Where to write a file. name: its path in the bundle, with forward slashes."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def kept(self, name: str, key: str) -> FileEntry | None:
        """The file as an earlier build finished it from the same key, whole; else it is deleted."""
        finished = self._journal.get(name)
        path = self.file(name)
        if (
            finished
            and finished.key == key
            and path.is_file()
            and file_digest(path) == finished.entry.sha256
        ):
            self.files[name] = finished.entry
            return finished.entry
        path.unlink(missing_ok=True)
        return None

    def record(self, name: str, key: str | None = None) -> FileEntry:
        """Take a finished file into the bundle. Without a key it is made again on resuming."""
        path = self.file(name)
        with _writable(path):
            entry = FileEntry(file_digest(path), path.stat().st_size)
        self.files[name] = entry
        if key is not None:
            self._journal[name] = _Finished(key, entry)
            self._write_journal()
        return entry

    def publish(self, manifest: FolderManifest) -> str:
        """Make the folder what the manifest says, and rename it to its place. -> its digest

        Raises BundleError, publishing nothing, when the manifest is not valid, lists other files
        than were recorded, or when the disk is full.
        """
        with _writable(self.target):
            self._compare_files(manifest.files)
            self._delete_unlisted()
            digest = self._write_manifest(manifest)
            self._check(self.path)
            self._flush_all()
            self._refuse_other_folders()
            self._swap()
        return digest

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=self._timeout)
        except Timeout as error:
            raise BundleError(
                f"{self.target} is being built by another process; wait for it to end"
            ) from error

    def _prepare(self) -> None:
        self._refuse_other_folders()
        self._refuse_links()
        self._recover()
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = self._read_journal()

    def _recover(self) -> None:
        """Put the earlier bundle back where it was or, when the newer is in its place, delete it.

        Its engine sets that share a graph with the newer bundle are kept: they move there.
        """
        previous = set_aside(self.target)
        whole = (previous / MANIFEST).exists()
        if whole and not self.target.exists():
            previous.rename(self.target)
        elif previous.exists():
            if whole:  # and so what engine sets are left in it
                _move_engines(previous, self.target)
            # First what makes it a bundle: it must not be put back with half of its files.
            (previous / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(previous, ignore_errors=True)

    def _refuse_other_folders(self) -> None:
        try:
            names = os.listdir(self.target)
        except FileNotFoundError:
            return
        if names and not {MANIFEST, DIGEST} <= set(names):
            raise BundleError(
                f"{self.target} exists and is not a bundle, so it is not replaced; "
                "choose another folder"
            )

    def _refuse_links(self) -> None:
        """Which whoever made a folder elsewhere may have put there, to be written through."""
        work, links = work_folder(self.target), []
        if work.is_symlink():
            links.append(work)
        for folder, folders, files in os.walk(work):
            links += filter(os.path.islink, (Path(folder, name) for name in (*folders, *files)))
        if links:
            raise BundleError(f"{links[0]} is a link, and a build makes none: delete it")

    def _compare_files(self, listed: Mapping[str, FileEntry]) -> None:
        different = {name for name, _ in listed.items() ^ self.files.items()}
        if different:
            raise BundleError(
                f"the manifest of {self.target} does not list what was recorded: "
                f"{', '.join(sorted(different))}"
            )

    def _delete_unlisted(self) -> None:
        """What another manifest's build, cut short, left in the folder."""
        for folder, folders, files in os.walk(self.path, topdown=False):
            for file in files:
                path = Path(folder, file)
                if path.relative_to(self.path).as_posix() not in self.files:
                    path.unlink()
            for name in folders:
                with suppress(OSError):  # not empty
                    os.rmdir(Path(folder, name))

    def _write_manifest(self, manifest: FolderManifest) -> str:
        data = canonical_json(manifest)
        digest = hashlib.sha256(data).hexdigest()
        (self.path / MANIFEST).write_bytes(data)
        (self.path / DIGEST).write_bytes(digest_line(digest))
        return digest

    def _flush_all(self) -> None:
        for folder, _, files in os.walk(self.path):
            for file in files:
                _flush(Path(folder, file))
            _flush(Path(folder))

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
        except (
            OSError,
            msgspec.MsgspecError,
            ValueError,
        ):  # none, or cut short: then all is made again
            return {}

    def _write_journal(self) -> None:
        self._journal_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._journal_path) as whole:
            whole.write_bytes(msgspec.json.encode(self._journal))


def _move_engines(previous: Path, target: Path) -> None:
    """The sets that share a graph with the newer bundle. One that cannot move is lost."""
    with suppress(BundleError, OSError):
        folders = sets_in(previous / ENGINES)
        kept = list(filter(EngineSets(Bundle.open(target)).shares, folders)) if folders else []
        for folder in kept:
            (target / ENGINES).mkdir(exist_ok=True)
            with suppress(OSError):  # it has that one
                folder.rename(target / ENGINES / folder.name)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # where a folder cannot be opened
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
        f"{path} cannot be written: no space is left; free some and run it again, "
        "which keeps what is finished"
    )

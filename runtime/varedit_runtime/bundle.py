"""Opening a bundle: a folder with a manifest, and the digests of all its files.

The manifest is checked when a bundle is opened, and so are the sizes of all files; graphs and the
tokenizer are hashed when they are read, weights when they are asked to be. Digests find damage;
against malice, pin the bundle's own digest, which vouches for everything else.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import (
    DIGEST,
    GRAPHS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TOKENIZER,
    WEIGHTS,
    AnyManifest,
    FileEntry,
    Manifest,
    decode_manifest,
    weights_file,
)

Progress = Callable[[int, int], None]  # bytes done, bytes in all

CHUNK = 2**18


@dataclass(frozen=True)
class Folder:
    """Files of known size and digest below a folder, reached through no links."""

    path: Path
    files: Mapping[str, FileEntry]

    def check_sizes(self) -> None:
        for name in self.files:
            self.locate(name)

    def locate(self, name: str) -> Path:
        """Where a listed file is; its size has been checked, its digest has not."""
        if name not in self.files:
            raise BundleError(f"{self.path} has no {name}")
        path = regular_file(self.path, name)
        with readable(path):
            size = path.stat().st_size
        expected = self.files[name].size
        if size != expected:
            raise BundleError(
                f"{path} is damaged: it has {size} bytes instead of {expected}; "
                "copy or build the folder again"
            )
        return path

    def read(self, name: str) -> bytes:
        """A file's content: exactly the bytes that were hashed and found right."""
        path = self.locate(name)
        data = read_at_most(path, self.files[name].size)
        self._compare(path, name, hashlib.sha256(data).hexdigest())
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content, read once. Raises BundleError behind the last of it if it is damaged.

        So what is made of it is to be handed on at the end only.
        """
        path, left, digest = self.locate(name), self.files[name].size, hashlib.sha256()
        with readable(path), path.open("rb") as file:
            while chunk := file.read(min(CHUNK, left + 1)):  # one more: it must not have grown
                left -= len(chunk)
                digest.update(chunk)
                yield chunk
        self._compare(path, name, digest.hexdigest())

    def verify(self, name: str, advance: Callable[[int], None]) -> None:
        """Hash a file in pieces. advance is called with the number of bytes in each."""
        for chunk in self.chunks(name):
            advance(len(chunk))

    def _compare(self, path: Path, name: str, digest: str) -> None:
        if digest != self.files[name].sha256:
            raise BundleError(
                f"{path} is damaged, or was replaced after the bundle was opened: its sha256 is "
                f"{digest} instead of {self.files[name].sha256}; copy or build the folder again"
            )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. digest: of its manifest, which has the digests of everything else."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: str | os.PathLike[str], digest: str | None = None) -> "Bundle":
        """Open a folder, checking the manifest and the sizes of all files.

        digest: the bundle's own, from where it was published; then it can be no other bundle.
        Raises BundleError when it is another, is damaged or incomplete, or is not a bundle.
        """
        place = Path(os.path.realpath(path))
        while True:
            folder = standing(place)
            before = _identity(folder)
            try:
                return cls._open(folder, digest)
            except BundleError:
                # A newer bundle may have taken the folder's place while it was read.
                if _identity(standing(place)) == before:
                    raise

    @classmethod
    def _open(cls, path: Path, digest: str | None) -> "Bundle":
        if not os.path.exists(path):
            raise BundleError(
                f"there is no bundle at {path}: build one with `varedit-export build`, or name "
                "another"
            )
        manifest, digest = open_manifest(path, Manifest, digest)
        bundle = cls(path, manifest, digest)
        bundle._folder.check_sizes()
        return bundle

    @property
    def _folder(self) -> Folder:
        return Folder(self.path, self.manifest.files)

    def graph_bytes(self, variant: str, stage: str) -> bytes:
        """A graph's ONNX file, hashed in full. It names its weights relative to `graphs_folder`."""
        return self._folder.read(self.manifest.variant(variant).graph(stage).file)

    def tokenizer_json(self) -> bytes:
        """The text tokenizer, hashed in full; a bundle that starts at text features has none."""
        return self._folder.read(TOKENIZER)

    @property
    def graphs_folder(self) -> Path:
        """Where the graphs' names of weights files start."""
        return self.path / GRAPHS

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the model that have a file of weights each."""
        stems = [Path(name).stem for name in self.manifest.files if name.startswith(f"{WEIGHTS}/")]
        return tuple(stem for stem in stems if weights_file(stem) in self.manifest.files)

    def weights_path(self, component: str) -> Path:
        """A component's safetensors file, of the right size; `verify_weights` hashes it."""
        return self._folder.locate(weights_file(component))

    def verify_weights(self, progress: Progress | None = None) -> None:
        """Hash all weights. Raises BundleError on damage."""
        names = [weights_file(component) for component in self.components]
        total = sum(self.manifest.files[name].size for name in names)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        for name in names:
            self._folder.verify(name, advance)


def work_folder(target: Path) -> Path:
    """Where a bundle is built, beside its place, until it is whole."""
    return target.parent / f".{target.name}.partial"


def set_aside(target: Path) -> Path:
    """Where the earlier bundle is from the moment it is replaced until it is deleted."""
    return work_folder(target) / "previous"


def standing(path: Path) -> Path:
    """Where a bundle is: its folder or, when replacing it was cut short, where that left it."""
    aside = set_aside(path)
    return aside if not os.path.exists(path) and os.path.exists(aside / MANIFEST) else path


def _identity(path: Path) -> tuple[Path, int, int] | None:
    """Of what is at a path now: another folder, or the same one elsewhere, is not the same.

    A folder's number alone is not enough: a deleted one's is soon given to another.
    """
    with suppress(OSError):
        found = path.stat()
        return path, found.st_ino, found.st_ctime_ns


def open_manifest(
    path: Path, kind: type[AnyManifest], digest: str | None = None
) -> tuple[AnyManifest, str]:
    """A folder's manifest and its digest, compared with the one kept beside it and the one given.

    Raises BundleError, naming the folder, when they differ or it is no such manifest.
    """
    with readable(path):
        names = {entry.name for entry in path.iterdir()}
    if MANIFEST not in names:
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST}; build one, or name another"
        )
    data = read_at_most(regular_file(path, MANIFEST), MAX_MANIFEST_BYTES)
    found = hashlib.sha256(data).hexdigest()
    beside = read_at_most(regular_file(path, DIGEST), len(digest_line(found)))
    if beside != digest_line(found):
        raise BundleError(
            f"{path / MANIFEST} is damaged: its sha256 is not the one in {DIGEST}; "
            "copy or build the folder again"
        )
    if digest not in (None, found):
        raise BundleError(f"{path} is not the one asked for: its digest is {found}, not {digest!r}")
    try:
        return decode_manifest(data, kind), found
    except BundleError as error:
        raise BundleError(f"{path / MANIFEST}: {error}") from error


def digest_line(digest: str) -> bytes:
    """manifest.sha256, as `sha256sum --check` reads it."""
    return f"{digest}  {MANIFEST}\n".encode()


def regular_file(folder: Path, name: str) -> Path:
    """The file of this name. Raises BundleError when it, or a folder on the way, is a link."""
    path = folder / name
    with readable(path):
        for part in (path, *path.parents):
            if part == folder:
                break
            if part.is_symlink():
                raise BundleError(f"{part} is a link, and a bundle has none: copy what it links to")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path} is not a file; copy or build the folder again")
    return path


def read_at_most(path: Path, size: int) -> bytes:
    """All of a file. Raises BundleError when it is larger, reading no more than that."""
    with readable(path), path.open("rb") as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise BundleError(f"{path} is too large: at most {size} bytes were expected")
    return data


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with readable(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error

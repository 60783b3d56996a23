"""Open a bundle: a folder with a manifest, which lists the digests of all its files.

Opening checks the manifest and the sizes of all files. Graphs and the tokenizer are hashed when
they are read; weights, which take seconds per gigabyte, only on request. Digests find damage.
Against tampering, give the bundle's own digest: it covers the manifest, and so all files.

Another bundle may be published in the folder's place at any time. So an opened bundle holds its
weights files open and reads no others. Libraries that open weights by their path may have read the
newer bundle's: whoever uses one asks `Bundle.stands` afterwards.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from varedit_runtime.errors import BundleError, VareditError, shown
from varedit_runtime.files import HeldFile
from varedit_runtime.manifest import (
    DIGEST,
    GRAPHS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TOKENIZER,
    AnyManifest,
    FileEntry,
    Manifest,
    decode_manifest,
    weights_file,
)
from varedit_runtime.values import AnyPath, checked

CHUNK = 2**18
MAX_READ_BYTES = 2**25  # of a graph or a tokenizer; those of the models take a few megabytes
ATTEMPTS = 100  # at a folder that is replaced while it is opened


@dataclass(frozen=True)
class Folder:
    """Files of known size and digest below a folder. Links are refused: they may lead anywhere.

    held: those that are read from open files, whatever lies at their paths by now.
    """

    path: Path
    files: Mapping[str, FileEntry]
    held: Mapping[str, HeldFile] = field(default_factory=dict)

    def check_sizes(self) -> None:
        """Raise BundleError if a file is missing, is a link, or has another size."""
        for name in self.files:
            self.locate(name)

    def locate(self, name: str) -> Path:
        """Return a listed file's path, after checking its size but not its digest."""
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
        """Return a file's content: exactly the bytes whose digest was checked."""
        path = self.locate(name)
        if self.files[name].size > MAX_READ_BYTES:
            raise BundleError(f"{path} is too large: at most {MAX_READ_BYTES} bytes were expected")
        data = read_at_most(path, self.files[name].size)
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def hold(self, name: str) -> HeldFile:
        """Open a listed file, after checking its size but not its digest."""
        if name in self.held:
            return self.held[name]
        with readable(path := self.locate(name)):
            return HeldFile(path)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content, reading it once; raise BundleError at the end if it is damaged.

        Do not use what is made from the chunks before that.
        """
        file, size, digest = self.hold(name), self.files[name].size, hashlib.sha256()
        done = 0
        with readable(file.path):
            # One byte more than expected: it must not have grown.
            while chunk := file.read(min(CHUNK, size + 1 - done), done):
                done += len(chunk)
                digest.update(chunk)
                yield chunk
        self._compare(name, digest.hexdigest())

    def verify(self, name: str) -> None:
        """Hash a file in pieces. Raises BundleError if it is damaged."""
        for _ in self.chunks(name):
            pass

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.files[name].sha256:
            raise BundleError(
                f"{self.path / name} is damaged, or was replaced after the bundle was opened: its "
                f"sha256 is {digest} instead of {self.files[name].sha256}; copy or build the "
                "folder again"
            )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. digest: sha256 of its manifest, which lists those of all other files.

    held: its manifest and weights files, open.
    """

    path: Path
    manifest: Manifest = field(repr=False)  # which fills pages
    digest: str
    held: Mapping[str, HeldFile] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: AnyPath, digest: str | None = None) -> "Bundle":
        """Open a folder, checking the manifest and the sizes of all files.

        digest: the bundle's digest as its publisher states it; no other bundle is then accepted.
        Raises BundleError if it is another, is damaged or incomplete, is not a bundle, or is
        replaced at every attempt; ConfigError if the path or the digest is none.
        """
        place = Path(os.path.realpath(checked("bundle", path, AnyPath)))
        digest = checked("digest", digest, str | None)
        for _ in range(ATTEMPTS):
            folder = standing_folder(place)
            before = _identity(folder)
            try:
                bundle = cls._open(folder, digest)
            except BundleError:
                # A newer bundle may have taken the folder's place while it was read.
                if _identity(standing_folder(place)) == before:
                    raise
            else:
                if bundle.stands():
                    return bundle
        raise _always_replaced(place)

    @classmethod
    def _open(cls, path: Path, digest: str | None) -> "Bundle":
        if not os.path.exists(path):
            raise BundleError(
                f"there is no bundle at {path}: build one with `varedit-export build`, or name "
                "another; `varedit-run bundles` lists yours"
            )
        held = {MANIFEST: hold_manifest(path)}
        manifest, digest = read_manifest(held[MANIFEST], Manifest, digest)
        folder = Folder(path, manifest.files)
        folder.check_sizes()
        held |= {file: folder.hold(file) for file in manifest.files if _component(file)}
        return cls(path, manifest, digest, held)

    def stands(self) -> bool:
        """Return whether nothing has replaced the bundle, or its weights, since it was opened."""
        return all(file.stands() for file in self.held.values())

    def check_stands(self) -> None:
        """Raise BundleError if the bundle, or its weights, were replaced since it was opened."""
        if not self.stands():
            raise BundleError(f"{self.path} was replaced while it was used: run the command again")

    def check_text(self) -> None:
        """Raise BundleError if the bundle has no text encoder, and so takes no instructions."""
        if not self.manifest.takes_text:
            raise BundleError(
                f"{self.path} was built without a text encoder, and takes no instructions: build "
                "it with --text-encoder, or use another bundle (`varedit-run bundles` lists yours)"
            )

    @property
    def _folder(self) -> Folder:
        return Folder(self.path, self.manifest.files, self.held)

    def graph_bytes(self, variant: str, stage: str) -> bytes:
        """Return a graph's ONNX file, digest checked; it names weights from `graphs_folder`."""
        return self._folder.read(self.manifest.variant(variant).graph(stage).file)

    def tokenizer_json(self) -> bytes:
        """Return the text tokenizer, digest checked; bundles without a text encoder have none."""
        return self._folder.read(TOKENIZER)

    @property
    def graphs_folder(self) -> Path:
        """The folder that the graphs' names of weights files are relative to."""
        return self.path / GRAPHS

    @property
    def components(self) -> tuple[str, ...]:
        """The model's components; each has one weights file."""
        return tuple(filter(None, map(_component, self.manifest.files)))

    def hold(self, name: str) -> HeldFile:
        """Return a listed file, open: of weights, the one that was opened with the bundle."""
        return self._folder.hold(name)

    def weights_path(self, component: str) -> Path:
        """Return the path of a component's safetensors file; `verify` checks its digest."""
        return self._folder.locate(weights_file(component))

    def verify(self) -> None:
        """Hash all files that the manifest lists. Raises BundleError if one is damaged."""
        for file in self.manifest.files:
            self._folder.verify(file)


def _component(file: str) -> str | None:
    """Return the component whose weights a file of a bundle holds; None for other files."""
    name = Path(file).stem
    return name if weights_file(name) == file else None


Loaded = TypeVar("Loaded")


def load_standing(
    path: AnyPath,
    digest: str | None,
    load: Callable[[Bundle], Loaded],
    free: Callable[[Loaded], object] = lambda loaded: None,
) -> Loaded:
    """Open a bundle and load it; do both again if it was replaced meanwhile.

    Libraries open weights by their path, and may have read those of the bundle that came instead.
    digest: as for `Bundle.open`. free: frees what was loaded in vain. Raises what opening and
    loading raise, BundleError if the bundle is replaced at every attempt.
    """
    for _ in range(ATTEMPTS):
        bundle = Bundle.open(path, digest)
        try:
            loaded = load(bundle)
        except VareditError:
            if bundle.stands():
                raise
        else:
            if bundle.stands():
                return loaded
            free(loaded)
    raise _always_replaced(Path(path))


def _always_replaced(path: Path) -> BundleError:
    """Return the error of a bundle that was replaced at every attempt to open it."""
    return BundleError(f"{path} was replaced whenever it was opened: try again when it stays")


def work_folder(target: Path) -> Path:
    """Return the folder beside target where its new bundle is built until it is complete."""
    return target.parent / f".{target.name}.partial"


def set_aside(target: Path) -> Path:
    """Return where the replaced bundle is kept until it is deleted."""
    return work_folder(target) / "previous"


def standing_folder(path: Path) -> Path:
    """Return a bundle's folder or, if replacing it was interrupted, where the old one is kept."""
    aside = set_aside(path)
    return aside if not os.path.exists(path) and os.path.exists(aside / MANIFEST) else path


def _identity(path: Path) -> tuple[Path, int, int] | None:
    """Return what changes when another folder takes this path: the path, inode and change time.

    The inode alone is not enough: a deleted folder's number is soon reused.
    """
    with suppress(OSError):
        found = path.stat()
        return path, found.st_ino, found.st_ctime_ns


def open_manifest(
    path: Path, kind: type[AnyManifest], digest: str | None = None
) -> tuple[AnyManifest, str]:
    """Open a folder's manifest; return it with its digest. See `read_manifest`."""
    return read_manifest(hold_manifest(path), kind, digest)


def hold_manifest(path: Path) -> HeldFile:
    """Open the file of a folder's manifest. Raises BundleError if there is none."""
    with readable(path):
        names = {entry.name for entry in path.iterdir()}
    if MANIFEST not in names:
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST}; build one, or name another"
        )
    with readable(path / MANIFEST):
        return HeldFile(regular_file(path, MANIFEST))


def read_manifest(
    file: HeldFile, kind: type[AnyManifest], digest: str | None = None
) -> tuple[AnyManifest, str]:
    """Read a manifest; return it with its digest.

    The digest must equal the one in manifest.sha256 and the one given. Raises BundleError, naming
    the folder, if they differ or it holds no manifest of this kind.
    """
    path = file.path.parent
    with readable(file.path):
        data = file.read(MAX_MANIFEST_BYTES + 1)
    _refuse_longer(file.path, data, MAX_MANIFEST_BYTES)
    found = hashlib.sha256(data).hexdigest()
    line = digest_line(found)
    beside = read_at_most(regular_file(path, DIGEST), len(line) + 1)
    if beside.replace(b"\r\n", b"\n") != line:  # a copy through Windows may have changed it
        raise BundleError(
            f"{path / MANIFEST} is damaged: its sha256 is not the one in {DIGEST}; "
            "copy or build the folder again"
        )
    if digest not in (None, found):
        raise BundleError(
            f"{path} is not the one asked for: its digest is {found}, not {shown(digest)}"
        )
    try:
        return decode_manifest(data, kind), found
    except BundleError as error:
        raise BundleError(f"{path / MANIFEST}: {error}") from error


def digest_line(digest: str) -> bytes:
    """Return the content of manifest.sha256, as `sha256sum --check` reads it."""
    return f"{digest}  {MANIFEST}\n".encode()


def regular_file(folder: Path, name: str) -> Path:
    """Return a file's path. Raises BundleError if it, or a folder on the way, is a link."""
    path = folder / name
    with readable(path):
        for part in (path, *path.parents):
            if part == folder:
                break
            if part.is_symlink():
                raise BundleError(f"{part} is a link, which is refused: copy what it links to")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path} is not a file; copy or build the folder again")
    return path


def read_at_most(path: Path, size: int) -> bytes:
    """Read a whole file. Raises BundleError, without reading on, if it has more bytes than size."""
    with readable(path), path.open("rb") as file:
        data = file.read(size + 1)
    _refuse_longer(path, data, size)
    return data


def _refuse_longer(path: Path, data: bytes, size: int) -> None:
    if len(data) > size:
        raise BundleError(f"{path} is too large: at most {size} bytes were expected")


def file_digest(path: Path) -> str:
    """Return a file's sha256, reading it in pieces."""
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError into a BundleError that names the path."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error

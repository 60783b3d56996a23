"""Weights by name: files on the Hugging Face hub, fetched through its own library.

The library keeps every file that it fetched whole in its cache, continues a file whose connection
was cut, shows progress, and obeys HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE. Once a process
has ended, version 2.4 begins the file anew that it had not fetched whole. A download has
two steps, so that a person can be asked in between: `look_up` tells which files are needed and
which of them are missing, `fetch` brings them. Where the hub cannot be reached, the cache's files
are used.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from varedit_runtime.errors import CheckpointError, ConfigError, needs_extra, reason
from varedit_runtime.manifest import Bytes, Digest, HubOrigin, PrintableText

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")
_ADDRESS = re.compile(
    rf"{SCHEME}(?P<dataset>datasets/)?(?P<repository>{_NAME}/{_NAME})"
    r"(@(?P<before>[^@/]+))?(/(?P<path>[^@]*))?(@(?P<after>[^@]+))?"
)

Choice = Sequence[str]  # patterns of files, such as "*.safetensors"; the first one has to match


@dataclass(frozen=True)
class HubAddress:
    """A place on the hub: a repository, a path in it, and a branch, tag or commit.

    path: "" for the whole repository. revision: None for the main branch. dataset: whether it is a
    repository of data, not of a model.
    """

    repository: str
    path: str = ""
    revision: str | None = None
    dataset: bool = False

    @property
    def kind(self) -> str:
        """What the hub's library calls the kind of repository."""
        return "dataset" if self.dataset else "model"

    def __str__(self) -> str:
        """Return the text that `parse` reads as this address."""
        path = f"/{self.path}" if self.path else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{'datasets/' * self.dataset}{self.repository}{path}{revision}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    path: its path there. size: its bytes. cached: whether it is in the cache already. sha256: of
    its content, as the hub states it; None for a small file that git keeps.
    """

    path: str
    size: int
    cached: bool
    sha256: str | None


@dataclass(frozen=True)
class Wanted:
    """The files that an address stands for, at one commit.

    commit, licence, files: None and empty where the hub cannot be reached. licence: its name as the
    repository states it, or None.
    """

    address: HubAddress
    choices: Sequence[Choice]
    commit: str | None = None
    licence: str | None = None
    files: tuple[HubFile, ...] = ()

    @property
    def cached(self) -> bool:
        """Whether nothing has to be downloaded, or nothing can be."""
        return all(file.cached for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that have to be downloaded."""
        return sum(file.size for file in self.files if not file.cached)


def parse(text: str) -> HubAddress:
    """Return the address that hf://OWNER/REPOSITORY[/PATH][@REVISION] stands for.

    Data sets are at hf://datasets/OWNER/REPOSITORY. The library's own order,
    hf://OWNER/REPOSITORY@REVISION/PATH, is read too. Raises ConfigError for any other text.
    """
    match = _ADDRESS.fullmatch(text)
    path = "" if match is None else (match["path"] or "").strip("/")
    if match is None or (match["before"] and match["after"]) or {".", ".."} & {*path.split("/")}:
        raise ConfigError(
            f"{text!r} is no address on the hub: give hf://OWNER/REPOSITORY/PATH or, for another "
            "revision than main, hf://OWNER/REPOSITORY/PATH@REVISION"
        )
    revision = match["before"] or match["after"]
    return HubAddress(match["repository"], path, revision, match["dataset"] is not None)


def is_repository(text: str) -> bool:
    """Return whether a text has the form OWNER/REPOSITORY."""
    return _REPOSITORY.fullmatch(text) is not None


def cache() -> Path:
    """Return the folder of the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def list_files(address: HubAddress) -> list[str]:
    """Return the paths of all files of a repository, or those in the cache without a connection.

    Raises CheckpointError if the repository or the revision is not there or may not be read.
    """
    try:
        return sorted(sibling.rfilename for sibling in _information(address).siblings)
    except _UnreachableError:
        pass
    try:
        return files_in(_snapshot(address, [""]))  # no file has to be there
    except _UnreachableError as error:
        raise _absent(address) from error


def look_up(address: HubAddress, choices: Sequence[Choice]) -> Wanted:
    """Find the files of the first choice whose first pattern matches a file of the repository.

    Raises CheckpointError if the repository, the revision or such files are not there, or may not
    be read.
    """
    try:
        found = _information(address)
    except _UnreachableError:
        return Wanted(address, choices)
    from huggingface_hub import try_to_load_from_cache

    siblings = {sibling.rfilename: sibling for sibling in found.siblings}
    choice = next((choice for choice in choices if _matching(siblings, choice[:1])), None)
    if choice is None:
        raise CheckpointError(
            f"{address.repository} on the hub has no {' or '.join(c[0] for c in choices)}; it has "
            + ", ".join(sorted(siblings))
        )
    commit = found.sha
    files = tuple(
        HubFile(
            name,
            siblings[name].size,
            isinstance(
                try_to_load_from_cache(
                    address.repository, name, revision=commit, repo_type=address.kind
                ),
                str,
            ),
            None if (large := siblings[name].lfs) is None else large.sha256,
        )
        for name in _matching(siblings, choice)
    )
    return Wanted(address, (choice,), commit, _licence(found.tags), files)


def fetch(wanted: Wanted) -> tuple[Path, list[HubOrigin]]:
    """Download what the cache lacks; return the local file or folder, and where all came from.

    Raises CheckpointError if the download fails, a file is not the one that the hub has, or the hub
    cannot be reached and the cache lacks a file.
    """
    folder, choice = _download(wanted)
    stated = {file.path: file.sha256 for file in wanted.files}
    origins = []
    for name in sorted(_matching(files_in(folder), choice)):
        with open(folder / name, "rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
        if sha256 != (stated.get(name) or sha256):
            raise CheckpointError(
                f"{name} of {wanted.address.repository} is not the file that the hub has: delete "
                f"{(folder / name).resolve()} and download it again"
            )
        origins.append(HubOrigin(wanted.address.repository, folder.name, name, sha256))
    return folder / wanted.address.path, origins


class _Large(Struct):
    """What the hub says of a file that is no text."""

    sha256: Digest


class _Sibling(Struct):
    """A file in the hub's answer."""

    rfilename: PrintableText
    size: Bytes
    lfs: _Large | None = None


class _Information(Struct):
    """The hub's answer about a repository, as far as it is used; its library checks nothing."""

    sha: Annotated[str, Meta(pattern=r"\A[0-9a-f]{40}\Z")]  # the library names a folder by it
    siblings: list[_Sibling]
    tags: Any = None  # the licence is among them, where it is stated


def _information(address: HubAddress) -> _Information:
    """Ask the hub for a repository's commit, licence, and files with their sizes."""
    try:
        with _library_errors(address):
            from huggingface_hub import HfApi

            api = HfApi()
            ask = api.dataset_info if address.dataset else api.model_info
            found = ask(address.repository, revision=address.revision, files_metadata=True)
        return msgspec.convert(found, _Information, from_attributes=True)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"the hub's answer about {address.repository} is not as expected ({reason(error)})"
        ) from error


def _download(wanted: Wanted) -> tuple[Path, Choice]:
    """Return the repository's folder in the cache and the choice of files that it has."""
    address = wanted.address
    if wanted.commit is None:
        return _cached(address, wanted.choices)
    try:
        folders = {_download_file(address, file.path) for file in wanted.files}
    except _UnreachableError as error:
        raise _absent(address) from error
    if {folder.name for folder in folders} != {wanted.commit}:
        raise CheckpointError(f"{address} changed on the hub just now: try again")
    return folders.pop(), wanted.choices[0]


def _download_file(address: HubAddress, name: str) -> Path:
    """Download a file unless the cache has it; return its repository's folder there.

    In this thread: Ctrl-C could not end the library's own threads before their files are whole.
    """
    with _library_errors(address):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            address.repository, name, revision=address.revision, repo_type=address.kind
        )
    return Path(path).parents[name.count("/")]


def _cached(address: HubAddress, choices: Sequence[Choice]) -> tuple[Path, Choice]:
    """Return the folder in the cache that has files of a choice, and the choice."""
    unreachable = None
    for choice in choices:
        try:
            folder = _snapshot(address, choice)
        except _UnreachableError as error:
            unreachable = error
        else:
            if any(folder.glob(choice[0])):
                return folder, choice
    raise _absent(address) from unreachable


def _snapshot(address: HubAddress, patterns: Sequence[str]) -> Path:
    """Return a repository's folder in the cache, named by its commit."""
    with _library_errors(address):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            address.repository,
            revision=address.revision,
            repo_type=address.kind,
            allow_patterns=list(patterns),
            local_files_only=True,
        )
    return Path(folder)


def _absent(address: HubAddress) -> CheckpointError:
    return CheckpointError(
        f"cannot reach the hub for {address}, and its cache on this machine lacks it: check the "
        "connection and HF_HUB_OFFLINE and try again (files that were fetched whole are kept), or "
        "give paths on this machine in place of names on the hub"
    )


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, as of a repository that it is laid out as."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _matching(names: Iterable[str], patterns: Choice) -> list[str]:
    """Return the names that match a pattern, in the pattern's own folder alone."""
    return [
        name
        for name in names
        if any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)
    ]


def _licence(tags: Any) -> str | None:
    texts = (tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()
    marked = (tag.partition(":")[2] for tag in texts if tag.startswith("license:"))
    return next(marked, None)


class _UnreachableError(Exception):
    """The hub cannot be reached, or may not be asked."""


@contextmanager
def _library_errors(address: HubAddress) -> Iterator[None]:
    """Turn the library's errors into CheckpointError, or _UnreachableError without a connection."""
    with needs_extra("export"):
        from huggingface_hub import errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{address.repository} on the hub is for those who accepted its terms: accept them on "
            "its page, and set HF_TOKEN to your access token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {address.repository}, or you may not read it: check its "
            "name, and set HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{address.repository} on the hub has no revision {address.revision}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"the hub refused {address}: {reason(error)}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _UnreachableError from error
    except OSError as error:  # a full disk, a file that is not as long as it was told
        raise CheckpointError(f"cannot fetch {address}: {reason(error)}") from error
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
        # The HTTP client's own, whichever it is: there is no connection, or no more.
        raise _UnreachableError from error

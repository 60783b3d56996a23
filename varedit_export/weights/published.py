"""Find the weights of a build: files given by path or by name, and the published ones, as data.

A build takes a transformer, a picture tokenizer and a text encoder. Each is a path, or a name on
the Hugging Face hub. What a build is not given is looked for in the table below, in the repository
or folder that `--from` names. `find_weights` says where all are; `bring_weights` downloads those on
the hub after it has told what that takes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

from varedit_export.weights import hub
from varedit_export.weights.download import Download, Further, ask
from varedit_export.weights.hub import SCHEME, Choice, HubAddress
from varedit_export.weights.lora import FILES, SETTINGS
from varedit_export.weights.names import PUBLISHED, SUFFIX
from varedit_reference.text_encoder import BESIDE_WEIGHTS
from varedit_reference.weights_file import PICKLED
from varedit_runtime.errors import CheckpointError, ConfigError
from varedit_runtime.manifest import HubOrigin

TOKENIZERS = "FoundationVision/Infinity"  # has the picture tokenizers that a repository lacks
TEXT_ENCODER = "flan-t5-xl"  # folder of a repository
TEXT_ENCODERS = f"google/{TEXT_ENCODER}"  # has the text encoder that a repository lacks
WEIGHTS = (".safetensors", *PICKLED)


@dataclass(frozen=True)
class Places:
    """Places of a build's weights: paths, or addresses on the hub. None: not given."""

    transformer: str | None = None
    tokenizer: str | None = None
    text_encoder: str | None = None


@dataclass(frozen=True)
class Files:
    """The weights of a build on this machine.

    paths, adapters: in the order in which places were given. names: of paths. origins: of the files
    that came from the hub.
    """

    paths: Sequence[Path]
    adapters: Sequence[Path]
    names: Sequence[str]
    origins: tuple[HubOrigin, ...]


def find_weights(
    size: str, resolutions: Sequence[int], given: Places, source: str | None
) -> Places:
    """Add the published weights of a model to the places that are given.

    source: another repository, as OWNER/REPOSITORY or an address, or a folder, that has them in the
    same layout. Raises CheckpointError, with what is there, if it has no such transformer;
    ConfigError if there is one for each of several resolutions.
    """
    if given.transformer and given.tokenizer and given.text_encoder:
        return given
    table = PUBLISHED[size]
    shelf = _shelf(source or table.repository)
    transformer = given.transformer or shelf.at(_transformer(shelf, size, resolutions))
    tokenizer = given.tokenizer
    if tokenizer is None:
        inside = table.tokenizer in shelf.names
        tokenizer = (shelf if inside else _Shelf(HubAddress(TOKENIZERS))).at(table.tokenizer)
    text_encoder = given.text_encoder
    if text_encoder is None:
        inside = f"{TEXT_ENCODER}/{BESIDE_WEIGHTS[0]}" in shelf.names
        text_encoder = shelf.at(TEXT_ENCODER) if inside else f"{SCHEME}{TEXT_ENCODERS}"
    return Places(transformer, tokenizer, text_encoder)


@dataclass(frozen=True)
class _Shelf:
    """A repository, or a folder laid out as one, and the paths of its files."""

    root: HubAddress | Path
    names: Sequence[str] = ()

    def at(self, name: str) -> str:
        """Return the place of a file, as a path or an address."""
        if isinstance(self.root, Path):
            return str(self.root / name)
        return str(replace(self.root, path=f"{self.root.path}/{name}".strip("/")))


def _shelf(source: str) -> _Shelf:
    folder = Path(source)
    if folder.is_dir():
        return _Shelf(folder, hub.files_in(folder))
    if not (source.startswith(SCHEME) or hub.is_repository(source)):
        raise CheckpointError(f"there is no folder {source}, and no repository has such a name")
    address = hub.parse(SCHEME + source.removeprefix(SCHEME))
    return _Shelf(address, hub.list_files(address))


def _transformer(shelf: _Shelf, size: str, resolutions: Sequence[int]) -> str:
    """Return the file of a size's transformer: the table's, or one that is named for both."""
    if len(resolutions) > 1:
        raise ConfigError(
            "each resolution has a transformer of its own: build one bundle for each, or say with "
            "--checkpoint which one all resolutions take"
        )
    [resolution] = resolutions
    if (known := PUBLISHED[size].transformers.get(resolution)) in shelf.names:
        return str(known)
    found = [
        name
        for name in shelf.names
        if name.endswith(WEIGHTS)
        and (sized := re.search(rf"(?i)(?<![0-9a-z]){size}(?![0-9a-z])", name))
        and re.search(rf"(?<!\d){resolution}(?!\d)", name[sized.end() :])
    ]
    if len(found) != 1:
        problem = f"has {len(found)} files" if found else "has no transformer"
        raise CheckpointError(
            f"{shelf.root} {problem} for {size} at {resolution} px; it has "
            f"{', '.join(shelf.names) or 'no files'}: give --checkpoint, or another repository or "
            "folder with --from"
        )
    return found[0]


def bring_weights(
    places: Sequence[str],
    accept: Callable[[Download], None],
    adapters: Sequence[str] = (),
    further: Callable[[], Further | None] = lambda: None,
) -> Files:
    """Download the weights that are on the hub; return where all are on this machine.

    places: of the transformer, the picture tokenizer and, if there is one, the text encoder.
    adapters: places of LoRA adapters. accept: called before anything is downloaded, if anything has
    to be; it raises to refuse. further: called before that; returns what the weights will be made
    into. Raises CheckpointError if weights are not there, cannot be fetched, or the disk has no
    room for all.
    """
    kinds = (_weight_files, _weight_files, _text_encoder_files)
    asked = [*zip(places, kinds, strict=False), *((place, _adapter_files) for place in adapters)]
    addresses = [_address(place) for place, _ in asked]
    wanted = [
        address and hub.look_up(address, files(address.path))
        for address, (_, files) in zip(addresses, asked, strict=True)
    ]
    ask([one for one in wanted if one is not None], accept, further)
    paths: list[Path] = []
    origins: list[HubOrigin] = []
    for (place, _), one in zip(asked, wanted, strict=True):
        path, fetched = (Path(place), []) if one is None else hub.fetch(one)
        paths.append(path)
        origins += fetched
    count = len(places)
    return Files(paths[:count], paths[count:], tuple(map(_name, places)), tuple(origins))


def _address(place: str) -> HubAddress | None:
    """Return a place's address on the hub; OWNER/REPOSITORY is one if no such path exists.

    A name that ends as weights do is a path: a mistyped one is not looked for on the hub.
    """
    if place.startswith(SCHEME):
        return hub.parse(place)
    path = Path(place)
    if hub.is_repository(place) and path.suffix not in WEIGHTS and not path.exists():
        return HubAddress(place)
    return None


def _name(place: str) -> str:
    """Return what a place is called in a bundle."""
    address = _address(place)
    return Path(place if address is None else address.path or address.repository).name


def _weight_files(path: str) -> list[Choice]:
    """Return the choices of files for a checkpoint: itself, or a folder's shards of one format."""
    inside = f"{escape(path)}/" if path else ""
    shards = [(f"{inside}*{s}", f"{inside}*{s}.index.json") for s in WEIGHTS]
    return [*([(escape(path),)] if path else []), *shards]


def _adapter_files(path: str) -> list[Choice]:
    """Return the choices for an adapter: the file, or that of a folder, with PEFT's settings."""
    folder, _, _ = path.rpartition("/") if path.endswith(SUFFIX) else (path, "", "")
    inside = f"{escape(folder)}/" if folder else ""
    files = [escape(path)] if path.endswith(SUFFIX) else [inside + name for name in FILES]
    return [(file, inside + SETTINGS) for file in files]


def _text_encoder_files(path: str) -> list[Choice]:
    """Return the choices for a text encoder's folder: weights of one format, and vocabulary."""
    inside = f"{escape(path)}/" if path else ""
    others = [inside + name for name in BESIDE_WEIGHTS]
    return [
        (f"{inside}*{s}", f"{inside}*{s}.index.json", *others) for s in (".safetensors", ".bin")
    ]

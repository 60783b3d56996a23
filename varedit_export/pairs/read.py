"""Find what kind of data a place holds, and read its pairs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path, PurePosixPath

from varedit_export.datasets.places import bring_folders
from varedit_export.errors import DatasetError
from varedit_export.pairs.columns import Columns, ImgEdit, is_imgedit
from varedit_export.pairs.groups import Folder, Groups, Shard
from varedit_export.pairs.lists import PairList
from varedit_export.pairs.pair import Pair, Pairs
from varedit_export.pairs.stored import PARQUET, TAR, Root
from varedit_export.weights import hub
from varedit_export.weights.download import Download

LIST, LISTS, ANNOTATIONS, IMAGES = "pairs.jsonl", ".jsonl", "annotations", "images/"
TABLES, IMGEDIT = ("train-*.parquet", "*.parquet"), "Parquet"

_PICTURES = ("*", "*/*", "*/*/*")
# The files of a repository, in choices, of which the first that is there is taken.
_ON_THE_HUB = (
    *((folder + pattern,) for pattern in TABLES for folder in ("", "data/")),
    *((f"{folder}*{TAR}",) for folder in ("", "data/")),
    (LIST, *_PICTURES),
)


def read_pairs(
    places: Sequence[str | Path], accept: Callable[[Download], None] = lambda download: None
) -> Pairs:
    """Read the pairs of one or several places, one after the other.

    A place is a list (.jsonl), a table (.parquet), a shard (.tar), a folder of one of these kinds
    or of pictures, or such a file or folder on the hub: hf://datasets/OWNER/REPOSITORY/PATH. All
    rows are checked now; pictures, and texts in files of their own, when they are asked for.
    accept: called before anything is downloaded, if anything has to be; it raises to refuse.
    Raises DatasetError, which names the file and the row, CheckpointError if a download fails.
    """
    parts = list[Sequence[Pair]]()
    for place in map(str, places):
        remote = place.startswith(hub.SCHEME)
        path, root = _brought(place, accept) if remote else _local(Path(place))
        parts += _parts(path, root, lambda place: _brought(place, accept)[1])
    return Pairs(parts)


def _local(path: Path) -> tuple[Path, Root]:
    """Return a place on this machine, and the folder that it belongs to."""
    if not path.exists():
        raise DatasetError(f"there is no {path}: give a file or folder of pairs")
    folder = path if path.is_dir() else path.parent
    return path, Root(folder.parent if folder.name in (ANNOTATIONS, IMGEDIT) else folder)


def _brought(place: str, accept: Callable[[Download], None]) -> tuple[Path, Root]:
    """Download a place on the hub; return where it is on this machine, and its folder."""
    address, choices, name = hub.parse(place), _ON_THE_HUB, ""
    path = PurePosixPath(address.path)
    if path.suffix in (LISTS, PARQUET, TAR):
        name, path = path.name, path.parent
        choices = ((escape(name), *(_PICTURES if name.endswith(LISTS) else ())),)
    inside = "" if path == PurePosixPath() else path.as_posix()
    parent = replace(address, path=inside)
    folder = bring_folders({"--data": (str(parent), choices)}, accept)["--data"]
    commit = folder.parts[-1 - len(path.parts)]
    return folder / name, Root(folder, str(replace(address, revision=commit)))


def _parts(path: Path, root: Root, remote: Callable[[str], Root]) -> list[Sequence[Pair]]:
    """Return the pairs of a file, or of the files in a folder that are of its kind."""
    if path.suffix == LISTS:
        folders = (IMAGES, "") if path.parent.name == ANNOTATIONS else ("",)
        return [PairList(path, root, folders, remote)]
    if path.suffix == PARQUET:
        return [ImgEdit(path, root) if is_imgedit(path) else Columns(path, root)]
    if path.suffix == TAR:
        return [Groups(Shard(path, root), root)]
    files = next((found for found in _choices(path) if found), None)
    if files is None:
        return [Groups(Folder(path, root), root)]
    return [part for file in files for part in _parts(file, root, remote)]


def _choices(folder: Path) -> Iterator[list[Path]]:
    """Yield the files of each kind that a folder has."""
    patterns = [LIST, f"*{LISTS}" if folder.name == ANNOTATIONS else f"{ANNOTATIONS}/*{LISTS}"]
    patterns += [part + one for one in TABLES for part in ("", "data/", f"{IMGEDIT}/")]
    patterns += [f"*{TAR}", f"data/*{TAR}"]
    for pattern in patterns:
        yield sorted(path for path in folder.glob(pattern) if path.is_file())

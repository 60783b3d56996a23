"""Find what kind of data a place holds, and read its pairs."""

from collections.abc import Sequence
from pathlib import Path

from varedit_export.errors import DatasetError
from varedit_export.pairs.lists import PairList
from varedit_export.pairs.pair import Pair, Pairs, Root

LIST, ANNOTATIONS, IMAGES = "pairs.jsonl", "annotations", "images/"


def read_pairs(places: Sequence[str | Path]) -> Pairs:
    """Read the pairs of one or several places, one after the other.

    A place is a list of pairs (JSON lines), or a folder with pairs.jsonl or annotations/*.jsonl.
    All rows are checked now; pictures when they are opened. Raises DatasetError, which names the
    file and the row.
    """
    return Pairs([part for place in places for part in _parts(Path(place))])


def _parts(path: Path) -> list[Sequence[Pair]]:
    if path.suffix == ".jsonl":
        return [_list(path)]
    if (path / LIST).is_file():
        return [_list(path / LIST)]
    if found := sorted((path / ANNOTATIONS).glob("*.jsonl")):
        return [_list(one) for one in found]
    raise DatasetError(f"{path} has no {LIST}")


def _list(path: Path) -> PairList:
    if path.parent.name == ANNOTATIONS:
        return PairList(path, Root(path.parent.parent), (IMAGES, ""))
    return PairList(path, Root(path.parent))

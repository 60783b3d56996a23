"""Filter pairs by a judge, as VAREdit's authors did theirs (arXiv 2508.15772, Figure 8).

A model that takes pictures says how well a pair matches its instruction, and how clear both of its
pictures are. A folder beside the new list keeps what it said, so that a run that was interrupted
or killed goes on, and another limit asks nothing again. The list itself is written at the end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from varedit_engines.progress import OnStep
from varedit_export.errors import DatasetError
from varedit_export.evaluation.case import Case, Edited
from varedit_export.evaluation.judge.judge import Judge, open_judges
from varedit_export.evaluation.judge.protocols import PAIR_SCORES, PAIRS
from varedit_export.evaluation.report import JudgeUse
from varedit_export.options import FilterOptions
from varedit_export.pairs.pair import Pair, Pairs
from varedit_export.pairs.read import read_pairs
from varedit_export.resumable.journal import Journal
from varedit_export.resumable.locked import locked
from varedit_export.weights.download import Download
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.errors import ConfigError
from varedit_runtime.files import atomic_file, unwritable, writing

HIGHEST = 10  # score
MOST = 1_000_000  # pairs of a run: their answers are in memory
LARGEST_SIDE = 1024  # px of a picture as the judge sees it: of the largest squares of training
ANSWERS, VERDICTS = ".answers", "verdicts.jsonl"

_TURN = 2  # times as many pairs as are judged at once are read at a time


class Verdict(msgspec.Struct):
    """What a judge said of a pair.

    key: the pair's. by: the judge's identity. scores: None if there are none, and `why` says so.
    """

    key: str
    by: str
    scores: dict[str, float] | None = None
    why: str | None = None


@dataclass(frozen=True)
class Filtered:
    """What became of pairs, and what the judge used."""

    kept: int
    dropped: int
    use: JudgeUse

    def __str__(self) -> str:
        return f"{self.kept} pairs kept, {self.dropped} dropped\n{self.use}"


def filter_pairs(
    options: FilterOptions,
    on_step: OnStep = lambda what, done, steps: None,
    notice: Callable[[str], None] = lambda line: None,
    accept: Callable[[Download], None] = lambda download: None,
) -> Filtered:
    """Judge pairs, and write a list of them that says of each whether it is kept, and why not.

    Raises ConfigError on options, or a list that cannot be written there; DatasetError on data
    without pairs; JudgeError if the judge cannot be asked. Given again, it continues.
    """
    if options.judge is None:
        raise ConfigError("--judge: say where the judge is, and its --judge-model")
    if not 0 <= options.least <= HIGHEST:
        raise ConfigError(f"--least is {options.least:g}; give 0 to {HIGHEST}")
    output = Path(options.output)
    folder = output.with_name(output.name + ANSWERS)
    _check(output, folder)
    pairs = read_pairs([str(place) for place in options.data], accept)
    if len(pairs) > MOST:
        raise ConfigError(f"{len(pairs)} pairs are too many at once: filter {MOST}, of some files")
    with locked(folder):
        [judge] = open_judges(options, [PAIRS], folder, notice).values()
        verdicts = _judged(pairs, judge, output, folder, on_step)
        kept = _write(pairs, verdicts, options.least, output)
    return Filtered(kept, len(pairs) - kept, judge.use([], options.judge_price))


def _check(output: Path, folder: Path) -> None:
    """Raise ConfigError if a list cannot be written there, or would replace another file."""
    if output.suffix != ".jsonl":
        raise ConfigError(f"{output}: its name must end in .jsonl")
    if (why := unwritable(output)) is not None:
        raise ConfigError(f"{output} cannot be written: {why}")
    if output.exists() and not folder.is_dir():
        raise ConfigError(f"{output} exists: choose another name")


def _judged(
    pairs: Pairs, judge: Judge, output: Path, folder: Path, on_step: OnStep
) -> Mapping[str, Verdict]:
    """Return the verdicts of all pairs that can be read, by their keys."""
    journal = Journal(folder / VERDICTS, Verdict)
    known = {line.key: line for line in journal.lines if line.by == judge.identity}
    size = _TURN * judge.at_once
    for start in range(0, len(pairs), size):
        on_step("judging pairs", start, len(pairs))
        some = [_pair(pairs, place) for place in range(start, min(start + size, len(pairs)))]
        fresh = {p.key: p for p in some if isinstance(p, Pair) and p.key not in known}
        for pair in fresh.values():
            _names(pair, output)  # before the judge is paid
        for line in _ask(fresh, judge):
            journal.append(line)
            known[line.key] = line
    return known


def _pair(pairs: Pairs, place: int) -> Pair | str:
    """Return a pair, or why it cannot be read."""
    try:
        return pairs[place]
    except DatasetError as error:
        return str(error)


def _ask(pairs: Mapping[str, Pair], judge: Judge) -> Iterator[Verdict]:
    """Yield the verdict about each pair."""
    shown = dict[str, Edited]()
    for key, pair in pairs.items():
        case = Case(pair.id, (), pair.instruction, pair.source)
        try:
            shown[key] = Edited(case, _small(pair.source()), _small(pair.target()))
        except DatasetError as error:
            yield Verdict(key, judge.identity, why=str(error))
    for key, values in zip(shown, judge.measure(list(shown.values())), strict=True):
        scores = {name: value for name in PAIR_SCORES if (value := values[name]) is not None}
        unread = None if scores else "the judge gave no answer that can be read"
        yield Verdict(key, judge.identity, scores or None, unread)


def _small(picture: Image.Image) -> Image.Image:
    picture = on_white(picture)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _write(pairs: Pairs, verdicts: Mapping[str, Verdict], least: float, output: Path) -> int:
    """Write the list, whole or not at all; return how many pairs are kept."""
    kept = 0
    with writing(output), atomic_file(output) as whole, whole.open("wb") as file:
        for place in range(len(pairs)):
            row = _row(_pair(pairs, place), verdicts, least, output)
            kept += row["kept"]
            file.write(msgspec.json.encode(row) + b"\n")
    return kept


def _row(
    pair: Pair | str, verdicts: Mapping[str, Verdict], least: float, output: Path
) -> dict[str, Any]:
    """Return a line of the list."""
    if isinstance(pair, str):
        return {"kept": False, "why": pair}
    row: dict[str, Any] = {**_names(pair, output), "instruction": pair.instruction}
    if pair.weight != 1:
        row["weight"] = pair.weight
    verdict = verdicts[pair.key]
    low = [f"{k} is {v:g}" for k, v in (verdict.scores or {}).items() if v < least]
    why = verdict.why or (f"{' and '.join(low)}, below {least:g}" if low else None)
    told = {"scores": verdict.scores, "why": why}
    return {**row, "kept": why is None, **{k: v for k, v in told.items() if v is not None}}


def _names(pair: Pair, output: Path) -> dict[str, str]:
    """Return the names of a pair's files in a list, and its place on the hub.

    Raises ConfigError if the list is not in a folder that the files are in.
    """
    if pair.root.place:
        return {"data": pair.root.place, **{part: f.name for part, f in pair.files.items()}}
    above, folder = output.parent.resolve(), pair.root.folder.resolve()
    if not folder.is_relative_to(above):
        raise ConfigError(
            f"{output}: a list names files in its own folder and below: write it into {folder}"
        )
    return {
        part: (folder.relative_to(above) / stored.name).as_posix()
        for part, stored in pair.files.items()
    }

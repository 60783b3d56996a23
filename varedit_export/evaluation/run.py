"""A run: a folder that holds an evaluation's pictures and scores, and grows edit by edit.

    run.json        what is evaluated: another bundle, benchmark or seed is refused
    edits.jsonl     a line for each edit that was made: its seed, its picture and its sha256
    scores.jsonl    a line for each edit and family of metrics
    pictures/       the results

Lines are written when their work is done, so that a run that was killed continues where it was.
Edits come first, and then one family of metrics after the other, so that a later run can add
metrics to the same edits.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from varedit_engines.progress import OnStep
from varedit_export.evaluation.case import Case, Edited, Edits, Metric, Values, Wanted
from varedit_export.resumable.journal import Journal
from varedit_export.resumable.locked import LOCK, locked
from varedit_runtime.bundle import file_digest
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.errors import BundleError, ConfigError, shown
from varedit_runtime.files import atomic_file, bundle_around, plain_name, read_regular, writing
from varedit_runtime.pictures import encode_picture, open_picture, write_encoded

RUN, EDITS, SCORES, PICTURES = "run.json", "edits.jsonl", "scores.jsonl", "pictures"
_LARGEST_ID = 40  # characters of a case's id in the name of its picture


class EditLine(msgspec.Struct):
    """An edit that was made. output: its picture, None if failed says why there is none."""

    id: str
    seed: int
    output: str | None = None
    sha256: str | None = None
    failed: str | None = None


class ScoreLine(msgspec.Struct):
    """The scores that a family gave an edit. by: the metric's identity. sha256: of the picture."""

    id: str
    family: str
    by: str
    sha256: str
    scores: dict[str, float | None]


class Run:
    """A run's folder and what it holds."""

    def __init__(self, folder: Path) -> None:
        """Read a run. Raises ConfigError if the folder is none or cannot be read."""
        self.folder = folder
        try:
            self.told = msgspec.json.decode(read_regular(folder / RUN, 2**20), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(f"{folder} is not the folder of a run: name another one") from error
        self._edits = Journal(folder / EDITS, EditLine)
        self._scores = Journal(folder / SCORES, ScoreLine)
        self.edits = {line.id: line for line in self._edits.lines}
        self.scores = {(line.id, line.family): line for line in self._scores.lines}

    def picture(self, id: str) -> Path | None:
        """Return the path of an edit's picture; None if it failed or was not made."""
        line = self.edits.get(id)
        name = None if line is None else line.output
        return None if name is None else self.folder / PICTURES / Path(name).name

    def values(self, id: str, families: Sequence[str]) -> dict[str, float | None]:
        """Return the scores that families gave the present picture of an edit."""
        sha256 = self.edits[id].sha256 if id in self.edits else None
        lines = [line for family in families if (line := self.scores.get((id, family)))]
        return {k: v for line in lines if line.sha256 == sha256 for k, v in line.scores.items()}

    def stands(self, id: str) -> bool:
        """Return whether an edit was made, and its picture is as it was written."""
        line, path = self.edits.get(id), self.picture(id)
        if line is None or path is None:
            return line is not None and line.failed is not None
        with suppress(OSError, BundleError):  # the name may be any text
            return path.is_file() and file_digest(path) == line.sha256
        return False

    def add_edit(self, place: int, id: str, seed: int, result: Image.Image | str) -> None:
        """Write a result and its line; place names its file. result: a text says why it failed."""
        line = EditLine(id, seed)
        if isinstance(result, str):
            line.failed = result
        else:
            content = encode_picture(result)
            line.output = f"{place:05}-{plain_name(id)[:_LARGEST_ID]}.png"
            line.sha256 = hashlib.sha256(content).hexdigest()
            write_encoded(content, self.folder / PICTURES / line.output)
        self._edits.append(line)
        self.edits[id] = line

    def add_scores(self, id: str, family: str, by: str, scores: Values) -> None:
        """Write the scores of an edit that has a picture; one that is not finite is missing."""
        found = {k: None if v is None or not isfinite(v) else float(v) for k, v in scores.items()}
        line = ScoreLine(id, family, by, self.edits[id].sha256 or "", found)
        self._scores.append(line)
        self.scores[id, family] = line

    def scored(self, id: str, family: str, by: str) -> bool:
        """Return whether the present picture of an edit has a family's scores."""
        line = self.scores.get((id, family))
        return line is not None and (line.by, line.sha256) == (by, self.edits[id].sha256)


@contextmanager
def open_run(folder: Path, told: Mapping[str, Any]) -> Iterator[Run]:
    """Begin a run in a new folder, or continue one, and keep other processes out of it.

    told: what is evaluated. Raises ConfigError if the folder holds another evaluation or other
    things, cannot be written, or another process works in it.
    """
    if bundle := bundle_around(folder):
        raise ConfigError(f"{folder} lies in the bundle {bundle}, which never changes")
    with writing(folder):
        if folder.exists() and not (folder / RUN).exists() and any(_others(folder)):
            raise ConfigError(f"{folder} holds other things than a run: name a new folder")
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    with locked(folder):
        with writing(folder):
            if not (folder / RUN).exists():
                with atomic_file(folder / RUN) as whole:
                    whole.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        run = Run(folder)
        _check_same(run, json.loads(json.dumps(told)))
        yield run


def _others(folder: Path) -> Iterator[Path]:
    """Yield what a run that was killed at its very start does not leave."""
    ours = (PICTURES, LOCK)
    return (p for p in folder.iterdir() if p.name not in ours and not p.name.startswith("."))


def _check_same(run: Run, told: Mapping[str, Any]) -> None:
    for key, value in told.items():
        if run.told.get(key) != value:
            raise ConfigError(
                f"{run.folder} is a run with {key} {shown(run.told.get(key))}, not {shown(value)}: "
                "name another folder"
            )


def make_edits(
    run: Run, cases: Mapping[int, Case], seed: int, edits: Edits, on_step: OnStep
) -> None:
    """Make the edits that a run lacks.

    cases: by their places in the benchmark; what a case follows stands before it. seed: the case at
    place i has seed + i. on_step: called at the start and after every edit, with the number of
    edits that are done.
    """
    missing = {place: case for place, case in cases.items() if not run.stands(case.id)}
    while missing:
        on_step("editing", len(cases) - len(missing), len(cases))
        ids = {case.id for case in missing.values()}
        turn = {place: case for place, case in missing.items() if case.after not in ids}
        with closing(edits.edit(_wanted(run, turn, seed))) as made:
            for one, result in made:
                run.add_edit(one.place, missing.pop(one.place).id, one.seed, result)
                on_step("editing", len(cases) - len(missing), len(cases))
        for place in turn.keys() & missing.keys():
            failed = "the edit before it failed"
            run.add_edit(place, missing.pop(place).id, seed + place, failed)
    on_step("editing", len(cases), len(cases))


def _wanted(run: Run, cases: Mapping[int, Case], seed: int) -> Iterator[Wanted]:
    """Yield the edits to make for cases that have a source."""
    for place, case in cases.items():
        source = source_of(run, case)
        if source is not None:
            yield Wanted(place, source, case.instruction, seed + place)


def source_of(run: Run, case: Case) -> Image.Image | None:
    """Return what a case edits: its own picture, or the result of the case before it."""
    if case.after is None:
        return case.source()
    path = run.picture(case.after)
    return None if path is None else open_picture(path)


def measure(run: Run, cases: Sequence[Case], family: str, metric: Metric, on_step: OnStep) -> None:
    """Compute the scores of a family that a run lacks."""
    made = [case for case in cases if run.picture(case.id) is not None]
    missing = [case for case in made if not run.scored(case.id, family, metric.identity)]
    for start in range(0, len(missing), metric.at_once):
        on_step(f"scoring, {family}", len(made) - len(missing) + start, len(made))
        some = [_load(run, case) for case in missing[start:][: metric.at_once]]
        for edited, values in zip(some, metric.measure(some), strict=True):
            run.add_scores(edited.case.id, family, metric.identity, values)
    on_step(f"scoring, {family}", len(made), len(made))


def _load(run: Run, case: Case) -> Edited:
    source, path = source_of(run, case), run.picture(case.id)
    assert source is not None and path is not None, "a case with a result has a source"
    return Edited(case, on_white(source), on_white(open_picture(path)))

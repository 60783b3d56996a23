"""What an evaluation found: means of groups, a comparison, and every edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varedit_export.evaluation.case import OVERALL, Case, Score
from varedit_export.evaluation.paper import Published, published
from varedit_export.evaluation.run import PICTURES, Run
from varedit_export.evaluation.statistics import Comparison, Mean, compare, mean_of
from varedit_runtime.errors import printable

JSON = "report.json"
_WIDEST = 40  # characters of a group's name on a terminal


@dataclass(frozen=True)
class Group:
    """A group of edits: how many it has, and the mean of each score that any of them has."""

    edits: int
    means: Mapping[str, Mean]


@dataclass(frozen=True)
class Row:
    """An edit: failed says why there is no picture."""

    id: str
    groups: Sequence[str]
    instruction: str
    seed: int
    picture: str | None
    failed: str | None
    scores: Mapping[str, float | None]
    against: Mapping[str, float | None]


@dataclass(frozen=True)
class JudgeUse:
    """What a judge was asked by a protocol, and what it used.

    answers: that could be read. unread: that could not. refused: requests that the server refused.
    cost: in the currency of the prices; None without them. repeated: edits that were judged several
    times. agreed: those of them that got the same score each time.
    """

    model: str
    protocol: str
    answers: int
    unread: int
    refused: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    repeated: int
    agreed: int

    def __str__(self) -> str:
        text = f"judge {self.model}, {self.protocol}: {self.answers} answers"
        if self.unread:
            text += f", {self.unread} that could not be read"
        if self.refused:
            text += f", {self.refused} requests refused"
        text += f"; {self.tokens_in} tokens in, {self.tokens_out} out"
        if self.cost is not None:
            text += f"; cost {self.cost:.2f}"
        if self.repeated:
            text += f"; repeats agree about {self.agreed} of {self.repeated} edits"
        return text


@dataclass(frozen=True)
class Report:
    """An evaluation's results, as `report.json` has them.

    run: what `run.json` says. scores: those that any edit has. groups: by name, the overall one
    last. published: the paper's numbers of this benchmark. against: the name of what is compared.
    comparisons: of each group by score. edits: in the benchmark's order. failures: which scores are
    worse than they must be. judges: what they were asked and used, one for each protocol.
    """

    title: str
    name: str
    run: Mapping[str, Any]
    scores: Sequence[Score]
    groups: Mapping[str, Group]
    published: Sequence[Published]
    against: str | None
    comparisons: Mapping[str, Mapping[str, Comparison]]
    edits: Sequence[Row]
    failures: Sequence[str] = ()
    judges: Sequence[JudgeUse] = ()


@dataclass(frozen=True)
class Subject:
    """What is reported on: its name, its run, and that of what it is compared with, if any."""

    name: str
    run: Run
    against: str | None = None
    other: Run | None = None


def summarise(
    title: str,
    subject: Subject,
    cases: Sequence[Case],
    scores: Sequence[Score],
    families: Sequence[str],
) -> Report:
    """Return the report of a run. scores: all that families have."""
    rows = [_row(subject, case, families) for case in cases]
    known = [s for s in scores if any(row.scores.get(s.name) is not None for row in rows)]
    names = [*dict.fromkeys(name for row in rows for name in row.groups), OVERALL]
    members = {n: [row for row in rows if n == OVERALL or n in row.groups] for n in names}
    return Report(
        title,
        subject.name,
        subject.run.told,
        known,
        {name: _group(found, known) for name, found in members.items()},
        published(subject.run.told["benchmark"]),
        subject.against,
        {} if subject.other is None else {n: _compared(f, known) for n, f in members.items()},
        rows,
    )


def _row(subject: Subject, case: Case, families: Sequence[str]) -> Row:
    line, other = subject.run.edits[case.id], subject.other
    return Row(
        case.id,
        case.groups,
        case.instruction,
        line.seed,
        None if line.output is None else f"{PICTURES}/{line.output}",
        line.failed,
        subject.run.values(case.id, families),
        {} if other is None else other.values(case.id, families),
    )


def _group(rows: Sequence[Row], scores: Sequence[Score]) -> Group:
    found = {
        score.name: mean_of([v for row in rows if (v := row.scores.get(score.name)) is not None])
        for score in scores
    }
    return Group(len(rows), {name: mean for name, mean in found.items() if mean is not None})


def _compared(rows: Sequence[Row], scores: Sequence[Score]) -> dict[str, Comparison]:
    found = {
        score.name: compare(
            [row.scores.get(score.name) for row in rows],
            [row.against.get(score.name) for row in rows],
            score.better,
            score.digits,
        )
        for score in scores
    }
    return {name: one for name, one in found.items() if one is not None}


def table(report: Report) -> str:
    """Return the groups' means with their intervals as lines of text, then the paper's numbers."""
    heads = ["", "edits", *(score.label for score in report.scores)]
    lines = [heads] + [
        [
            printable(name)[:_WIDEST],
            str(group.edits),
            *(_cell(group, s) for s in report.scores),
        ]
        for name, group in report.groups.items()
    ]
    for model, values in _models(report).items():
        lines.append([model, "", *(values.get(score.name, "") for score in report.scores)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(line))
        for line in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join(line.rstrip() for line in text)


def _cell(group: Group, score: Score) -> str:
    mean = group.means.get(score.name)
    if mean is None:
        return "-"
    beside = mean.beside(group.edits, score.digits)
    return f"{mean.mean:.{score.digits}f}" + (f" ({beside})" if beside else "")


def _models(report: Report) -> dict[str, dict[str, str]]:
    """Return the paper's overall numbers of each model, by score."""
    found: dict[str, dict[str, str]] = {}
    for one in report.published:
        if one.group == OVERALL:
            found.setdefault(f"paper, {one.model}", {})[one.score] = f"{one.value:g}"
    return found


def verdicts(report: Report) -> list[str]:
    """Return what the comparison says of every score, over all edits, a line each."""
    labels = {score.name: score.label for score in report.scores}
    return [
        f"{labels[name]}: {one.beside(report.against or '')}"
        for name, one in report.comparisons.get(OVERALL, {}).items()
    ]

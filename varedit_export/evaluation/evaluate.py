"""Evaluate what edits on a benchmark: edit, score, compare, report."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

from varedit_engines.progress import OnStep
from varedit_export.datasets.places import bring_folders
from varedit_export.evaluation.benchmarks import benchmark
from varedit_export.evaluation.case import OVERALL, Benchmark, Case, Edits, Family, Metric, Score
from varedit_export.evaluation.judge.judge import open_judges
from varedit_export.evaluation.metrics import family
from varedit_export.evaluation.metrics.judges import PREFIX
from varedit_export.evaluation.page import write_page
from varedit_export.evaluation.report import JSON, Report, Subject, summarise
from varedit_export.evaluation.run import RUN, Run, make_edits, measure, open_run
from varedit_export.options import EvaluateOptions
from varedit_export.weights.download import Download
from varedit_export.weights.hub import SCHEME
from varedit_runtime.errors import ConfigError, shown
from varedit_runtime.files import write_report

AGAINST = "against"  # the folder, in a run's, of the run that it is compared with


def evaluate(
    edits: Edits,
    options: EvaluateOptions,
    other: Edits | Run | None = None,
    metrics: Mapping[str, Metric] = {},
    on_step: OnStep = lambda what, done, steps: None,
    notice: Callable[[str], None] = lambda line: None,
    accept: Callable[[Download], None] = lambda download: None,
) -> Report:
    """Evaluate what edits, and write the report into the run's folder.

    other: what it is compared with: other edits, which are made too, or a finished run of the same
    cases. metrics: those that are open already, by their family. See `varedit_export.evaluate` for
    the rest.
    """
    chosen, families, gates, places = _planned(options, notice)
    folders = bring_folders(places, accept)
    everything = chosen.read(folders.get("--data", Path()))
    cases = spread(everything, options.limit)
    digest = _digest(everything)
    told = {"benchmark": options.benchmark, "cases": digest, "seed": options.seed}
    judged = [name.removeprefix(PREFIX) for name in families if name.startswith(PREFIX)]
    judges = open_judges(options, judged, Path(options.output), notice)
    metrics = {**metrics, **{PREFIX + name: judge for name, judge in judges.items()}}
    opened = {n: metrics.get(n) or one.open(folders.get(n)) for n, one in families.items()}
    if isinstance(other, Run):
        _check_alike(other, told, cases, opened)

    def work(run: Run, by: Edits) -> None:
        make_edits(run, cases, options.seed, by, on_step)
        for name, metric in opened.items():
            measure(run, list(cases.values()), name, metric, on_step)

    folder = Path(options.output)
    with open_run(folder, {**told, **edits.identity}) as run:
        work(run, edits)
        subject = Subject(edits.name, run)
        if isinstance(other, Run):
            subject = replace(subject, against=other.folder.name, other=other)
        elif other is not None:
            with open_run(folder / AGAINST, {**told, **other.identity}) as against:
                work(against, other)
                subject = replace(subject, against=other.name, other=against)
        scores = _scores(families)
        report = summarise(chosen.title, subject, list(cases.values()), scores, list(families))
        used = [judge.use(report.edits, options.judge_price) for judge in judges.values()]
        report = replace(report, judges=used, failures=failures(report, gates))
        write_report(report, folder / JSON)
        write_page(report, run, list(cases.values()))
    return report


def check(options: EvaluateOptions) -> None:
    """Raise what `evaluate` raises before it edits, but for what is on the hub."""
    chosen, families, _, places = _planned(options, lambda line: None)
    here = {name: place for name, place in places.items() if not place[0].startswith(SCHEME)}
    folders = bring_folders(here, lambda download: None)
    for name, one in families.items():
        if name in folders or not one.files:
            one.open(folders.get(name))
    if "--data" in folders:
        chosen.read(folders["--data"])


_Planned = tuple[Benchmark, dict[str, Family], list[tuple[Score, float]], dict[str, Any]]


def _planned(options: EvaluateOptions, notice: Callable[[str], None]) -> _Planned:
    """Return the benchmark, the families of metrics, `fail_below`, and the places of files."""
    chosen = benchmark(options.benchmark)
    families = _families(options, chosen, notice)
    gates = _gates(options, _scores(families))
    return chosen, families, gates, _places(options, chosen, families)


def _scores(families: Mapping[str, Family]) -> list[Score]:
    return [score for one in families.values() for score in one.scores]


def spread(cases: Sequence[Case], limit: int | None) -> dict[int, Case]:
    """Return cases by their places: all, or a number of them that has all types alike."""
    if limit is None:
        return dict(enumerate(cases))
    if limit < 1:
        raise ConfigError(f"--limit is {limit}; give 1 or more")
    counts: dict[tuple[str, ...], int] = {}
    turns = []
    for place, case in enumerate(cases):
        turns.append((counts.setdefault(case.groups[:1], 0), place))
        counts[case.groups[:1]] += 1
    return {place: cases[place] for place in sorted(place for _, place in sorted(turns)[:limit])}


def _gates(options: EvaluateOptions, scores: Sequence[Score]) -> list[tuple[Score, float]]:
    """Return what `fail_below` says. Raises ConfigError on unknown scores."""
    known, found = {score.name: score for score in scores}, []
    for text in options.fail_below:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(
                f"--fail-below: no score is called {shown(name)}; there are {', '.join(known)}"
            )
        try:
            least = float(value)
        except ValueError:
            least = nan
        if not isfinite(least):
            raise ConfigError(f"--fail-below is {shown(text)}; give SCORE=NUMBER")
        found.append((known[name], least))
    return found


def failures(report: Report, gates: Sequence[tuple[Score, float]]) -> list[str]:
    """Return which overall means are worse than they must be, or missing, a line each.

    Means are of edits that were made, so that no other may be missing.
    """
    failed = [row.id for row in report.edits if row.failed is not None]
    lines = []
    if gates and failed:
        lines.append(f"{len(failed)} edits could not be made, such as {failed[0]}")
    for score, least in gates:
        mean = report.groups[OVERALL].means.get(score.name)
        if mean is None:
            lines.append(f"{score.name}: no edit has this score")
        elif not score.better * mean.mean >= score.better * least:
            lines.append(f"{score.name} is {mean.mean:.{score.digits}f}, worse than {least:g}")
    return lines


def _families(
    options: EvaluateOptions, chosen: Benchmark, notice: Callable[[str], None]
) -> dict[str, Family]:
    """Return the families of metrics to compute, without those whose weights are nowhere."""
    names = [*(options.metrics or chosen.families)]
    if options.judge is not None and not any(name.startswith(PREFIX) for name in names):
        names.append(chosen.judge)
    found = {name: family(name) for name in names}
    given = _given(options)
    if unknown := given.keys() - found.keys():
        raise ConfigError(
            f"--weights: {sorted(unknown)[0]} is not computed; --metric names what is"
        )
    for name, one in list(found.items()):
        if one.benchmark not in (None, options.benchmark):
            raise ConfigError(f"--metric {name} scores edits of {one.benchmark} alone")
        if one.files and one.weights is None and name not in given:
            if name in options.metrics:
                raise ConfigError(f"--metric {name}: give its weights with --weights {name}=PLACE")
            notice(f"{name} is left out: it needs --weights {name}=PLACE")
            del found[name]
    return found


def _given(options: EvaluateOptions) -> dict[str, str]:
    """Return the places of weights that were given, by the family's name."""
    found = {}
    for text in options.weights:
        name, sign, place = text.partition("=")
        if not (name and sign and place):
            raise ConfigError(f"--weights is {shown(text)}; give METRIC=PLACE")
        found[name] = place
    return found


def _places(
    options: EvaluateOptions, chosen: Benchmark, families: Mapping[str, Family]
) -> dict[str, tuple[str, Any]]:
    """Return where the data and the weights are, and which files are taken of a repository."""
    weights = {**chosen.weights, **_given(options)}
    found = {
        name: (weights.get(name) or one.weights or "", one.files)
        for name, one in families.items()
        if one.files
    }
    if chosen.files:
        if options.data is None:
            other = f", or --data {chosen.place}" if chosen.place else ""
            raise ConfigError(f"{options.benchmark}: give its data with --data FOLDER{other}")
        found["--data"] = (str(options.data), chosen.files)
    return found


def _check_alike(
    other: Run,
    told: Mapping[str, Any],
    cases: Mapping[int, Case],
    metrics: Mapping[str, Metric],
) -> None:
    """Check that a run has the same cases and noise, and scores by the same metrics.

    Raises ConfigError.
    """
    for key, value in told.items():
        if other.told.get(key) != value:
            raise ConfigError(
                f"--against: {other.folder / RUN} has another {key}: compare alike runs"
            )
    if missing := [case.id for case in cases.values() if case.id not in other.edits]:
        raise ConfigError(f"--against: {other.folder} lacks {len(missing)} of the edits: finish it")
    made = [case.id for case in cases.values() if other.picture(case.id) is not None]
    for name, metric in metrics.items():
        if not all(other.scored(id, name, metric.identity) for id in made):
            raise ConfigError(
                f"--against: {other.folder} lacks scores of {name} by the same model: evaluate "
                "it as this one first"
            )


def _digest(cases: Sequence[Case]) -> str:
    """Return a digest of what cases ask for."""
    told = [[c.id, c.groups, c.instruction, c.after, c.before, c.caption] for c in cases]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()

"""What a judge says of an edit, by protocol; `evaluation/judge/` asks it."""

from pathlib import Path

from varedit_export.evaluation.case import Family, Metric
from varedit_export.evaluation.judge.protocols import PROTOCOLS
from varedit_runtime.errors import ConfigError

PREFIX = "judge-"  # of families; the rest is the protocol's name


def _unnamed(_: Path | None) -> Metric:
    raise ConfigError("a judge is asked with --judge URL and --judge-model NAME: give both")


PAPER, IMGEDIT, UGE, GEDIT = (
    Family(PROTOCOLS[name].scores, _unnamed) for name in ("paper", "imgedit", "uge", "gedit")
)

"""Let `varedit-export build` evaluate what it built."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import varedit_export
from varedit_export.commands.evaluate import PARTS, show
from varedit_export.commands.shared_options import fail_below_option
from varedit_export.console import progress, say
from varedit_export.options import EvaluateOptions
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError

if TYPE_CHECKING:
    from varedit_export.weights.download import Download


@dataclass(frozen=True)
class Gate:
    """What a bundle that was just built is evaluated on, and what it has to reach."""

    benchmark: str
    data: str | None
    fail_below: tuple[str, ...]

    def check(self) -> None:
        """Raise ConfigError on names that are unknown, before anything is built."""
        from varedit_export.evaluation.evaluate import check

        check(self._options(Path()))

    def passes(self, bundle: Bundle, accept: Callable[["Download"], None]) -> bool:
        """Evaluate a bundle, in a folder beside it; return whether it is good enough."""
        name = f"{bundle.path.name}-evaluation-{bundle.digest[:8]}"
        options = self._options(bundle.path.with_name(name))
        with progress(PARTS) as on_step:
            report = varedit_export.evaluate(bundle.path, options, on_step, say, accept)
        show(report, Path(options.output))
        return not report.failures

    def _options(self, output: Path) -> EvaluateOptions:
        return EvaluateOptions(self.benchmark, output, self.data, fail_below=self.fail_below)


def gate_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one argument, `gate`: None, or what a new bundle is evaluated on."""

    @click.option(
        "--evaluate",
        "evaluated",
        metavar="BENCHMARK[=DATA]",
        help="Evaluate the new bundle, as `varedit-export evaluate` does.",
    )
    @fail_below_option
    @wraps(command)
    def call(*arguments: Any, evaluated: str | None, fail_below: tuple[str, ...], **given: Any):
        gate = None
        if evaluated is not None:
            name, _, data = evaluated.partition("=")
            gate = Gate(name, data or None, fail_below)
            gate.check()
        elif fail_below:
            raise ConfigError(
                "--fail-below: say what is evaluated with --evaluate BENCHMARK[=DATA]"
            )
        command(*arguments, gate=gate, **given)

    return call

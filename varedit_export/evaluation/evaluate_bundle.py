"""Evaluate a bundle, alone or beside another, in one process or on a Ray cluster."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from varedit_engines.progress import OnStep
from varedit_export.evaluation.bundle_edits import BundleEdits, Dials
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.report import Report
from varedit_export.evaluation.run import RUN, Run
from varedit_export.options import EvaluateOptions
from varedit_export.weights.download import Download
from varedit_runtime.backends import BACKENDS
from varedit_runtime.terminal.ray_cluster import cluster, threads_of


def evaluate_bundle(
    bundle: Path,
    options: EvaluateOptions,
    on_step: OnStep,
    notice: Callable[[str], None],
    accept: Callable[[Download], None],
) -> Report:
    """Evaluate a bundle; see `varedit_export.evaluate`."""
    dials = Dials(options.guidance_scale, options.temperature, options.fast)
    backend, against = options.backend, options.against
    edits, other = BundleEdits(bundle, backend, options.variant, dials), None
    if against is not None and (Path(against) / RUN).is_file():
        other = Run(Path(against))
    elif against in BACKENDS:
        other = BundleEdits(bundle, str(against), options.variant, dials)
        other.name = str(against)
    elif against is not None:
        other = BundleEdits(Path(against), backend, options.variant, dials)
    if not options.ray:
        return evaluate(edits, options, other, on_step=on_step, notice=notice, accept=accept)
    with (
        cluster(threads_of(edits.opening.backend)),
        redirect_stdout(sys.stderr),
    ):  # where Ray tells of faults
        from varedit_export.evaluation.on_ray import RayEdits

        others = RayEdits(other) if isinstance(other, BundleEdits) else other
        by_ray = RayEdits(edits)
        return evaluate(by_ray, options, others, on_step=on_step, notice=notice, accept=accept)

"""Export VAREdit models: from released checkpoints to the files that run.

    import varedit_export as ve

    bundle = ve.build(ve.BuildOptions(size="2b", resolutions=(512,), random_weights=0))
    ve.compile_engines(bundle, ve.EngineOptions("tensorrt-rtx", architectures=("sm89",)))
    lines = ve.verify(bundle)

Nothing here prints. Progress comes through callbacks: `on_step` is called before every step with
(what is being done, steps done, steps in all), `notice` with lines for people. Importing this
package loads neither PyTorch nor ONNX; calling its functions does.

Every error is a `VareditError`, whose text is one line that names options as the command does. All
functions raise MissingExtraError if the extra `export` is not installed, and BundleError if a
bundle is missing or damaged.
"""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from varedit_engines.progress import OnStep
from varedit_export.check_options import check_build
from varedit_export.errors import ExportError, ParityError
from varedit_export.options import (
    BuildOptions,
    EngineOptions,
    EvaluateOptions,
    TrainOptions,
    VerifyOptions,
)
from varedit_runtime.backends import choose
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, VareditError, needs_extra
from varedit_runtime.manifest import ParityLine
from varedit_runtime.values import AnyPath, checked

if TYPE_CHECKING:
    from varedit_export.evaluation.report import Report
    from varedit_export.plan import BundlePlan
    from varedit_export.weights.download import Download
    from varedit_runtime.backends.engines.engine_set import EngineSet

__all__ = [
    "BuildOptions",
    "EngineOptions",
    "EvaluateOptions",
    "ExportError",
    "ParityError",
    "TrainOptions",
    "VareditError",
    "VerifyOptions",
    "build",
    "compile_engines",
    "evaluate",
    "plan_build",
    "plan_train",
    "train",
    "verify",
]


def _ignore(*_: object) -> None:
    """Show nothing."""


def build(
    options: BuildOptions,
    on_step: OnStep = _ignore,
    notice: Callable[[str], None] = _ignore,
    accept: Callable[["Download"], None] = _ignore,
) -> Bundle:
    """Build a bundle, prove its parity with the reference, publish it, and return it opened.

    The next build continues an interrupted one. `notice` is called with what will be built and what
    that needs. `accept` is called before weights are downloaded, with what is downloaded from
    where; it raises an error of its own to refuse. The bundle's measures are
    `bundle.manifest.parity`.

    Raises ConfigError on options that are impossible or contradict each other, CheckpointError if
    weights cannot be fetched or read or do not fit, or the disk has no room, ExportError if memory
    is too small or a graph is not as expected, ParityError if a measure exceeds its tolerance. Then
    nothing is published, and an earlier bundle of that name stays.
    """
    options = checked("options", options, BuildOptions)
    _check_functions(on_step=on_step, notice=notice, accept=accept)
    check_build(options)
    with needs_extra("export"):
        from varedit_export.assemble import assemble
        from varedit_export.resolve_options import plan_of

    plan = plan_of(options, accept)
    notice(_told(plan))
    assemble(plan, on_step)
    return Bundle.open(plan.request.target)


def plan_build(options: BuildOptions) -> str:
    """Return what `build` would make, and what building it and editing with it take, in lines.

    Nothing is built, and weights are neither fetched nor read. Raises ConfigError as `build` does.
    """
    options = checked("options", options, BuildOptions)
    check_build(options)
    with needs_extra("export"):
        from varedit_export.resolve_options import plan_without_weights

    return _told(plan_without_weights(options))


def _told(plan: "BundlePlan") -> str:
    from varedit_export.estimate import editing, needs

    return "\n  ".join([str(plan), f"needs {needs(plan)}", *editing(plan)])


def compile_engines(
    bundle: Bundle | AnyPath,
    options: EngineOptions = EngineOptions(),
    on_step: OnStep = _ignore,
    notice: Callable[[str], None] = _ignore,
) -> "EngineSet":
    """Compile a variant's graphs to TensorRT engines, or open those that were compiled before.

    An interrupted compilation continues at the graph it had reached. `notice` is called with what
    the GPU will have to hold, what to consider first, and why existing engines are compiled again.

    Raises what `options.compiler()` raises, ConfigError on an unknown layout, BackendError if a
    graph does not compile, BundleError if existing engines were built on another machine.
    """
    options = checked("options", options, EngineOptions)
    _check_functions(on_step=on_step, notice=notice)
    options.check()
    opened = _opened(bundle)
    opened.manifest.variant(options.variant)
    compiler = options.compiler()
    with needs_extra("export"):
        from varedit_engines import compile_set

    job = compile_set.CompileJob(opened, options.layout, compiler, options.variant)
    notice(str(job))
    if job.advice:
        notice(job.advice)
    return compile_set.compile_engine_set(job, on_step, notice, options.again)


def verify(
    bundle: Bundle | AnyPath,
    options: VerifyOptions = VerifyOptions(),
    measured: Callable[[ParityLine], None] = _ignore,
) -> list[ParityLine]:
    """Compare every graph of a bundle with the reference, teacher-forced; return all measures.

    The reference takes the bundle's own weights. `measured` is called with every measure, failed
    ones too.

    Raises ParityError at once if a weight is not finite, at the end if a measure exceeds its
    tolerance or is not finite; ConfigError if a variant is given without a backend to run it; what
    `backend.open` raises if the backend cannot run here.
    """
    options = checked("options", options, VerifyOptions)
    _check_functions(measured=measured)
    backend = choose(options.backend)
    always = backend == choose()
    if always and options.variant:
        raise ConfigError("--variant: all are compared; leave it out, or name another --backend")
    opened, others = _opened(bundle), iter(())
    opened.manifest.variant(options.variant)
    with needs_extra("export"):
        from varedit_export.manifest_model import sources_of
        from varedit_export.parity.compare_bundle import (
            check_weights,
            compare_bundle,
            compare_chosen,
            compare_recording,
        )
        from varedit_export.parity.measures import gate
        from varedit_reference.golden.recordings import open_recording

    if not always:  # opened first, so that it fails before the long comparison
        others = compare_chosen(opened, backend, options.variant)
    opened.verify()
    check_weights(opened)
    recorded = iter(())
    if options.golden is not None:
        recorded = compare_recording(opened, open_recording(Path(options.golden)))
    lines = []
    for line in chain(compare_bundle(opened, *sources_of(opened)), recorded, others):
        measured(line)
        lines.append(line)
    opened.check_stands()  # its files were read by their path
    return gate(lines)


def evaluate(
    bundle: AnyPath,
    options: EvaluateOptions,
    on_step: OnStep = _ignore,
    notice: Callable[[str], None] = _ignore,
    accept: Callable[["Download"], None] = _ignore,
) -> "Report":
    """Make a benchmark's edits with a bundle, score them, and write a report into the run's folder.

    A run that was interrupted is continued. `notice` is called with what is left out, `accept`
    before anything is downloaded, as for `build`. Scores that are worse than `fail_below` says are
    the report's `failures`.

    Raises ConfigError on impossible options, or if the folder holds another run; DatasetError,
    which names the row, on data that is not as it is published; CheckpointError if weights of a
    metric cannot be fetched or read; what `Editor.edit` raises, but for an instruction that the
    bundle cannot follow, which counts as failed.
    """
    options = checked("options", options, EvaluateOptions)
    folder = Path(checked("bundle", bundle, AnyPath))
    _check_functions(on_step=on_step, notice=notice, accept=accept)
    with needs_extra("evaluate"):
        from varedit_export.evaluation.evaluate_bundle import evaluate_bundle

    return evaluate_bundle(folder, options, on_step, notice, accept)


def train(
    options: TrainOptions,
    notice: Callable[[str], None] = _ignore,
    accept: Callable[["Download"], None] = _ignore,
) -> Path:
    """Fine-tune a model on pairs; return the file of what it learned, for a build.

    A run that was interrupted is continued, to the bit. `notice` is called with what will be done,
    and then with losses; `accept` before anything is downloaded, as for `build`. Of the processes
    that torchrun started, each calls this function.

    Raises ConfigError on impossible options, or if the folder holds another run; CheckpointError
    if weights cannot be fetched or read or do not fit, or the disk has no room; DatasetError, which
    names the row, on pairs that cannot be read; ExportError if memory is too small; BackendError if
    torchrun's processes cannot reach each other.
    """
    options = checked("options", options, TrainOptions)
    _check_functions(notice=notice, accept=accept)
    check_build(options.build_options)
    with needs_extra("export"):
        from varedit_export.training.run import fine_tune

    return fine_tune(options, notice, accept)


def plan_train(options: TrainOptions) -> str:
    """Return what `train` would train and the memory that takes, in lines.

    Neither weights nor pairs are read. Raises ConfigError as `train` does.
    """
    options = checked("options", options, TrainOptions)
    check_build(options.build_options)
    with needs_extra("export"):
        from varedit_export.training.run import plan_training

    return str(plan_training(options))


def _check_functions(**given: object) -> None:
    for name, value in given.items():
        checked(name, value, Callable)


def _opened(bundle: Bundle | AnyPath) -> Bundle:
    bundle = checked("bundle", bundle, Bundle | AnyPath)
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)

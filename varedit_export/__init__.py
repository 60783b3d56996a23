"""Export VAREdit models: from released checkpoints to the files that run.

    import varedit_export as ve

    bundle = ve.build(ve.BuildOptions(size="2b", resolutions=(512,), random_weights=0))
    ve.compile_engines(bundle, ve.EngineOptions("tensorrt-rtx", architectures=("sm89",)))
    lines = ve.verify(bundle)

Everything here is silent. What the commands show comes by callbacks: `on_step`, called before every
step with (what is being done, steps done, steps in all), and `notice`, called with lines for a
person. Importing this package loads neither PyTorch nor ONNX; calling it does.

Every error is a `VareditError`, and its text one line that names options as the command does. All
functions raise MissingExtraError when the extra `export` is not installed, and BundleError on a
bundle that is missing or damaged.
"""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from varedit_export.errors import ExportError, ParityError
from varedit_export.options import AnyPath, BuildOptions, EngineOptions, OnStep, VerifyOptions
from varedit_runtime.backends import DEFAULT, choose
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, VareditError, needs_extra
from varedit_runtime.manifest import ParityLine

if TYPE_CHECKING:
    from varedit_runtime.backends.engines.engine_set import EngineSet

__all__ = [
    "BuildOptions",
    "EngineOptions",
    "ExportError",
    "ParityError",
    "VareditError",
    "VerifyOptions",
    "build",
    "compile_engines",
    "verify",
]


def _no_step(what: str, done: int, steps: int) -> None:
    """Show no step."""


def _nothing(_: object) -> None:
    """Show nothing."""


def build(
    options: BuildOptions, on_step: OnStep = _no_step, notice: Callable[[str], None] = _nothing
) -> Bundle:
    """Build a bundle, prove its parity with the reference, publish it, and return it opened.

    What an interrupted build had finished is kept for the next one. `notice` is told what will be
    built and what that takes. The bundle's measures are `bundle.manifest.parity`.

    Raises ConfigError on options that are impossible or contradict each other, CheckpointError on
    weights that cannot be read or do not fit, or when the disk has no room, ExportError when there
    is too little memory or a graph does not come out as it must, ParityError when a measure exceeds
    its tolerance. Nothing is published then, and an earlier bundle of that name stays.
    """
    with needs_extra("export"):
        from varedit_export.assemble import assemble
        from varedit_export.estimate import needs
        from varedit_export.requests import plan_of

    plan = plan_of(options)
    notice(f"{plan}\n  needs {needs(plan)}")
    assemble(plan, on_step)
    return Bundle.open(plan.request.target)


def compile_engines(
    bundle: Bundle | AnyPath,
    options: EngineOptions = EngineOptions(),
    on_step: OnStep = _no_step,
    notice: Callable[[str], None] = _nothing,
) -> "EngineSet":
    """Compile a variant's graphs to TensorRT engines, or open those that were compiled before.

    A compilation that was interrupted goes on at the graph it had reached. `notice` is told what
    the GPU will have to hold, and why engines that are there are compiled again.

    Raises what `options.compiler()` does; ConfigError on an unknown layout, BackendError when a
    graph does not compile, BundleError when engines are there that were built on another machine.
    """
    compiler = options.compiler()
    with needs_extra("export"):
        from varedit_engines import compile as engines

    job = engines.Job(_opened(bundle), options.layout, compiler, options.variant)
    notice(str(job))
    return engines.compile_engines(job, on_step, notice, options.again)


def verify(
    bundle: Bundle | AnyPath,
    options: VerifyOptions = VerifyOptions(),
    measured: Callable[[ParityLine], None] = _nothing,
) -> list[ParityLine]:
    """Compare every graph of a bundle with the reference, teacher-forced; return all measures.

    The reference takes the bundle's own weights. `measured` is called with every measure, those
    that fail too.

    Raises ParityError, when all has been measured, if a measure exceeds its tolerance or is not
    finite; ConfigError on a variant without a backend to run it; what `backend.open` does where the
    backend cannot run here.
    """
    backend = choose(options.backend)
    if backend.spec.name == DEFAULT and options.variant:
        raise ConfigError("--variant: all are compared; leave it out, or name another --backend")
    with needs_extra("export"):
        from varedit_export.parity.verify import compare_bundle, compare_recording, gate
        from varedit_reference.golden import open_recording

    opened, others = _opened(bundle), iter(())
    if backend.spec.name != DEFAULT:  # opened first: what it misses is said before the comparison
        from varedit_export.parity.verify_engines import compare_chosen

        others = compare_chosen(opened, backend, options.variant)
    opened.verify_weights()
    recorded = iter(())
    if options.golden is not None:
        recorded = compare_recording(opened, open_recording(Path(options.golden)))
    lines = []
    for line in chain(compare_bundle(opened), recorded, others):
        measured(line)
        lines.append(line)
    return gate(iter(lines))


def _opened(bundle: Bundle | AnyPath) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)

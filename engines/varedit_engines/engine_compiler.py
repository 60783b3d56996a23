"""Compile one graph to one engine, with TensorRT or TensorRT for RTX.

TensorRT compiles for the GPU it runs on; TensorRT for RTX also for named architectures, ahead of
time and without a GPU. Networks are strongly typed: the graph's types are the engine's precision.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

from varedit_engines.engine_report import EngineReport, engine_report
from varedit_engines.progress import OnStep
from varedit_engines.timing_cache import kept_timings, timings_file
from varedit_runtime.backends.engines.import_tensorrt import (
    ENGINE_KINDS,
    RTX,
    EngineKind,
    create,
    import_tensorrt,
    listening,
    no_engines_for,
    rtx_architectures,
    the_logger,
)
from varedit_runtime.backends.interrupt import held_signals
from varedit_runtime.errors import BackendError, ConfigError, shown
from varedit_runtime.precision import FLOAT32, Precision
from varedit_runtime.values import CheckedOptions

Hardware = Literal["ampere-plus", "same-compute-capability"]


@dataclass(frozen=True, kw_only=True)
class Flags(CheckedOptions):
    """Settings of the compiler; None leaves one to the library.

    workspace: bytes of GPU memory that a layer may use for itself. optimisation: 0 (compiles fast)
    to 5 (runs fast). aux_streams: streams besides its own that an engine may use, each with scratch
    memory; by default none, as the captured graphs of our runtime are one sequence. tf32: allow
    fp32 factors to be rounded to TF32. version_compatible (TensorRT only): let later minor versions
    run the engines, not just the one that compiled them. hardware_compatible (TensorRT only): let
    all GPUs since Ampere, or all of this compute capability, run them, not just this model.
    Compatible engines may be slower. Raises ConfigError on an unknown hardware_compatible and on
    what are no numbers or out of range.
    """

    workspace: int | None = None
    optimisation: int | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: Hardware | None = None
    aux_streams: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workspace is not None and not 1 <= self.workspace <= 2**60:
            raise ConfigError(f"workspace is {shown(self.workspace)}; give bytes, at least 1")
        if self.optimisation is not None and not 0 <= self.optimisation <= 5:
            raise ConfigError(
                f"optimisation is {shown(self.optimisation)}; give an integer from 0 to 5"
            )
        if not 0 <= self.aux_streams <= 64:
            raise ConfigError(
                f"aux_streams is {shown(self.aux_streams)}; give an integer from 0 to 64"
            )


class Compiled(NamedTuple):
    """A compiled engine: its plan, and what it consists of."""

    plan: memoryview
    report: EngineReport


class EngineCompiler:
    """A compiler for one backend, one or several architectures, and some flags.

    architectures: those of the GPUs to compile for, as in "sm89" (RTX only); by default this
    machine's GPU. Raises MissingExtraError if the backend is not installed; ConfigError on an
    unknown backend, an architecture that RTX does not compile for (this machine's included) or
    flags that the backend or its version does not have; BackendError if there is no GPU and none
    was named.
    """

    def __init__(
        self, backend: EngineKind, architectures: Sequence[str] = (), flags: Flags = Flags()
    ) -> None:
        check_compiler(backend, architectures, flags)
        self._trt = import_tensorrt(backend, compiling=True)
        if flags.hardware_compatible is not None:
            _level(self._trt, flags.hardware_compatible)
        self.backend: EngineKind = backend
        named = [name.lower() for name in architectures]
        self.gpu = "+".join(named) or this_gpu(backend)
        # By default RTX compiles for some architectures, which may not include this GPU's.
        self._architectures = _architectures(self._trt, named, self.gpu) if backend == RTX else []
        self._flags = flags

    @property
    def tools(self) -> dict[str, str]:
        return {self.backend: str(self._trt.__version__)}

    @property
    def flags(self) -> dict[str, str]:
        """The flags as text, for a recipe."""
        return {name: str(value) for name, value in asdict(self._flags).items()}

    def compile(
        self,
        name: str,
        graph: bytes,
        folder: Path,
        profiles: Sequence[Mapping[str, tuple[int, ...]]],
        on_step: OnStep,
    ) -> Compiled:
        """Compile an ONNX graph, whose weights are in the folder.

        profiles: the shapes of all inputs, one mapping per fixed profile; none if shapes are
        static. Ctrl-C stops it. Raises BackendError if the graph cannot be parsed or compiled.
        """
        trt = self._trt
        builder = create(trt, "Builder")
        flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        parser = trt.OnnxParser(network, the_logger(trt))
        # Parse the bytes that were checked; the path only says where the weights are.
        if not parser.parse(graph, str(folder / f"{name}.onnx")):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise BackendError(f"{self.backend} cannot read graph {name}: {'; '.join(errors)}")
        config = self._config(builder)
        if len(profiles) == 1:  # then nothing is dynamic, and the engine need not be
            _fix_inputs(network, profiles[0])
            profiles = ()
        for shapes in profiles:
            config.add_optimization_profile(_fixed_profile(builder, shapes))
        with (
            _monitored(trt, config, name, on_step) as stopped,
            self._timings(config),
            listening(trt, to_all=True) as log,
        ):
            plan = builder.build_serialized_network(network, config)
        if stopped:  # and the program's own handler let it go on
            raise KeyboardInterrupt
        if plan is None:
            raise BackendError(f"{self.backend} cannot compile graph {name}: {log.reason()}")
        whole = memoryview(plan).cast("B")  # TensorRT's memory claims to hold floats
        return Compiled(whole, engine_report(len(whole), log.messages or ()))

    def _timings(self, config: Any) -> AbstractContextManager[None]:
        if self.backend == RTX:  # measures nothing while it compiles
            return nullcontext()
        return kept_timings(config, timings_file(str(self._trt.__version__), self.gpu))

    def _config(self, builder: Any) -> Any:
        trt, flags = self._trt, self._flags
        config = builder.create_builder_config()
        config.max_aux_streams = flags.aux_streams
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log lists the kernels
        if not flags.tf32:  # TensorRT allows it by default
            config.clear_flag(trt.BuilderFlag.TF32)
        if self.backend == RTX:  # a CUDA graph cannot capture memory allocated during a run
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if flags.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if flags.hardware_compatible is not None:
            config.hardware_compatibility_level = _level(trt, flags.hardware_compatible)
        if flags.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace)
        if flags.optimisation is not None:
            config.builder_optimization_level = flags.optimisation
        if self._architectures:
            config.num_compute_capabilities = len(self._architectures)
            for i, architecture in enumerate(self._architectures):
                self._target(config, architecture, i)
        return config

    def _target(self, config: Any, architecture: Any, index: int) -> None:
        """Compile for an architecture. Otherwise the library would silently choose some itself."""
        with listening(self._trt) as log:
            if not config.set_compute_capability(architecture, index):
                raise BackendError(
                    f"{self.backend} {self._trt.__version__} does not compile for "
                    f"{architecture.name.lower()}: {log.reason()}"
                )


def check_compiler(
    backend: EngineKind, architectures: Sequence[str] = (), flags: Flags = Flags()
) -> None:
    """Check a compiler's arguments by themselves, whether or not the backend is installed.

    Raises ConfigError on an unknown backend, on what is no architecture, and on what the backend
    does not have.
    """
    if backend not in ENGINE_KINDS:
        raise ConfigError(
            f"there is no backend {shown(backend)}; there are {', '.join(ENGINE_KINDS)}"
        )
    if architectures and backend != RTX:
        raise ConfigError(
            f"only {RTX} compiles for named architectures: leave them out, and {backend} "
            "compiles for this machine's GPU"
        )
    for name in architectures:
        if not re.fullmatch(r"sm\d+", name.lower()):
            raise ConfigError(f"architecture is {shown(name)}; give a GPU's, such as sm89")
    if backend == RTX and (flags.version_compatible or flags.hardware_compatible):
        raise ConfigError(
            f"{RTX} has no version- or hardware-compatible engines: leave that out, and name "
            "all architectures that they are for (--architecture sm86 --architecture sm89)"
        )


def _level(trt: ModuleType, name: Hardware) -> Any:
    """Return TensorRT's constant for a level of compatibility; raise ConfigError if it has none."""
    members = trt.HardwareCompatibilityLevel.__members__.items()
    levels = {member.lower().replace("_", "-"): level for member, level in members}
    if name not in levels:
        known = ", ".join(other for other in get_args(Hardware) if other in levels)
        raise ConfigError(
            f"TensorRT {trt.__version__} cannot compile engines for {name}, only for {known}"
        )
    return levels[name]


def this_gpu(backend: EngineKind) -> str:
    """Return the name of this machine's GPU: "sm90" for RTX, "sm90 NVIDIA H200" for TensorRT.

    Raises BackendError if there is none.
    """
    try:
        gpu = importlib.import_module("cuda.core").Device()
        major, minor = gpu.compute_capability
        model = "" if backend == RTX else f" {gpu.name}"
    except Exception as error:  # the driver's errors have no common base, and may lack a module
        raise BackendError(
            "no NVIDIA GPU can be used here: compile for a named architecture with tensorrt-rtx "
            "(--architecture sm89), or on a machine with one"
        ) from error
    return f"sm{major}{minor}{model}"


def check_precision(precision: Precision, gpu: str) -> None:
    """Raise ConfigError if no engines of a precision can be compiled for a GPU, or for several."""
    if why := precision.not_on(gpu):
        raise ConfigError(f"no engine can be compiled of it: {why}")


def slow_precision(precision: Precision) -> str | None:
    """Say what engines of fp32 cost, in one line; None for other precisions."""
    if precision.type != FLOAT32:
        return None
    return (
        f"engines of {precision.name} do not fuse large attentions, and move about five times "
        "the bytes that fp16 does: build with --precision fp16 or bf16 for speed"
    )


def _architectures(trt: ModuleType, named: Sequence[str], here: str) -> list[Any]:
    """Return RTX's constants for the named architectures, or for this machine's if none is."""
    known, wanted = rtx_architectures(trt), named or [here]
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(no_engines_for(unknown[0], known))
    return [known[name] for name in wanted]


def _fix_inputs(network: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a network's inputs their shapes; weights, which are inputs as well, have theirs."""
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.name in shapes:
            tensor.shape = shapes[tensor.name]


def _fixed_profile(builder: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape, shape, shape)
    return profile


@contextmanager
def _monitored(trt: ModuleType, config: Any, name: str, on_step: OnStep) -> Iterator[list[int]]:
    """Report the builder's progress, and let signals stop it; the builder then returns nothing.

    Yields the signals that arrived.
    """
    with held_signals() as arrived:

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                super().__init__()
                self.steps: dict[str, int] = {}

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                if not parent:
                    self.steps[phase] = steps

            def step_complete(self, phase: str, step: int) -> bool:
                if phase in self.steps:
                    on_step(name, step + 1, self.steps[phase])
                return not arrived

            def phase_finish(self, phase: str) -> None:
                self.steps.pop(phase, None)

        config.progress_monitor = monitor = Monitor()
        yield arrived
        del monitor

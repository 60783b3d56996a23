"""A bundle's graphs on ONNX Runtime: memory is allocated once, keys and values appended in place.

Prefill and all scales run on the one graph of symbolic lengths: each further session would hold its
own packed copy of the weights.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.host import return_freed_memory
from varedit_runtime.backends.interrupt import run_stoppable
from varedit_runtime.backends.onnxruntime import cuda
from varedit_runtime.backends.onnxruntime.integers import check_exact
from varedit_runtime.backends.onnxruntime.options import PROVIDERS, OnnxRuntimeOptions
from varedit_runtime.backends.wiring import (
    FUSED,
    PICTURES,
    SYMBOLIC,
    TEXT,
    Crowded,
    Step,
    View,
    constants,
    crowded,
    text_lengths,
    values_of,
)
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, one_line, readable_size
from varedit_runtime.manifest import Variant
from varedit_runtime.precision import Precision

ARENAS = {"cpu": "cpu:0", "cuda": "gpu:0"}
# By the provider that a graph is loaded on.
ADVICE = {
    "cpu": "run `varedit-export verify` on the bundle, or build it again",
    "cuda": "check the driver, install the libraries of CUDA and cuDNN by `pip install "
    '"varedit-export[gpu]"`, or use provider cpu',
}


# What ONNX Runtime says once `onnxruntime.set_global_thread_pool_sizes` was called.
_ONE_POOL = "use_per_session_threads must be false when using a global thread pool"


class Buffer:
    """Memory on the provider's device, allocated once; graphs read and write parts of it."""

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        """Allocate. Raises BackendError if there is not enough memory."""
        self.shape, self.dtype, self.device = tuple(shape), np.dtype(dtype), device
        # ONNX Runtime cannot make a buffer without elements.
        held = self.shape if prod(self.shape) else (1,)
        with self._fitting():
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(held, self.dtype, device)

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def part(self, shape: Sequence[int] | None = None, offset: int = 0) -> "Part":
        """Return all of it, or the part of this shape from a byte on."""
        shape = self.shape if shape is None else tuple(shape)
        return Part(self, shape, self._value.data_ptr() + offset)

    def drop(self, cache: Crowded) -> None:
        """Move a cache's conditional rows together."""
        start = self._value.data_ptr()
        if self.device == "cuda":
            for target, source, count in cache.copies():
                cuda.copy_runs(start + target, start + source, cache.kept, count)
        else:
            memory = (ctypes.c_uint8 * self.size).from_address(start)
            cache.move(np.ctypeslib.as_array(memory))

    def read(self) -> np.ndarray:
        """Copy the buffer to the host."""
        return self._value.numpy().reshape(-1)[: prod(self.shape)].reshape(self.shape).copy()

    def write(self, array: np.ndarray) -> None:
        """Copy an array to the buffer. Raises ValueError if its shape or type is another."""
        if (array.shape, array.dtype) != (self.shape, self.dtype):  # ONNX Runtime compares sizes
            raise ValueError(
                f"an array is {array.dtype} {array.shape}; it must be {self.dtype} {self.shape}"
            )
        if array.size:
            self._value.update_inplace(np.ascontiguousarray(array))

    def fill(self, value: float) -> None:
        """Set all elements. Raises BackendError if the host lacks memory for a copy."""
        with self._fitting():
            self.write(np.full(self.shape, value, self.dtype))

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # NumPy, ONNX Runtime and CUDA each raise errors of their own
            raise BackendError(
                f"no memory on the {self.device} for the {readable_size(self.size)} of a buffer "
                f"({one_line(error)}): end other programs, or use a bundle of a smaller --res or "
                "--batch"
            ) from error


@dataclass(frozen=True)
class Part:
    """A part of a buffer, as a graph sees it; it keeps the buffer alive."""

    buffer: Buffer
    shape: tuple[int, ...]
    pointer: int

    def binding(self) -> tuple[Any, ...]:
        return self.buffer.device, 0, self.buffer.dtype, self.shape, self.pointer


def load_graph(
    graph: bytes,
    folder: Path,
    provider: str = "cpu",
    threads: int = 0,
    arena: bool = True,
    captured: bool = False,
) -> ort.InferenceSession:
    """Load the bytes of an ONNX file, whose weights lie in a folder, into ONNX Runtime.

    threads: 0 for one per core, on provider cuda for none besides the caller's. arena: keep freed
    memory for the next run. captured: see `Session`. Raises BackendError if threads are named and
    the program has one pool for all sessions, and ONNX Runtime's own errors, which have no common
    base.
    """
    settings = _session_options(folder, provider, threads, arena)
    options = cuda.provider_options(captured) if provider == "cuda" else {}
    chosen = (PROVIDERS[provider], options)
    # Without our leave ONNX Runtime would print why a provider fails, and go on with another.
    make = partial(ort.InferenceSession, graph, settings, providers=[chosen], enable_fallback=0)
    try:
        return make()
    except Exception as error:
        if _ONE_POOL not in str(error):
            raise
        if threads:
            raise BackendError(
                "this program has one pool of threads for all sessions of ONNX Runtime: leave out "
                "threads"
            ) from error
    settings.use_per_session_threads, settings.intra_op_num_threads = False, 0
    return make()


def _session_options(folder: Path, provider: str, threads: int, arena: bool) -> ort.SessionOptions:
    """Return what all sessions have in common, whatever their graph; see `load_graph`."""
    settings = ort.SessionOptions()
    # A session has threads of its own, and no arithmetic for them where CUDA computes.
    settings.intra_op_num_threads = threads or int(provider == "cuda")
    settings.enable_cpu_mem_arena = arena
    settings.enable_mem_pattern = False  # it keeps memory for every length ever seen
    # Errors are raised, and are the caller's to show: ONNX Runtime would print them as well.
    settings.log_severity_level = 4
    for key, value in {
        # The graph comes as the bytes that were checked, not as a file.
        "session.model_external_initializers_file_folder_path": str(folder),
        # Sessions run in turn: the threads of one must not keep the next one's from the cores.
        "session.force_spinning_stop": "1",
        # The checks read ONNX: bytes may be a model in ONNX Runtime's own format as well.
        "session.load_model_format": "ONNX",
        # Nor must idle ones keep other programs', or their own session's: where a core is
        # shared, spinning for the default of some 20 ms costs a tenth of an edit.
        "session.intra_op.spin_duration_us": "50",
        "session.record_ep_graph_assignment_info": "1" if provider == "cuda" else "0",
    }.items():
        settings.add_session_config_entry(key, value)
    return settings


class Session:
    """One graph, loaded. Inputs and outputs are parts of buffers."""

    def __init__(
        self,
        name: str,
        graph: bytes,
        folder: Path,
        provider: str,
        threads: int,
        captured: bool = False,
    ) -> None:
        """Load a graph; see `load_graph`. Raises BackendError.

        captured: launch every run of this session as one CUDA graph, which is captured in the
        first run of its number and has the addresses of that run; on provider cuda alone.
        """
        self._name, self._provider, self._captured = name, provider, captured
        missing = cuda.preload_libraries() if provider == "cuda" else ""
        with _explained(f"load graph {name}", provider):
            self._session = load_graph(graph, folder, provider, threads, captured=captured)
        if PROVIDERS[provider] not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime could not start {PROVIDERS[provider]} and would have gone on with "
                f"the CPU{missing and f' ({missing})'}: {ADVICE[provider]}"
            )
        if provider == "cuda":
            cuda.check_placement(name, self._session)

    def run(self, inputs: Mapping[str, Part], outputs: Mapping[str, Part], number: int = 0) -> None:
        """Write the outputs where they belong.

        number: of the captured run; one number, always the same parts. Ctrl-C stops the graph at
        its next node, except a captured one, which takes milliseconds.
        """
        options = ort.RunOptions()
        for key, value in self._run_settings(number).items():
            options.add_run_config_entry(key, value)
        binding = self._session.io_binding()
        with _explained(f"run graph {self._name}", self._provider):
            for name, part in inputs.items():
                binding.bind_input(name, *part.binding())
            for name, part in outputs.items():
                binding.bind_output(name, *part.binding())
            run = partial(self._session.run_with_iobinding, binding, options)
            if self._captured:  # stopped in a capture, the session could not capture again
                run()
            else:
                run_stoppable(run, partial(setattr, options, "terminate", True))

    def _run_settings(self, number: int) -> dict[str, str]:
        if self._captured:  # the graphs contain addresses of the arena, which must stay as it is
            return {"gpu_graph_id": str(number + 1)}  # 0 is ONNX Runtime's own
        # Activations are freed after a run: graphs run in turn, and the largest decides the peak.
        return {"memory.enable_memory_arena_shrinkage": ARENAS[self._provider]}


class OnnxBackend(GraphBackend):
    """All graphs of a variant on one provider, for one edit at a time."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        options: OnnxRuntimeOptions,
        twin: str | None = None,
    ) -> None:
        """Load all graphs and allocate their memory; the text encoder's later, if it is offloaded.

        twin: the graph that runs prefill and scales; by default FUSED on provider cuda, where the
        bundle has it, else SYMBOLIC. Raises BackendError if the installed onnxruntime lacks the
        provider, it does not run the bundle's precision, a graph cannot be loaded or memory is too
        small; BundleError if a graph is missing or damaged, or does not fit the others.
        """
        provider = options.provider
        check_provider(provider)
        if twin is None:
            twin = FUSED if provider == "cuda" and FUSED in variant.graphs else SYMBOLIC
        super().__init__(
            variant,
            bundle.manifest.model,
            provider,
            symbolic=True,
            twin=twin,
            unguided=twin != FUSED,  # it has all rows
        )
        _check_precision(bundle.manifest.policy, provider)
        self._threads, self._twin = options.threads or 0, twin
        fewest = self._steps(self.text_lengths[0], self.batches[0])
        values_of(list(fewest.values()))  # raises if they do not fit
        self._bundle, self._offloads = bundle, bool(options.offload)
        self._sessions = self._load(bundle)
        # What is held: True: the text encoder's part; False: all else, or everything if nothing is
        # offloaded; None: neither.
        self._phase: bool | None = None
        self._values: dict[str, Buffer] = {}
        self._enter(text=False)

    @property
    def text_lengths(self) -> Sequence[int]:
        # What CUDA captured has the addresses, and so the shapes, of one length.
        short = self.provider == "cpu" and self._twin == SYMBOLIC
        return text_lengths(self.variant.text_tokens) if short else super().text_lengths

    @property
    def batches(self) -> Sequence[int]:
        most = self.variant.batch
        return range(1, most + 1) if self._twin == SYMBOLIC else super().batches

    @property
    def buffer_bytes(self) -> int:
        return sum(value.size for value in self._values.values())

    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        super().condition(inputs)
        if PICTURES in self._values:  # of fewer pictures it has the beginning: 0 .. b-1, twice
            self._values[PICTURES].write(np.arange(self.variant.rows) % self._batch)

    def prepare_weights(self, bundle: Bundle) -> Callable[[], None]:
        # Both are in memory until the old sessions go: a failure leaves those as they are.
        return partial(self._take_weights, bundle, self._load(bundle))

    def _take_weights(self, bundle: Bundle, sessions: dict[str, Session]) -> None:
        self._bundle, self._sessions = bundle, sessions
        if self._offloads:  # the text encoder may have been held
            self._phase = None

    def close(self) -> None:
        self._sessions, self._values = {}, {}

    def _enter(self, text: bool) -> None:
        """Hold the session and values of the text encoder, or the values of all other stages.

        Sessions of other stages are always held, and everything is if nothing is offloaded. text:
        whether the text encoder runs next. What was held is freed first; after an error nothing is
        held, and the next run tries again.
        """
        text = text and self._offloads
        if text == self._phase:
            return
        self._phase, self._values = None, {}
        if self._offloads:
            self._sessions.pop(TEXT, None)
            return_freed_memory()
        if text:
            self._sessions |= self._load(self._bundle, text)
            self._bundle.check_stands()  # libraries open weights by their path
        self._values = self._allocate(
            [step for step in self.steps.values() if self._holds(step.stage, text)]
        )
        self._phase = text

    def _holds(self, stage: str, text: bool) -> bool:
        """Return whether a stage belongs to what is held; text: see `_enter`."""
        return not self._offloads or (stage == TEXT) == text

    def _load(self, bundle: Bundle, text: bool = False) -> dict[str, Session]:
        """Load graphs, by stage, with a bundle's weights; text: see `_enter`."""
        # When a bundle is opened, all graphs are checked before any makes a library open files; the
        # text encoder's alone is read again when its turn comes.
        stages = [TEXT] if text else dict.fromkeys(step.stage for step in self.steps.values())
        graphs = {stage: read_graph(bundle, self.variant, stage) for stage in stages}
        return {
            stage: Session(
                stage,
                graph,
                bundle.graphs_folder,
                self.provider,
                self._threads,
                # Captured graphs contain addresses, and values are allocated again.
                captured=self.provider == "cuda" and stage == self._twin and not self._offloads,
            )
            for stage, graph in graphs.items()
            if self._holds(stage, text)
        }

    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._enter(step.stage == TEXT)
        with _explained(f"run graph {step.stage}", self.provider):
            for name, array in given.items():
                self._values[name].write(array)
        self._sessions[step.stage].run(
            {name: self._part(view) for name, view in step.inputs.items()},
            {name: self._part(view) for name, view in step.outputs.items()},
            number=step.profile,
        )
        return {name: self._values[name].read() for name in step.read}

    def _drop(self, scale: int) -> None:
        with _explained("move its caches together", self.provider):
            for cache in crowded(list(self.edit_steps.values()), scale):
                self._values[cache.value].drop(cache)

    def _allocate(self, steps: Sequence[Step]) -> dict[str, Buffer]:
        """Allocate all values where the graphs run, and set those that no graph writes."""
        written = {view.value for step in steps for view in step.outputs.values()}
        known = constants(self.variant, self.model)
        values = {
            name: Buffer(value.shape, value.dtype, self.provider)
            for name, value in values_of(steps).items()
        }
        for name in values.keys() - written:
            if name in known:
                values[name].write(known[name])
            else:
                values[name].fill(0)
        return values

    def _part(self, view: View) -> Part:
        return self._values[view.value].part(view.shape, view.offset)


def check_provider(provider: str) -> None:
    """Raise BackendError unless the installed onnxruntime has the provider, and is new enough."""
    available = ort.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise BackendError(
            f"the installed onnxruntime has no {PROVIDERS[provider]}, only {', '.join(available)}: "
            "run `pip uninstall onnxruntime` and "
            '`pip install --force-reinstall "onnxruntime-gpu[cuda,cudnn]"`'
        )
    if provider == "cuda":
        cuda.check_version()


def _check_precision(precision: Precision, provider: str) -> None:
    """Raise BackendError if the provider does not compute a precision here."""
    if not precision.onnxruntime:
        raise BackendError(
            f"the bundle is {precision.name}, which ONNX Runtime cannot run: build with "
            "--precision fp32 for a CPU or fp16 for a GPU, or run engines"
        )
    if provider == "cuda" and precision.no_cuda:
        raise BackendError(
            f"the bundle cannot run on provider cuda: {precision.no_cuda}, or use provider cpu"
        )
    check_exact(precision)


@contextmanager
def _explained(what: str, provider: str) -> Iterator[None]:
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # onnxruntime's errors have no other common base
        raise BackendError(
            f"ONNX Runtime cannot {what} ({one_line(error)}): {ADVICE[provider]}"
        ) from error

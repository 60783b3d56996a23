"""A bundle's graphs on ONNX Runtime: memory allocated once, keys and values appended in place.

All scales, and the prefill, run on the one symbolic-length graph: every further session would hold
a packed copy of the weights of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, BundleError
from varedit_runtime.interrupt import stopped_by_interrupt
from varedit_runtime.manifest import TensorSpec, Variant
from varedit_runtime.resizing import bilinear_matrix

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CODERS = ("text_encoder", "image_encoder", "image_decoder")  # arrays in, an array out
KINDS = ("key", "value")


@dataclass(frozen=True)
class Sampling:
    """How a scale's bits are chosen.

    noise float32 [B, h, w, c] in [0, 1). forced_bits, forced_mask bool of the same shape: bits
    that are taken as they are where the mask is set.
    """

    noise: np.ndarray
    guidance_scale: float
    temperature: float
    forced_bits: np.ndarray | None = None
    forced_mask: np.ndarray | None = None


@dataclass(frozen=True)
class ScaleOutput:
    """logits float32 [B, h, w, c, 2], guided; bits bool [B, h, w, c]; running_sum [B, d, H, W]."""

    logits: np.ndarray
    bits: np.ndarray
    running_sum: np.ndarray


class Buffer:
    """Memory on the provider's device, allocated once; parts of it are bound to graphs."""

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        self.shape, self.dtype, self.device = tuple(shape), np.dtype(dtype), device
        # ONNX Runtime makes no buffer without elements.
        held = self.shape if prod(self.shape) else (1,)
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(held, self.dtype, device)

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def part(self, shape: Sequence[int] | None = None, first: int = 0) -> "Part":
        """All of it, or the part of a shape from entry `first` of the first axis on."""
        offset = first * prod(self.shape[1:]) * self.dtype.itemsize
        shape = self.shape if shape is None else tuple(shape)
        return Part(self, shape, self._value.data_ptr() + offset)

    def read(self, shape: Sequence[int]) -> np.ndarray:
        """A copy of the leading elements, in a shape."""
        return self._value.numpy().reshape(-1)[: prod(shape)].reshape(shape).copy()

    def fill(self, value: float) -> None:
        self._value.update_inplace(np.full(self.shape, value, self.dtype))


@dataclass(frozen=True)
class Part:
    """Part of a buffer, as a graph sees it; it keeps the buffer alive."""

    buffer: Buffer
    shape: tuple[int, ...]
    pointer: int

    def binding(self) -> tuple[Any, ...]:
        return self.buffer.device, 0, self.buffer.dtype, self.shape, self.pointer


class Session:
    """One graph, loaded. Inputs are arrays or parts of buffers, outputs parts of buffers."""

    def __init__(self, name: str, graph: bytes, folder: Path, provider: str, threads: int) -> None:
        """graph: an ONNX file, whose weights lie in the folder. threads: 0 for one per core."""
        self._name = name
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.enable_mem_pattern = False  # it keeps memory for every length ever seen
        settings.log_severity_level = 3
        for key, value in {
            # The graph comes as the bytes that were checked, not as a file.
            "session.model_external_initializers_file_folder_path": str(folder),
            # Sessions run in turn: the threads of one must not keep the next one's from the cores.
            "session.force_spinning_stop": "1",
            # Nor must idle ones keep other programs', or their own session's: where a core is
            # shared, spinning for the default of some 20 ms costs a tenth of an edit.
            "session.intra_op.spin_duration_us": "50",
        }.items():
            settings.add_session_config_entry(key, value)
        self._options = ort.RunOptions()
        # Activations are freed after a run: graphs run in turn, and the largest decides the peak.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with _explained(f"load graph {name}"):
            self._session = ort.InferenceSession(graph, settings, providers=[PROVIDERS[provider]])
        if PROVIDERS[provider] not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime could not start {PROVIDERS[provider]} and would have gone on with "
                "the CPU: check the driver and the CUDA and cuDNN libraries, or use provider cpu"
            )

    def run(self, inputs: Mapping[str, np.ndarray | Part], outputs: Mapping[str, Part]) -> None:
        """Write the outputs where they belong. Ctrl-C stops the graph at its next node."""
        self._options.terminate = False
        binding = self._session.io_binding()
        with _explained(f"run graph {self._name}"):
            for name, value in inputs.items():
                if isinstance(value, Part):
                    binding.bind_input(name, *value.binding())
                else:
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
            for name, part in outputs.items():
                binding.bind_output(name, *part.binding())
            with stopped_by_interrupt(self._stop):
                self._session.run_with_iobinding(binding, self._options)

    def _stop(self) -> None:
        self._options.terminate = True


class OnnxBackend:
    """All graphs of a variant, on one provider. One edit at a time."""

    def __init__(self, bundle: Bundle, variant: Variant, provider: str, threads: int) -> None:
        """provider: "cpu" or "cuda"; threads: 0 for one per core.

        Raises BackendError when the provider is unknown or not in the installed onnxruntime, or
        when a graph cannot be loaded, BundleError when one is missing or damaged.
        """
        check_provider(provider)
        self.variant, self.model, self.provider = variant, bundle.manifest.model, provider
        self._guided = variant.rows > variant.batch
        self._sar = self.model.conditioning == "sar"
        self._areas = [rows * columns for rows, columns in variant.grids]
        self._bits = self.model.token_channels
        self._sessions = {
            stage: Session(
                stage,
                bundle.graph_bytes(variant.name, stage),
                bundle.graphs_folder,
                provider,
                threads,
            )
            for stage in self._stages()
        }
        self._allocate()

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        """Ids int64 and mask bool [B, T] -> features float32 [B, T, text]."""
        return self._code("text_encoder", {"token_ids": token_ids, "text_mask": text_mask})

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures float32 [B, 3, H, W] in [-1, 1] -> source tokens [B, h, w, c]."""
        return self._code("image_encoder", {"pictures": pictures})

    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        """A sum of codes [B, d, H, W] -> pictures float32 [B, 3, H, W], not yet clamped."""
        return self._code("image_decoder", {"running_sum": running_sum})

    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Take the text of the edit to come: the inputs of the condition graph, by name."""
        self._sessions["condition"].run(
            inputs, {name: buffer.part() for name, buffer in self._text.items()}
        )

    def prefill(self, source_tokens: np.ndarray) -> None:
        """Take the source of the edit to come, tokens [B, h, w, c]; `condition` comes first."""
        last = len(self._areas) - 1
        grid = self.variant.grids[last]
        nothing = Sampling(np.zeros((*source_tokens.shape[:3], self._bits), np.float32), 1.0, 1.0)
        inputs = {"tokens": source_tokens, **self._place(last, 0), **self._past(None)}
        source = {
            f"new_{kind}.{i}": self._source[kind].part()
            if i == 0 and self._sar
            else self._caches[kind][i].part(self._kv_shape(self._areas[last]))
            for kind in KINDS
            for i in range(self.model.depth)
        }
        self._sums[0].fill(0)
        self._run(grid, (1, 1), inputs, nothing, source)
        if self._sar:
            self._sessions["references"].run(
                {f"source_{kind}": self._source[kind].part() for kind in KINDS},
                {name: buffer.part() for name, buffer in self._references.items()},
            )
        self._sums[0].fill(0)

    def predict(self, scale: int, sampling: Sampling) -> ScaleOutput:
        """Predict a scale; the prefill and, in order, the scales before it must have run."""
        grids = self.variant.grids
        grid, following = grids[scale], grids[min(scale + 1, len(grids) - 1)]
        before = sum(self._areas[:scale])
        inputs = {
            "tokens": self._tokens[0].part((self.variant.batch, *grid, self._bits)),
            **self._place(scale, self._areas[-1] + before, first=scale == 0),
            **self._past(scale),
        }
        new = {
            f"new_{kind}.{i}": self._caches[kind][i].part(
                self._kv_shape(self._areas[scale]), before + self._source_length(i)
            )
            for kind in KINDS
            for i in range(self.model.depth)
        }
        self._run(grid, following, inputs, sampling, new)
        self._tokens.reverse()
        self._sums.reverse()
        shape = (self.variant.batch, *grid, self._bits)
        return ScaleOutput(
            self._logits.read((*shape, 2)), self._drawn.read(shape), self.running_sum
        )

    @property
    def running_sum(self) -> np.ndarray:
        """The sum of codes [B, d, H, W] of the scales predicted so far."""
        return self._sums[0].read(self._sums[0].shape)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the caches and of what passes between graphs, allocated once."""
        return sum(buffer.size for buffer in self._all_buffers)

    def _stages(self) -> list[str]:
        """The graphs that run: all but the static ones of the scales and the prefill."""
        text = ["text_encoder"] if "text_encoder" in self.variant.graphs else []
        references = ["references"] if self._sar else []
        return [*text, "image_encoder", "condition", *references, "scale", "image_decoder"]

    def _code(self, stage: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """A copy of the one output of one of CODERS."""
        ((name, buffer),) = self._coded[stage].items()
        self._sessions[stage].run(inputs, {name: buffer.part()})
        return buffer.read(buffer.shape)

    def _run(
        self,
        grid: tuple[int, int],
        following: tuple[int, int],
        inputs: Mapping[str, np.ndarray | Part],
        sampling: Sampling,
        new: Mapping[str, Part],
    ) -> None:
        """One run of the scale graph, from the first of each pair of buffers to the second."""
        batch = self.variant.batch
        shape = (batch, *grid, self._bits)
        self._sessions["scale"].run(
            {
                **inputs,
                "running_sum": self._sums[0].part(),
                **self._resizing(grid, following),
                **self._chosen(sampling, shape),
                **{name: buffer.part() for name, buffer in self._text.items()},
            },
            {
                "logits": self._logits.part((*shape, 2)),
                "bits": self._drawn.part(shape),
                "running_sum_out": self._sums[1].part(),
                "next_tokens": self._tokens[1].part((batch, *following, self._bits)),
                **new,
            },
        )

    def _allocate(self) -> None:
        """All memory between graphs, from the shapes in the manifest."""
        graphs = self.variant.graphs
        finest = (self.variant.batch, *self.variant.grids[-1], self._bits)
        inputs = {tensor.name: tensor for tensor in graphs["scale"].inputs}
        kv = inputs["cross_key.0"].dtype
        self._all_buffers: list[Buffer] = []
        self._coded = {
            stage: self._buffers(graphs[stage].outputs) for stage in CODERS if stage in graphs
        }
        self._text = self._buffers(graphs["condition"].outputs)
        self._references = self._buffers(graphs["references"].outputs) if self._sar else {}
        self._source = (
            {kind: self._buffer(self._kv_shape(self._areas[-1]), kv) for kind in KINDS}
            if self._sar
            else {}
        )
        self._caches = {
            kind: [
                self._buffer(self._kv_shape(self._source_length(i) + sum(self._areas)), kv)
                for i in range(self.model.depth)
            ]
            for kind in KINDS
        }
        self._tokens = [self._buffer(finest, "float32") for _ in range(2)]
        self._sums = [
            self._buffer(static_shape(inputs["running_sum"]), "float32") for _ in range(2)
        ]
        self._logits = self._buffer((*finest, 2), "float32")
        self._drawn = self._buffer(finest, "bool")

    def _buffers(self, specs: Sequence[TensorSpec]) -> dict[str, Buffer]:
        return {spec.name: self._buffer(static_shape(spec), spec.dtype) for spec in specs}

    def _buffer(self, shape: Sequence[int], dtype: str) -> Buffer:
        buffer = Buffer(shape, dtype, self.provider)
        self._all_buffers.append(buffer)
        return buffer

    def _kv_shape(self, tokens: int) -> tuple[int, ...]:
        heads = self.model.heads
        return tokens, self.variant.rows, heads, self.model.width // heads

    def _source_length(self, block: int) -> int:
        """The source's tokens in a block's cache: none in block 0 under SAR."""
        return 0 if self._sar and block == 0 else self._areas[-1]

    def _past(self, scale: int | None) -> dict[str, Part]:
        """What new tokens see: references and caches up to a scale; None: nothing, the prefill."""
        before = None if scale is None else sum(self._areas[:scale])
        seen: dict[str, Part] = {}
        for kind in KINDS:
            if self._sar:
                own = self._references[f"reference_{kind}.{scale or 0}"]
                length = 0 if scale is None else self._areas[scale]
                seen[f"reference_{kind}"] = own.part(self._kv_shape(length))
            for i, cache in enumerate(self._caches[kind]):
                length = 0 if before is None else self._source_length(i) + before
                seen[f"past_{kind}.{i}"] = cache.part(self._kv_shape(length))
        return seen

    def _place(self, level: int, first_position: int, first: bool = False) -> dict[str, np.ndarray]:
        return {
            "level": np.array([level], np.int64),
            "first_position": np.array([first_position], np.int64),
            "is_first": np.array([first]),
        }

    def _resizing(self, grid: tuple[int, int], following: tuple[int, int]) -> dict[str, np.ndarray]:
        """The matrices from a grid to the finest and from there to the following one."""
        patch, matrices = self.model.patch, {}
        for axis, name in enumerate(("rows", "columns")):
            own, finest, after = (
                side * patch for side in (grid[axis], self.variant.grids[-1][axis], following[axis])
            )
            up, down = bilinear_matrix(finest, own), bilinear_matrix(after, finest)
            matrices[f"up_{name}"] = up.reshape(finest, grid[axis], patch)
            matrices[f"down_{name}"] = down.reshape(following[axis], patch, finest)
        return matrices

    def _chosen(self, sampling: Sampling, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        nothing = np.zeros(shape, np.bool_)
        bits, mask = sampling.forced_bits, sampling.forced_mask
        inputs = {
            "temperature": np.array([sampling.temperature], np.float32),
            "noise": sampling.noise.astype(np.float32, copy=False),
            "forced_bits": nothing if bits is None else bits,
            "forced_mask": nothing if mask is None else mask,
        }
        if self._guided:
            inputs["guidance_scale"] = np.array([sampling.guidance_scale], np.float32)
        return inputs


def check_provider(provider: str) -> None:
    """Raises BackendError unless the installed onnxruntime has the provider."""
    if provider not in PROVIDERS:
        raise BackendError(f"no provider is called {provider!r}; there are {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise BackendError(
            f"the installed onnxruntime has no {PROVIDERS[provider]}, only {', '.join(available)}: "
            "run `pip uninstall onnxruntime` and `pip install --force-reinstall onnxruntime-gpu`"
        )


def static_shape(spec: TensorSpec) -> tuple[int, ...]:
    sizes = tuple(size for size in spec.shape if isinstance(size, int))
    if len(sizes) != len(spec.shape):
        raise BundleError(f"the bundle's {spec.name} has no static shape: build the bundle again")
    return sizes


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no other common base
        raise BackendError(
            f"ONNX Runtime cannot {what} ({' '.join(str(error).split())}): run `varedit-export "
            "verify` on the bundle, or build it again"
        ) from error

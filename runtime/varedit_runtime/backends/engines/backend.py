"""A variant's compiled engines on a GPU: memory is allocated once, every step is a CUDA graph.

Launching every kernel from the host, and copying caches between scales, costs time at every scale.
So noise and parameters are copied before the first scale, keys and values are written where the
next scale reads them, and if nobody listens between scales the whole edit is one launch. An edit
that a handle can end is a launch for each step, between which the host only looks at the handle.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np

from varedit_runtime.backends.base import (
    EditWhole,
    Prompts,
    Sampling,
    WeightsLostError,
    WholeEdit,
    condition_masks,
)
from varedit_runtime.backends.engines.cuda import CudaDevice
from varedit_runtime.backends.engines.device import Device, Engine, Launch, address_of
from varedit_runtime.backends.engines.engine_set import EngineSet, EngineSets
from varedit_runtime.backends.engines.import_tensorrt import EngineKind
from varedit_runtime.backends.engines.memory import aligned, budget, landing, lay_out, unaligned
from varedit_runtime.backends.engines.weights import EngineWeights
from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.handle import heeded
from varedit_runtime.backends.wiring import (
    CACHE,
    DECODER,
    NEGATIVE,
    TEXT,
    Step,
    View,
    constants,
    crowded,
    item_size,
    values_of,
)
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, BundleError, reason
from varedit_runtime.manifest import UNGUIDED, Variant, scale_of


class EngineBackend(GraphBackend):
    """All engines of a variant on one GPU, which makes one edit at a time."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        engines: EngineSet,
        device: Device,
        offload: str | None = None,
    ) -> None:
        """Load engines, which must have been checked to fit the bundle, and allocate memory.

        offload: see `OffloadOptions`. The text encoder's weights then lie in the caches' place, and
        are copied there before every run that follows another stage's. Raises BackendError if
        engines do not fit into the GPU's memory (before allocating any), cannot be loaded or hold
        the weights that are to be released; BundleError if a file is damaged.
        """
        recipe = engines.manifest.recipe
        if offload and recipe.layout != "external":
            raise BackendError(
                f"these engines contain their weights (layout {recipe.layout}), which cannot be "
                "released: leave out offload, or compile engines with `varedit-export engines "
                "--layout external`"
            )
        symbolic = recipe.layout == "profiles"
        # Baked engines hold the weights each: a second one of every scale would hold them again.
        unguided = recipe.layout != "baked"
        super().__init__(
            variant, bundle.manifest.model, recipe.backend, symbolic, unguided=unguided
        )
        inputs = dict(engines.manifest.weights)
        self._text = EngineWeights({TEXT: inputs.pop(TEXT, ())} if offload else {})
        self._text_copied = False
        self._device, self._weights = device, EngineWeights(inputs)
        self._bundle, self._layout = bundle, recipe.layout
        self.budget = budget(bundle, variant, recipe.layout, engines.manifest, offload)
        self.budget.check(self.budget.total, device.free_memory())
        self._engines = self._load(engines)
        self._values = values_of(list(self.steps.values()))
        self._allocate()
        self._weights.allocate(device)
        self._weights.fill(bundle, device)
        if symbolic:
            self._set(constants(variant, self.model))
        self._bound = {step.name: self._bind(step) for step in self.steps.values()}
        self._graphs = self._capture()
        self._drops: dict[int, Launch] = {}
        self._whole: dict[tuple[tuple[bool, int, bool], bool], list[Launch]] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(view.size for view in self._values.values())

    @property
    def gpu_memory(self) -> int:
        return self.budget.total

    def prepare_weights(self, bundle: Bundle) -> Callable[[], None]:
        if self._layout != "external":
            raise BackendError(
                f"these engines contain their weights (layout {self._layout}), which cannot be "
                "exchanged: compile engines with `varedit-export engines --layout external`, or "
                "open another editor"
            )
        return partial(self._exchange_weights, bundle)

    def _exchange_weights(self, bundle: Bundle) -> None:
        """Copy a bundle's weights over the present ones, which captured graphs have addresses of.

        A GPU that is full of one copy has no room for two: on a failure the present weights, whose
        files are still open, are copied again.
        """
        try:
            self._weights.fill(bundle, self._device)
        except Exception as error:
            self._put_back(error)
            raise
        self._bundle, self._text_copied = bundle, False

    def _put_back(self, cause: Exception) -> None:
        try:
            self._weights.fill(self._bundle, self._device)
        except Exception as error:
            raise WeightsLostError(
                f"weights could not be exchanged ({reason(cause)}), nor those of "
                f"{self._bundle.path} put back ({reason(error)}): open another editor"
            ) from error

    def close(self) -> None:
        self._device.close()  # waits first, so that nothing runs on what is freed next
        self._whole, self._drops, self._graphs = {}, {}, {}
        self._bound, self._engines = {}, {}
        self._host, self._mirror = {}, np.empty(0, np.uint8)

    @property
    def whole(self) -> EditWhole | None:
        return self._edit if TEXT in self.steps and not self._text.size else None

    def _edit(
        self,
        prompts: Prompts,
        pictures: np.ndarray,
        samplings: Sequence[Sampling],
        prefilled: bool,
    ) -> WholeEdit:
        given = {"token_ids": prompts.ids, "prompt_mask": prompts.mask, "pictures": pictures}
        given |= self._of_all_rows(condition_masks(prompts))
        negatives = prompts.negatives
        if negatives is not None:
            given["negative_ids"], given["negative_mask"] = negatives.ids, negatives.mask
        for scale, sampling in enumerate(samplings):
            given |= self._chosen(scale, sampling)
        self._give(given)
        guided = len(samplings)
        if self.drops_rows:
            guided = sum(sampling.guided for sampling in samplings)
        encoded = negatives is not None and bool(negatives.present.any())
        handle = heeded()
        for launch in self._launches((encoded, guided, prefilled), ended=handle is not None):
            if handle is not None:
                handle.check()
            launch()
            self._device.wait()
        self._unguided = guided == 0  # what the next edit by stages finds, if it begins at a scale
        logits = [self._host[f"logits.{scale}"].copy() for scale in range(len(samplings))]
        return WholeEdit(logits, self._host["decoded"].copy())

    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if step.stage == TEXT and not self._text_copied:
            self._text.fill(self._bundle, self._device)
        self._text_copied = step.stage == TEXT  # other stages write over it
        self._give(given)
        self._graphs[step.name]()
        self._device.wait()
        return {name: self._host[name].copy() for name in step.read}

    def _drop(self, scale: int) -> None:
        if scale not in self._drops:
            self._drops[scale] = self._device.capture(lambda: self._move_together(scale))
        self._drops[scale]()

    def _move_together(self, scale: int) -> None:
        for cache in crowded(list(self.steps.values()), scale):
            start = self._start + self._arena.offsets[cache.value]
            for target, source, count in cache.copies():
                self._device.copy_runs(start + target, start + source, cache.kept, count)

    def _give(self, given: Mapping[str, np.ndarray]) -> None:
        for name, array in given.items():
            target = self._host[name]
            if array.shape != target.shape:
                raise BackendError(f"{name} is {array.shape}, where {target.shape} was expected")
            np.copyto(target, array)

    def _load(self, engines: EngineSet) -> dict[str, Engine]:
        """Load the engines by stage. Raises BundleError if one has other tensors than its graph."""
        stages = dict.fromkeys(step.stage for step in self.steps.values())
        loaded = {stage: self._device.load(stage, engines.plan_bytes(stage)) for stage in stages}
        for step in self.steps.values():
            views = {**step.inputs, **step.outputs}
            weights = self._weights.lengths(step.stage) | self._text.lengths(step.stage)
            if different := _different(views, weights, loaded[step.stage].tensors):
                raise BundleError(
                    f"{engines.path} has an engine for {step.stage} whose {', '.join(different)} "
                    "are not its graph's: compile it again with `varedit-export engines --again`"
                )
        return loaded

    def _allocate(self) -> None:
        """Allocate all values and the engines' scratch as one arena.

        Values that only the host writes come first, so that one copy brings them all; those and the
        ones that the host reads are mirrored in host memory. Caches come last, so that offloaded
        weights may take more room than they.
        """
        steps = self.steps.values()
        given, taken = _on_the_host(steps)
        rest = [name for name in self._values if name not in (*given, *taken)]
        rest.sort(key=lambda name: name.startswith(CACHE))
        sizes = {name: self._values[name].size for name in (*given, *taken, *rest)}
        scratch = max(self._engines[step.stage].scratch(step.profile) for step in steps)
        self._arena = lay_out(sizes)
        first = next((name for name in rest if name.startswith(CACHE)), None)
        caches = self._arena.offsets[first] if first else self._arena.size
        values = max(self._arena.size, caches + self._text.size)
        parts = {"values": values, "landing": landing(steps), "scratch": scratch}
        whole = lay_out(parts)
        self.budget = replace(self.budget, scratch=aligned(scratch))
        # Weights inside engines are loaded by now: only the rest must still fit.
        self.budget.check(whole.size + self._weights.size, self._device.free_memory())
        self._start = self._device.allocate(whole.size)
        self._device.clear(self._start, whole.size)
        self._text.allocate(self._device, self._start + caches)
        self._landing = self._start + whole.offsets["landing"]
        self._scratch = self._start + whole.offsets["scratch"], scratch
        self._given = lay_out({name: sizes[name] for name in given}).size
        self._mirror_on_host((*given, *taken))

    def _mirror_on_host(self, names: Iterable[str]) -> None:
        values = {name: self._values[name] for name in names}
        places = lay_out({name: view.size for name, view in values.items()})
        self._mirror = self._device.allocate_host(places.size)
        self._host = {
            name: self._mirror[places.offsets[name] :][: view.size]
            .view(view.dtype)
            .reshape(view.shape)
            for name, view in values.items()
        }

    def _address(self, view: View) -> int:
        return self._start + self._arena.offsets[view.value] + view.offset

    def _set(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Fill values that no step writes, using the mirror of others as a staging buffer."""
        staged = self._mirror
        for name, array in arrays.items():
            staged[: array.nbytes] = array.reshape(-1).view(np.uint8)
            self._device.copy(self._address(self._values[name]), address_of(staged), array.nbytes)
            self._device.wait()  # before the next array overwrites the staging buffer

    def _bind(self, step: Step) -> Launch:
        """Return a function that runs a step; unaligned outputs land elsewhere and are copied."""
        tensors = {**step.inputs, **step.outputs}
        addresses = {name: self._address(view) for name, view in tensors.items()}
        addresses |= self._weights.addresses(step.stage) | self._text.addresses(step.stage)
        free = self._landing
        copies: list[tuple[int, int, int]] = []
        for name, view in step.outputs.items():
            if view in unaligned(step):
                copies.append((addresses[name], free, view.size))
                addresses[name] = free
                free += aligned(view.size)
        shapes = {name: view.shape for name, view in step.inputs.items()}
        engine = self._engines[step.stage]
        execute = engine.bind(step.profile, shapes, addresses, self._scratch)

        def run() -> None:
            execute()
            for copy in copies:
                self._device.copy(*copy)

        return run

    def _capture(self) -> dict[str, Launch]:
        """Run every step once, then capture each with the copies before and after it."""
        for run in self._bound.values():
            run()
        self._device.wait()
        self._device.settle()
        return {
            step.name: self._device.capture(lambda step=step: self._record(step))
            for step in self.steps.values()
        }

    def _record(self, step: Step) -> None:
        self._copy_in(step.fed)
        self._bound[step.name]()
        self._copy_out(step.read)

    def _launches(self, kind: tuple[bool, int, bool], ended: bool) -> list[Launch]:
        """Return the captured whole edit: one launch or, if it may be ended, one for each step.

        kind: whether negative prompts are encoded; how many scales are guided, the first ones;
        whether all before the first scale was computed.
        """
        if (kind, ended) not in self._whole:
            negatives, guided, prefilled = kind
            names = list(self._names(guided))
            if prefilled:
                names = names[names.index(next(n for n in names if scale_of(n) == 0)) :]
            steps = [self.steps[n] for n in names if negatives or n != NEGATIVE]
            works = list(self._works(steps, guided))
            if not ended:
                works = [partial(_in_turn, works)]
            self._whole[kind, ended] = [self._device.capture(work) for work in works]
        return self._whole[kind, ended]

    def _names(self, guided: int) -> Iterator[str]:
        """Yield the names of an edit's steps, in order; guided: how many scales are."""
        for step in self.steps.values():
            if not step.unguided:
                form = step.name + UNGUIDED
                scale = -1 if step.scale is None else step.scale
                yield form if form in self.steps and guided <= max(scale, 0) else step.name

    def _works(self, steps: Sequence[Step], guided: int) -> Iterator[Launch]:
        """Yield the parts of a whole edit: one copy of all inputs, each step, one of all outputs.

        guided: how many scales are; before the next one, caches are moved together.
        """
        yield partial(self._device.copy, self._start, address_of(self._mirror), self._given)
        for step in steps:
            yield partial(self._record_one, step, step.unguided and step.scale == guided > 0)
        logits = [n for step in steps for n in step.read if n.startswith("logits.")]
        yield partial(self._copy_out, [*logits, *self.steps[DECODER].read])

    def _record_one(self, step: Step, moved: bool) -> None:
        """Record a step of a whole edit. moved: whether caches are moved together before it."""
        if moved:
            self._move_together(step.scale or 0)
        self._bound[step.name]()

    def _copy_in(self, names: Iterable[str]) -> None:
        for name in names:
            host = self._host[name]
            self._device.copy(self._address(self._values[name]), address_of(host), host.nbytes)

    def _copy_out(self, names: Iterable[str]) -> None:
        for name in names:
            host = self._host[name]
            self._device.copy(address_of(host), self._address(self._values[name]), host.nbytes)


def open_engines(
    bundle: Bundle,
    variant: Variant,
    kind: EngineKind,
    digest: str | None,
    trust: bool,
    offload: str | None,
) -> EngineBackend:
    """Open a variant's engines on this machine's GPU. digest, trust: see `EngineSets.find`.

    Raises MissingExtraError if the backend is not installed, BackendError without a GPU or with
    too little memory on it, BundleError if no engines fit it, or none of them is trusted.
    """
    device = CudaDevice(kind)
    try:
        sets = EngineSets(bundle)
        engines = sets.find(variant.name, kind, device.tools, device.gpu, digest, trust)
        return EngineBackend(bundle, variant, engines, device, offload)
    except BaseException:
        device.close()
        raise


def _in_turn(works: Sequence[Launch]) -> None:
    for work in works:
        work()


def _on_the_host(steps: Iterable[Step]) -> tuple[list[str], list[str]]:
    """Return the values that only the host writes, and all others that it gives or takes."""
    written = {view.value for step in steps for view in step.outputs.values()}
    host = dict.fromkeys(name for step in steps for name in (*step.fed, *step.read))
    return [n for n in host if n not in written], [n for n in host if n in written]


def _different(
    views: Mapping[str, View],
    weights: Mapping[str, int],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> list[str]:
    """Return the tensors that differ between an engine and its graph, or that only one has.

    weights: bytes of those inputs of the engine that are weights.
    """

    def same(name: str) -> bool:
        dtype, shape = tensors[name]
        if name in weights:
            return weights[name] == prod(shape) * item_size(dtype)
        view = views[name]
        if (view.dtype, len(view.shape)) != (dtype, len(shape)):
            return False
        return all(b in (a, -1) for a, b in zip(view.shape, shape, strict=True))

    both = {*views, *weights} & tensors.keys()
    alone = {*views, *weights} ^ tensors.keys()
    return sorted(alone | {name for name in both if not same(name)})

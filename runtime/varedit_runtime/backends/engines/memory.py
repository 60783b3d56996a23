"""The GPU memory that a bundle's engines take, and where everything lies in it.

Everything is allocated once and lives as long as the editor, so that captured graphs may contain
its addresses. Only the engines' scratch is shared: it is needed for one run at a time. Sharing the
tensors between graphs by their lifetimes too would save one percent, as the caches, which live
through a whole edit, are nearly all of it.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from varedit_runtime.backends.engines.device import ALIGNMENT
from varedit_runtime.backends.engines.engine_set import (
    EngineLayout,
    EngineSet,
    EngineSetManifest,
    EngineSets,
)
from varedit_runtime.backends.wiring import CACHE, TEXT, Step, View, values_of, wire
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, BundleError, readable_size
from varedit_runtime.manifest import StoredWeight, Variant, weights_file

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Arena(Generic[Key]):
    """One allocation for several parts. offsets: their first bytes, aligned. size: in bytes."""

    size: int
    offsets: Mapping[Key, int]


def lay_out(sizes: Mapping[Key, int]) -> Arena[Key]:
    """Lay out parts of these sizes in bytes, one after the other."""
    offsets: dict[Key, int] = {}
    end = 0
    for part, size in sizes.items():
        offsets[part] = end
        end += aligned(size)
    return Arena(end, offsets)


def aligned(size: int) -> int:
    """Round a size up to a multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Budget:
    """Bytes of GPU memory that an editor takes, by use.

    between: tensors between graphs. scratch: None until the engines, which know it, are compiled or
    loaded.
    """

    weights: int
    caches: int
    between: int
    scratch: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.between + (self.scratch or 0)

    def __str__(self) -> str:
        known = {"weights": self.weights, "caches": self.caches, "between graphs": self.between}
        if self.scratch is not None:
            known["scratch"] = self.scratch
        parts = ", ".join(f"{readable_size(size)} {name}" for name, size in known.items())
        unknown = " and the engines' scratch" if self.scratch is None else ""
        total = readable_size(self.total)
        return f"{total} of GPU memory ({parts}{unknown}), and what the driver takes"

    def check(self, rest: int, free: int) -> None:
        """Raise BackendError if rest, the bytes not yet allocated, is more than the free bytes."""
        if rest > free:
            raise BackendError(
                f"the engines need {self}; {readable_size(rest)} of it are yet to be taken and "
                f"{readable_size(free)} are free: end other programs on this GPU, or use a bundle "
                "of a smaller --res or --batch"
            )


def budget(
    bundle: Bundle,
    variant: Variant,
    layout: EngineLayout = "external",
    engines: EngineSetManifest | None = None,
    offload: str | None = None,
) -> Budget:
    """Return what a variant's engines take, without what the driver needs for their code.

    engines: the compiled set, of this layout. Without it, scratch is not counted, and weights are
    estimated from the sizes of the bundle's files, as are those inside engines of which the set
    does not tell them. offload: "text" where the text encoder's weights lie in the caches' place
    while it runs, which engines of external weights can do.
    """
    symbolic = layout == "profiles"
    steps = wire(variant, bundle.manifest.model, symbolic, unguided=layout != "baked")
    sizes = {name: aligned(view.size) for name, view in values_of(steps).items()}
    caches = sum(size for name, size in sizes.items() if name.startswith(CACHE))
    between = sum(sizes.values()) - caches + landing(steps)
    weights, scratch = weights_on_gpu(bundle, variant, layout), None
    if engines is not None:
        scratch = None if engines.scratch is None else aligned(engines.scratch)
        if layout == "external" or engines.resident is not None:
            weights = place_inputs(engines.weights).size + (engines.resident or 0)
    if offload and layout == "external":
        text = bundle.manifest.files.get(weights_file(TEXT))
        size = 0 if text is None else text.size
        if engines is not None:
            size = place_inputs({TEXT: engines.weights.get(TEXT, ())}).size
        weights, caches = weights - size, max(caches, size)
    return Budget(weights, caches, between, scratch)


def with_offload(budget: Budget) -> str:
    """Format the total with `--offload text`, to be put behind another budget.

    budget: the one of engines with the text encoder offloaded.
    """
    return f"; {readable_size(budget.total)} with --offload text on engines"


def set_budgets(bundle: Bundle, variant: Variant) -> Iterator[tuple[str, Budget]]:
    """Yield what each set of a variant's engines takes, with the GPU and layout it is for.

    Sets that are damaged, or of other graphs or weights, are left out.
    """
    sets = EngineSets(bundle)
    for folder in sets.folders:
        with suppress(BundleError):
            engines = EngineSet.open(folder).manifest
            recipe = engines.recipe
            if recipe.variant == variant.name and sets.of_this_bundle(recipe):
                name = f"{recipe.backend} for {recipe.gpu}, weights {recipe.layout}"
                yield name, budget(bundle, variant, recipe.layout, engines)


def distinct(weights: Mapping[str, Sequence[StoredWeight]]) -> dict[tuple[str, int], StoredWeight]:
    """Return the weights that engines have as inputs, given by stage: each once, by its place.

    They are in the order of the files, in which they are read. A place is a file and an offset.
    """
    every = [weight for of_stage in weights.values() for weight in of_stage]
    # A table and a row of it may start at one byte: the longest of such weights comes last and is
    # kept, and holds the others.
    every.sort(key=lambda weight: (weight.file, weight.offset, weight.length))
    return {(weight.file, weight.offset): weight for weight in every}


def place_inputs(weights: Mapping[str, Sequence[StoredWeight]]) -> Arena[tuple[str, int]]:
    """Lay out the weights that engines have as inputs, given by stage, by their places in files."""
    return lay_out({place: weight.length for place, weight in distinct(weights).items()})


def landing(steps: Iterable[Step]) -> int:
    """Return the bytes where the outputs of a step land whose own places are not aligned."""
    return max(sum(aligned(view.size) for view in unaligned(step)) for step in steps)


def unaligned(step: Step) -> list[View]:
    """Return outputs at addresses an engine refuses, which only small models have (few bytes)."""
    return [view for view in step.outputs.values() if view.offset % ALIGNMENT]


def weights_on_gpu(bundle: Bundle, variant: Variant, layout: EngineLayout) -> int:
    """Return the bytes of all weights, the transformer's once per engine that contains them."""
    files = bundle.manifest.files
    sizes = {name: files[weights_file(name)].size for name in bundle.components}
    return sum(sizes.values()) + (transformers(variant, layout) - 1) * sizes["transformer"]


def transformers(variant: Variant, layout: EngineLayout) -> int:
    """Return how many copies of the transformer's weights a layout has on the GPU."""
    return len(variant.grids) + 1 if layout == "baked" else 1

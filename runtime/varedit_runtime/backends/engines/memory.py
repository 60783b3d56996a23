"""The GPU memory that a bundle's engines take, and where everything lies in it.

Everything is allocated once and lives as long as the editor, so that captured graphs may contain
its addresses. Only the engines' scratch is shared: it is needed for one run at a time. Sharing the
tensors between graphs by their lifetimes too would save one percent, as the caches, which live
through a whole edit, are nearly all of it.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from varedit_runtime.backends.engines.device import ALIGNMENT
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.wiring import values_of, wire
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, readable_size
from varedit_runtime.manifest import Variant, weights_file

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

    between: tensors between graphs. scratch: None until the engines, which know it, are loaded.
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


def budget(bundle: Bundle, variant: Variant, layout: EngineLayout) -> Budget:
    """Estimate what a variant's engines take, from the manifest; their code is not counted."""
    symbolic = layout == "profiles"
    values = values_of(wire(variant, bundle.manifest.model, symbolic))
    sizes = {name: aligned(view.size) for name, view in values.items()}
    caches = sum(size for name, size in sizes.items() if name.startswith("cache_"))
    return Budget(weights_on_gpu(bundle, variant, layout), caches, sum(sizes.values()) - caches)


def weights_on_gpu(bundle: Bundle, variant: Variant, layout: EngineLayout) -> int:
    """Return the bytes of all weights, the transformer's once per engine that contains them."""
    files = bundle.manifest.files
    sizes = {name: files[weights_file(name)].size for name in bundle.components}
    return sum(sizes.values()) + (transformers(variant, layout) - 1) * sizes["transformer"]


def transformers(variant: Variant, layout: EngineLayout) -> int:
    """Return how many copies of the transformer's weights a layout has on the GPU."""
    return len(variant.grids) + 1 if layout == "baked" else 1

"""ONNX graphs -> compiled engines, by TensorRT or TensorRT for RTX: one code path for both.

Where the weights of the graphs go is the layout:

    external   inputs of the engines, filled from the bundle's own files: small plans, one copy of
               the weights whatever the number of scales, and other weights need no compilation: a
               bundle that is built anew, with the same graphs, keeps its engines
    profiles   inside; one engine, with a profile each, for the prefill and all scales
    baked      inside; one engine per scale
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from varedit_engines.builder import Compiler, Progress
from varedit_engines.engine_cache import EngineCache
from varedit_engines.network import external_inputs
from varedit_engines.publish import Staging
from varedit_runtime.backends.engines.engine_set import (
    LAYOUTS,
    EngineSet,
    EngineSetManifest,
    Layout,
    Plan,
    Recipe,
    built_here,
)
from varedit_runtime.backends.engines.memory import transformers, weights_on_gpu
from varedit_runtime.backends.engines.packing import pack_into, unpacked_size
from varedit_runtime.backends.wiring import PREFILL, scale_profiles, sized
from varedit_runtime.bundle import Bundle, Folder
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.manifest import Variant, scale_name

# A whole set, and the stage in it.
EarlierPlan = tuple[EngineSet, str]

TWIN = ("scale", "references")  # with symbolic lengths, for prefill and all scales


def stages_of(variant: Variant, layout: Layout) -> list[str]:
    """The graphs that a layout compiles."""
    if layout not in LAYOUTS:
        raise ConfigError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    static = [stage for stage in variant.graphs if stage not in TWIN]
    if layout != "profiles":
        return static
    scales = {PREFILL, *map(scale_name, range(len(variant.grids)))}
    return [stage for stage in variant.graphs if stage not in scales]


@dataclass(frozen=True)
class Job:
    """Compiling a bundle's variant, by default the first, in a layout."""

    bundle: Bundle
    layout: Layout
    compiler: Compiler
    variant_name: str | None = None

    @property
    def variant(self) -> Variant:
        return self.bundle.manifest.variant(self.variant_name)

    @property
    def recipe(self) -> Recipe:
        return EngineCache(self.bundle).recipe(
            self.variant.name,
            stages_of(self.variant, self.layout),
            backend=self.compiler.backend,
            tools=self.compiler.tools,
            gpu=self.compiler.gpu,
            layout=self.layout,
            flags=self.compiler.flags,
            baked=() if self.layout == "external" else self.bundle.components,
        )

    def __str__(self) -> str:
        """For a person to read before it begins: what the GPU will have to hold."""
        size = weights_on_gpu(self.bundle, self.variant, self.layout)
        copies = transformers(self.variant, self.layout)
        return (
            f"{len(self.recipe.graphs)} engines for {self.compiler.gpu}, weights {self.layout}: "
            f"{size / 1e9:.2f} GB of weights on the GPU, {copies}x the transformer's"
        )


def compile_engines(
    job: Job,
    progress: Progress,
    notice: Callable[[str], None] = lambda line: None,
    again: bool = False,
) -> EngineSet:
    """The engines of a bundle: compiled or, where they were before, opened.

    A compilation that was interrupted goes on at the graph it had reached. Engines that this user
    built here and that are damaged, or with `again` any, are compiled again; notice is told why,
    in one line.

    Raises BackendError when a graph does not compile, BundleError when the bundle is damaged, the
    disk full, or when engines are there that were built elsewhere or cannot be replaced, which
    are left as they are.
    """
    cache, recipe = EngineCache(job.bundle), job.recipe
    found = _whole(cache, recipe, notice)
    if found is not None:
        if not again:
            return found
        cache.check_replaceable(found)
    if job.layout != "external":
        job.bundle.verify_weights()
    with cache.create(recipe) as staging:
        # Unless another process compiled them while this one waited.
        if again or _whole(cache, recipe, lambda line: None) is None:
            earlier = {} if again else _earlier_plans(cache, recipe)
            _compile_all(job, recipe, staging, earlier, progress)
    engines = cache.open(recipe, verify=True)
    assert engines is not None
    return engines


def _whole(cache: EngineCache, recipe: Recipe, notice: Callable[[str], None]) -> EngineSet | None:
    """The set that is there; None where there is none, or a damaged one that can be replaced."""
    try:
        return cache.open(recipe, verify=True)
    except BundleError as error:
        if not cache.made_here(recipe):
            raise
        notice(f"engines are compiled again: {error}")
        return None


def _earlier_plans(cache: EngineCache, recipe: Recipe) -> dict[str, EarlierPlan]:
    """By the digest of their graph: of sets that were made here alike, but of other graphs."""
    found: dict[str, EarlierPlan] = {}
    for folder in cache.folders:
        with suppress(BundleError):
            engines = EngineSet.open(folder)
            other = engines.manifest.recipe
            alike = structs.replace(other, graphs=recipe.graphs, variant=recipe.variant) == recipe
            if alike and built_here(engines.digest).exists():
                found |= {digest: (engines, stage) for stage, digest in other.graphs.items()}
    return found


def _compile_all(
    job: Job,
    recipe: Recipe,
    staging: Staging,
    earlier: Mapping[str, EarlierPlan],
    progress: Progress,
) -> None:
    plans, weights = {}, {}
    for stage, digest in recipe.graphs.items():
        file = f"{stage}.plan.z"
        graph = job.bundle.graph_bytes(job.variant.name, stage)
        if job.layout == "external":
            graph, weights[stage] = external_inputs(graph)
        if staging.kept(file, recipe.key):
            size = unpacked_size(Folder(staging.path, staging.files).chunks(file))
        else:
            size = _copied(earlier.get(digest), staging.file(file))
            if size is None:
                size = _compile(job, stage, graph, staging.file(file), progress)
            staging.record(file, recipe.key)
        plans[stage] = Plan(file, size)
    staging.publish(
        EngineSetManifest(files=staging.files, recipe=recipe, plans=plans, weights=weights)
    )


def _copied(earlier: EarlierPlan | None, path: Path) -> int | None:
    """Copy an earlier plan to a file. -> the plan's size; None when there is none, or damaged"""
    if earlier is None:
        return None
    engines, stage = earlier
    try:
        with path.open("wb") as file:
            file.writelines(engines.packed_plan(stage))
    except BundleError:
        return None
    return engines.manifest.plans[stage].size


def _compile(job: Job, stage: str, graph: bytes, path: Path, progress: Progress) -> int:
    """A graph, as a plan in a file. -> the plan's size"""
    folder, shapes = job.bundle.graphs_folder, _profiles(job, stage)
    plan = job.compiler.compile(stage, graph, folder, shapes, progress)
    pack_into(path, plan)
    return len(plan)


def _profiles(job: Job, stage: str) -> list[Mapping[str, tuple[int, ...]]]:
    """The shape of every input, in every profile of a graph with symbolic lengths; else none."""
    specs = job.variant.graphs[stage].inputs
    if all(isinstance(size, int) for spec in specs for size in spec.shape):
        return []
    return [
        {spec.name: sized(spec, sizes) for spec in specs}
        for sizes in scale_profiles(job.variant, job.bundle.manifest.model)
    ]

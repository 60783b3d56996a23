"""Compile a bundle's graphs to engines, by TensorRT or TensorRT for RTX: one code path for both.

The layout says where the weights are:

    external   inputs of the engines, filled from the bundle's own files: small plans, and one copy
               of the weights for any number of scales; changed weights need no compilation, so a
               bundle that is built again with the same graphs keeps its engines
    profiles   inside one engine, which has a profile for the prefill and each scale
    baked      inside every engine, one per scale

With guidance, the first two also have engines or profiles for the conditional rows alone, which an
edit runs on where its guidance is off. Baked ones do not, as each would hold the weights again.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from varedit_engines.engine_cache import EngineCache
from varedit_engines.engine_compiler import EngineCompiler, check_precision, slow_precision
from varedit_engines.engine_report import packed, unpacked
from varedit_engines.network import external_inputs
from varedit_engines.progress import OnStep
from varedit_engines.publish import Staging
from varedit_runtime.backends.engines.engine_set import (
    LAYOUTS,
    EngineLayout,
    EngineRecipe,
    EngineSet,
    EngineSetManifest,
    PlanFile,
    built_here,
)
from varedit_runtime.backends.engines.memory import transformers, weights_on_gpu
from varedit_runtime.backends.engines.packing import pack_into
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.wiring import FUSED, PREFILL, profiles_of, sized
from varedit_runtime.bundle import Bundle, Folder
from varedit_runtime.errors import BundleError, ConfigError, readable_size, shown
from varedit_runtime.manifest import UNGUIDED, Variant, scale_of

# A set and a stage in it.
EarlierPlan = tuple[EngineSet, str]

TWIN = ("scale", "references")  # graphs of symbolic lengths, for prefill and all scales


def stages_of(variant: Variant, layout: EngineLayout) -> list[str]:
    """Return the graphs that a layout compiles. Raises ConfigError on an unknown layout."""
    if layout not in LAYOUTS:
        raise ConfigError(f"there is no layout {shown(layout)}; there are {', '.join(LAYOUTS)}")
    stages = [stage for stage in variant.graphs if stage != FUSED]  # which no engine runs
    static = [stage for stage in stages if stage not in TWIN]
    if layout == "external":
        return static
    if layout == "baked":
        return [stage for stage in static if not stage.endswith(UNGUIDED)]
    prefills = PREFILL, PREFILL + UNGUIDED
    return [stage for stage in stages if stage not in prefills and scale_of(stage) is None]


@dataclass(frozen=True)
class CompileJob:
    """A compilation: a bundle, one of its variants (by default the first), layout and compiler.

    Raises ConfigError if no engines of the bundle's precision can be compiled for the GPU.
    """

    bundle: Bundle
    layout: EngineLayout
    compiler: EngineCompiler
    variant_name: str | None = None

    def __post_init__(self) -> None:
        check_precision(self.bundle.manifest.policy, self.compiler.gpu)

    @property
    def variant(self) -> Variant:
        return self.bundle.manifest.variant(self.variant_name)

    @property
    def recipe(self) -> EngineRecipe:
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

    @property
    def advice(self) -> str | None:
        """What to consider before compiling, in one line; None if there is nothing."""
        return slow_precision(self.bundle.manifest.policy)

    def __str__(self) -> str:
        """Say what will be compiled, and what the GPU will have to hold."""
        size = weights_on_gpu(self.bundle, self.variant, self.layout)
        copies = transformers(self.variant, self.layout)
        return (
            f"{len(self.recipe.graphs)} engines for {self.compiler.gpu}, weights {self.layout}: "
            f"{readable_size(size)} of weights on the GPU, {copies}x the transformer's"
        )


def compile_engine_set(
    job: CompileJob,
    on_step: OnStep,
    notice: Callable[[str], None] = lambda line: None,
    again: bool = False,
) -> EngineSet:
    """Compile a bundle's engines, or open existing ones.

    An interrupted compilation continues at the graph it had reached. again: recompile existing
    engines built on this machine. Damaged ones are always recompiled; notice is called with the
    reason, in one line.

    Raises BackendError if a graph does not compile, BundleError if the bundle is damaged, the disk
    is full, or existing engines were built elsewhere or cannot be replaced (they are left alone).
    """
    cache, recipe = EngineCache(job.bundle), job.recipe
    found = _whole(cache, recipe, notice)
    if found is not None:
        if not again:
            return found
        cache.check_replaceable(found)
    if job.layout != "external":
        job.bundle.verify()
    with cache.create(recipe) as staging:
        # Another process may have compiled them while this one waited for the lock.
        if again or _whole(cache, recipe, lambda line: None) is None:
            earlier = {} if again else _earlier_plans(cache, recipe)
            _compile_all(job, recipe, staging, earlier, on_step)
    engines = cache.open(recipe, verify=True)
    assert engines is not None
    return engines


def _whole(
    cache: EngineCache, recipe: EngineRecipe, notice: Callable[[str], None]
) -> EngineSet | None:
    """Open the existing set; return None if there is none, or a damaged one of ours."""
    try:
        return cache.open(recipe, verify=True)
    except BundleError as error:
        if cache.built_elsewhere(recipe):
            raise
        notice(f"engines are compiled again: {error}")
        return None


def _earlier_plans(cache: EngineCache, recipe: EngineRecipe) -> dict[str, EarlierPlan]:
    """Find reusable plans by their graph's digest: of sets built here with the same settings."""
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
    job: CompileJob,
    recipe: EngineRecipe,
    staging: Staging,
    earlier: Mapping[str, EarlierPlan],
    on_step: OnStep,
) -> None:
    plans, weights = {}, {}
    count = len(recipe.graphs)
    for place, (stage, digest) in enumerate(recipe.graphs.items()):
        on_step(f"engine {stage}", place, count)
        plan, report = files = f"{stage}.plan.gz", f"{stage}.report.json.gz"
        graph = read_graph(job.bundle, job.variant, stage)
        if job.layout == "external":
            graph, weights[stage] = external_inputs(graph)
        if not all([staging.kept(file, recipe.key) for file in files]):
            paths = staging.file(plan), staging.file(report)
            if not _copied(earlier.get(digest), *paths):
                _compile(job, stage, graph, *paths, _detailed(on_step, stage, place, count))
            for file in files:
                staging.record(file, recipe.key)
        told = unpacked(Folder(staging.path, staging.files).chunks(report))
        plans[stage] = PlanFile(plan, told.plan, told.scratch, told.resident, report)
    on_step("done", count, count)
    staging.publish(
        EngineSetManifest(files=staging.files, recipe=recipe, plans=plans, weights=weights)
    )


def _copied(earlier: EarlierPlan | None, plan: Path, report: Path) -> bool:
    """Copy an earlier plan and its report; return False if there is none, or one is damaged."""
    if earlier is None:
        return False
    engines, stage = earlier
    if engines.manifest.plans[stage].report is None:  # compiled by an earlier version
        return False
    try:
        for path, chunks in (plan, engines.packed_plan), (report, engines.packed_report):
            with path.open("wb") as file:
                file.writelines(chunks(stage))
    except BundleError:
        return False
    return True


def _detailed(on_step: OnStep, stage: str, place: int, count: int) -> OnStep:
    """Return what tells how far the compilation of one of several graphs is."""

    def tell(_: str, done: int, steps: int) -> None:
        on_step(f"engine {stage}, {done} of {steps}", place, count)

    return tell


def _compile(
    job: CompileJob, stage: str, graph: bytes, plan: Path, report: Path, on_step: OnStep
) -> None:
    """Compile a graph; write the plan and its report to files."""
    folder, shapes = job.bundle.graphs_folder, profiles_to_compile(job.bundle, job.variant, stage)
    compiled = job.compiler.compile(stage, graph, folder, shapes, on_step)
    if job.layout != "external":  # the compiler read weights by their path
        job.bundle.check_stands()
    pack_into(plan, compiled.plan)
    report.write_bytes(packed(compiled.report))


def profiles_to_compile(
    bundle: Bundle, variant: Variant, stage: str
) -> list[Mapping[str, tuple[int, ...]]]:
    """Return the shapes of all inputs in every profile; none for a graph of static shapes."""
    specs = variant.graphs[stage].inputs
    if all(isinstance(size, int) for spec in specs for size in spec.shape):
        return []
    profiles = profiles_of(stage, variant, bundle.manifest.model.conditioning)
    return [{spec.name: sized(spec, sizes) for spec in specs} for sizes in profiles]

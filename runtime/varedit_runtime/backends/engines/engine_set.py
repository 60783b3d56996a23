"""Sets of compiled engines: keyed by everything they depend on, published and checked like bundles.

A set is in `engines/BACKEND-KEY` of its bundle or, if the bundle is read-only, of the user's cache,
where it serves every bundle that it fits.

Compiled engines are native code, and a digest beside them proves nothing about who built them. So
publishing a set leaves a record in the user's data folder, named by the set's digest. Only sets
with a record, with a digest that the caller gives, or with explicit trust are loaded.
"""

import hashlib
import re
import shlex
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from varedit_runtime.backends.engines.packing import unpack
from varedit_runtime.bundle import Bundle, Folder, open_manifest
from varedit_runtime.errors import BundleError, shown
from varedit_runtime.locate import cache_folder, data_folder
from varedit_runtime.manifest import (
    ENGINES,
    PRINTABLE,
    Bytes,
    Digest,
    FolderManifest,
    Name,
    PrintableText,
    StoredWeight,
    canonical_json,
    weights_file,
)

EngineLayout = Literal["external", "profiles", "baked"]
LAYOUTS: tuple[EngineLayout, ...] = get_args(EngineLayout)


AMPERE = 80  # the lowest compute capability of ampere-plus

# An architecture, optionally followed by a space and the GPU's model.
GpuName = Annotated[str, Meta(pattern=rf"\A(?=\S){PRINTABLE}\Z", max_length=1000)]


class EngineRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a set of engines depends on; `EngineSets.recipe` makes one.

    graphs: digest of every stage's ONNX file. weights: digest of every component that is inside the
    engines; empty if weights are inputs. tools: versions. gpu: architecture and, for TensorRT,
    whose engines run on one model of GPU, that model. flags: settings of the compiler.
    """

    backend: Name
    variant: Name
    graphs: dict[Name, Digest]
    weights: dict[Name, Digest]
    tools: dict[PrintableText, PrintableText]
    gpu: GpuName
    layout: EngineLayout
    precision: Name
    flags: dict[PrintableText, PrintableText]

    @property
    def key(self) -> str:
        """sha256 of the recipe: it differs if anything differs that could change the engines."""
        return hashlib.sha256(canonical_json(self)).hexdigest()


class PlanFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled engine. file: its packed file in the set. size: unpacked, in bytes.

    scratch: bytes that a run needs. resident: bytes of GPU memory that it holds while it is loaded.
    Both are None if the compiler did not tell. report: the file that lists its kernels; sets of
    earlier versions have none.
    """

    file: str
    size: Bytes
    scratch: Bytes | None = None
    resident: Bytes | None = None
    report: str | None = None


class EngineSetManifest(FolderManifest, frozen=True):
    """The manifest of an engine set.

    plans: every stage's compiled engine. weights: each engine's inputs that are weights; empty if
    weights are inside the engines.
    """

    recipe: EngineRecipe
    plans: dict[Name, PlanFile]
    weights: dict[Name, tuple[StoredWeight, ...]] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plans.keys() != self.recipe.graphs.keys():
            expected = sorted(self.recipe.graphs)
            raise ValueError(f"plans of {sorted(self.plans)}, where {expected} were expected")
        for stage, plan in self.plans.items():
            for file in (plan.file, plan.report):
                if file is not None and file not in self.files:
                    raise ValueError(f"{stage}'s {shown(file)} is not in files")
        if unknown := self.weights.keys() - self.plans.keys():
            raise ValueError(f"weights of {sorted(unknown)}, which have no plan")

    @property
    def scratch(self) -> int | None:
        """The bytes of scratch that all engines share; None if one's are not known."""
        known = [plan.scratch for plan in self.plans.values() if plan.scratch is not None]
        return max(known, default=None) if len(known) == len(self.plans) else None

    @property
    def resident(self) -> int | None:
        """The bytes that all engines hold while they are loaded; None if one's are not known."""
        known = [plan.resident for plan in self.plans.values() if plan.resident is not None]
        return sum(known) if len(known) == len(self.plans) else None


@dataclass(frozen=True)
class EngineSet:
    """An opened set. digest: sha256 of its manifest, which lists those of its plans."""

    path: Path
    manifest: EngineSetManifest = field(repr=False)  # which fills pages
    digest: str

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> "EngineSet":
        """Open a set. Raises BundleError if it is damaged, or its digest is not the one given."""
        manifest, digest = open_manifest(path, EngineSetManifest, digest)
        engines = cls(path, manifest, digest)
        engines._folder.check_sizes()
        return engines

    @property
    def _folder(self) -> Folder:
        return Folder(self.path, self.manifest.files)

    def verify(self) -> None:
        """Hash all files. Raises BundleError if one is damaged."""
        for file in self.manifest.files:
            self._folder.verify(file)

    def packed_plan(self, stage: str) -> Iterator[bytes]:
        """Yield a stage's packed plan in pieces; raise BundleError at its end if it is damaged."""
        return self._folder.chunks(self.manifest.plans[stage].file)

    def packed_report(self, stage: str) -> Iterator[bytes]:
        """Yield a stage's packed report as `packed_plan` does; the set must have one."""
        file = self.manifest.plans[stage].report
        assert file is not None
        return self._folder.chunks(file)

    def plan_bytes(self, stage: str) -> bytearray:
        """Return a stage's compiled engine, made from exactly the bytes whose digest was checked.

        Raises BundleError if there is none, or it is damaged or has another size than stated.
        """
        if stage not in self.manifest.plans:
            known = ", ".join(self.manifest.plans)
            raise BundleError(f"{self.path} has no engine for {shown(stage)}; it has {known}")
        plan = self.manifest.plans[stage]
        chunks = self.packed_plan(stage)
        try:
            return unpack(chunks, self.manifest.files[plan.file].size, plan.size)
        except ValueError as error:
            deque(chunks, maxlen=0)  # read to the end, which raises if the file is damaged
            raise BundleError(
                f"{self.path / plan.file} is no plan: {error}; compile it again with "
                "`varedit-export engines --again`"
            ) from error


class EngineSets:
    """The engine sets of a bundle, in it and in the user's cache."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def recipe(
        self,
        variant: str,
        stages: Sequence[str],
        *,
        backend: str,
        tools: Mapping[str, str],
        gpu: str,
        layout: EngineLayout,
        flags: Mapping[str, str],
        baked: Sequence[str] = (),
    ) -> EngineRecipe:
        """Make the recipe of engines for these stages of the bundle.

        baked: the components whose weights are inside the engines. Raises BundleError if the bundle
        lacks a stage or component.
        """
        graphs, weights = self._digests(variant, stages, baked)
        precision = self.bundle.manifest.precision
        return EngineRecipe(
            backend, variant, graphs, weights, dict(tools), gpu, layout, precision, dict(flags)
        )

    def open(
        self,
        recipe: EngineRecipe,
        digest: str | None = None,
        trust: bool = False,
        verify: bool = False,
    ) -> EngineSet | None:
        """Open the engines made from this recipe; return None if there are none.

        digest: the set's digest as its publisher states it. trust: accept sets built elsewhere.
        verify: hash all files now, not only when they are read. Raises BundleError if engines are
        damaged, of another recipe, have weights that are not in the bundle, or were built elsewhere
        without digest or trust being given.
        """
        problem = None
        for folder in self.places_of(recipe):
            if folder.exists():
                try:
                    engines = self._open_trusted(folder, recipe, digest, trust)
                    if verify:
                        engines.verify()
                    return engines
                except BundleError as error:
                    problem = problem or error
        if problem:
            raise problem
        return None

    def find(
        self,
        variant: str,
        backend: str,
        tools: Mapping[str, str],
        gpu: str,
        digest: str | None = None,
        trust: bool = False,
    ) -> EngineSet:
        """Find the engines of a variant for a GPU and these tools.

        Of several sets, the one of the layout with the smallest plans, compiled with the fewest
        settings. gpu: architecture and model, as in "sm90 NVIDIA H200". digest: accept only this
        set. trust: as for `open`. Raises BundleError if there are none; the message lists the sets
        that exist and why each is not used.
        """
        found: list[EngineSet] = []
        refused: list[str] = []
        for folder in self.folders:
            try:
                engines = EngineSet.open(folder, digest)
                recipe = engines.manifest.recipe
                if (recipe.backend, recipe.variant) == (backend, variant):
                    self._check_fits(engines, tools, gpu)
                    self._check_trusted(engines, digest, trust)
                    found.append(engines)
            except BundleError as error:
                if folder.name.rpartition("-")[0] == backend:
                    refused.append(f"{folder.name}: {error}")
        if found:
            return min(found, key=_preference)
        rtx = f" --architecture {gpu.split()[0]}" if backend == "tensorrt-rtx" else ""
        raise BundleError(
            f"{self.bundle.path} has no {backend} engines of variant {variant} for this {gpu} "
            f"({'; '.join(refused) or 'there are none'}): run `varedit-export engines "
            f"{shlex.quote(str(self.bundle.path))} --backend {backend}{rtx} --variant {variant}`"
        )

    def _check_fits(self, engines: EngineSet, tools: Mapping[str, str], gpu: str) -> None:
        """Raise BundleError if engines are of other graphs, weights, tools or GPUs."""
        if not self.of_this_bundle(engines.manifest.recipe):
            raise BundleError("they are of other graphs or weights than the bundle's")
        if reason := why_unusable(engines.manifest.recipe, tools, [gpu]):
            raise BundleError(f"they are {reason}")
        self._check_weights(engines)

    def of_this_bundle(self, recipe: EngineRecipe) -> bool:
        """Return whether a recipe is of this bundle. Raises BundleError if parts are missing."""
        graphs, weights = self._digests(recipe.variant, recipe.graphs, recipe.weights)
        ours = (graphs, weights, self.bundle.manifest.precision)
        return (recipe.graphs, recipe.weights, recipe.precision) == ours

    def _digests(
        self, variant: str, stages: Collection[str], components: Collection[str]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return digests of graphs by stage and of weights by component.

        Raises BundleError if the bundle lacks one.
        """
        if unknown := set(components) - set(self.bundle.components):
            known = ", ".join(self.bundle.components)
            raise BundleError(f"there are no weights of {sorted(unknown)}; there are {known}")
        files, graph = self.bundle.manifest.files, self.bundle.manifest.variant(variant).graph
        return (
            {stage: files[graph(stage).file].sha256 for stage in stages},
            {component: files[weights_file(component)].sha256 for component in components},
        )

    def _open_trusted(
        self, folder: Path, recipe: EngineRecipe, digest: str | None, trust: bool
    ) -> EngineSet:
        engines = EngineSet.open(folder, digest)
        if engines.manifest.recipe != recipe:
            raise BundleError(f"{folder} has engines of other graphs or tools; delete the folder")
        self._check_weights(engines)
        self._check_trusted(engines, digest, trust)
        return engines

    def _check_trusted(self, engines: EngineSet, digest: str | None, trust: bool) -> None:
        if not (trust or digest or built_here(engines.digest).exists()):
            raise BundleError(
                f"{engines.path} has engines that were built elsewhere, and they are native code: "
                "give the digest they were published with, trust them explicitly, or delete the "
                "folder"
            )

    def _check_weights(self, engines: EngineSet) -> None:
        """Raise BundleError if a weight does not lie within the bundle's weights files."""
        files = self.bundle.manifest.files
        sizes = {file: files[file].size for file in map(weights_file, self.bundle.components)}
        for stage, weights in engines.manifest.weights.items():
            for weight in weights:
                if weight.offset + weight.length > sizes.get(weight.file, -1):
                    there = ", ".join(f"{file} of {size}" for file, size in sizes.items())
                    raise BundleError(
                        f"{engines.path}: {stage}'s weight {shown(weight.name)} is to be "
                        f"{weight.length} bytes at {weight.offset} of {shown(weight.file)}, and "
                        f"the bundle's weights are {there}; compile the engines again"
                    )

    @property
    def folders(self) -> list[Path]:
        """Folders of all sets in the bundle, and of those in the cache that share a graph with it.

        A cached set whose manifest is damaged is left out: it may be any bundle's.
        """
        inside, cached = self._places
        return sorted([*sets_in(inside), *filter(self.shares, sets_in(cached))])

    def shares(self, folder: Path) -> bool:
        """Return whether a set's manifest lists a graph of this bundle, so that its plan can serve.

        The set's other files are not checked.
        """
        files = self.bundle.manifest.files
        variants = self.bundle.manifest.variants
        own = {files[graph.file].sha256 for v in variants for graph in v.graphs.values()}
        with suppress(BundleError):
            manifest, _ = open_manifest(folder, EngineSetManifest)
            return not own.isdisjoint(manifest.recipe.graphs.values())
        return False

    @property
    def _places(self) -> tuple[Path, Path]:
        return self.bundle.path / ENGINES, cache_folder() / ENGINES

    def places_of(self, recipe: EngineRecipe) -> tuple[Path, Path]:
        """Return where a set may be: in the bundle, and in the user's cache."""
        name = f"{recipe.backend}-{recipe.key[:16]}"
        inside, cached = self._places
        return inside / name, cached / name


def _preference(engines: EngineSet) -> tuple[int, int, str]:
    recipe = engines.manifest.recipe
    defaults = {(name, str(value)) for name in recipe.flags for value in (None, False)}
    settings = len(recipe.flags.items() - defaults - {("aux_streams", "0")})
    return LAYOUTS.index(recipe.layout), settings, engines.path.name


def sets_in(place: Path) -> list[Path]:
    """Return the folders of all engine sets in a folder, damaged ones included."""
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if path.is_dir() and path.name[0] != "."]


def why_unusable(
    recipe: EngineRecipe, tools: Mapping[str, str], gpus: Collection[str]
) -> str | None:
    """Return why engines cannot run with these tools on these GPUs; None if they can.

    tools: versions by name. gpus: architecture and model of each, as in "sm90 NVIDIA H200".
    """
    for tool, needed in recipe.tools.items():
        found = tools.get(tool)
        if found is None or not _version_serves(recipe, needed, found):
            return f"of {tool} {needed}, and {f'{found} is' if found else 'none is'} installed"
    if not any(_gpu_serves(recipe, gpu) for gpu in gpus):
        return f"for {recipe.gpu}, and this machine has {', '.join(sorted(gpus)) or 'no GPU'}"
    return None


def _version_serves(recipe: EngineRecipe, needed: str, found: str) -> bool:
    """Return whether a version runs the engines: version-compatible ones allow later minor ones."""
    if recipe.flags.get("version_compatible") != str(True):
        return found == needed
    own, other = ([int(part) for part in re.findall(r"\d+", text)] for text in (needed, found))
    return own[:1] == other[:1] and own <= other


def _gpu_serves(recipe: EngineRecipe, gpu: str) -> bool:
    """Return whether a GPU runs the engines: TensorRT's need the model, RTX's the architecture."""
    architecture = gpu.split()[0]
    compatible = recipe.flags.get("hardware_compatible")
    if compatible == "ampere-plus":
        return int(architecture.removeprefix("sm")) >= AMPERE
    if compatible == "same-compute-capability":
        return architecture == recipe.gpu.split()[0]
    return gpu == recipe.gpu or architecture in recipe.gpu.split("+")


def built_here(digest: str) -> Path:
    """Return the record of a set's digest: a file that exists if this user built the set here."""
    return records() / digest


def records() -> Path:
    """Return the folder of the records of sets that this user built on this machine."""
    return data_folder() / "engines-built-here"

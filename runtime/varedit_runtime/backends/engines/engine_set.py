"""Sets of compiled engines: keyed by all that they depend on, published and checked like bundles.

A set lies in `engines/BACKEND-KEY` of its bundle or, where the bundle cannot be written, of the
user's cache, where it serves every bundle that it fits. Compiled engines are native code: only
those that this user built on this machine are loaded unasked.
"""

import hashlib
import re
import shlex
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from varedit_runtime.backends.engines.packing import unpack
from varedit_runtime.bundle import Bundle, Folder, open_manifest
from varedit_runtime.errors import BundleError
from varedit_runtime.locate import cache_folder, data_folder
from varedit_runtime.manifest import (
    ENGINES,
    PRINTABLE,
    Bytes,
    Digest,
    FolderManifest,
    Name,
    Precision,
    Text,
    canonical_json,
    weights_file,
)

Layout = Literal["external", "profiles", "baked"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


AMPERE = 80  # the compute capability that ampere-plus starts from

# An architecture, and behind a space what else there is to say.
Gpu = Annotated[str, Meta(pattern=rf"\A(?=\S){PRINTABLE}\Z", max_length=1000)]


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """All that a set of engines depends on; `EngineSets.recipe` makes one.

    graphs: the digest of every stage's ONNX file; weights: of every component that is baked into
    the engines, none where weights are inputs; tools: their versions; gpu: its architecture and, of
    TensorRT, whose engines are for one model of GPU, the model.
    """

    backend: Name
    variant: Name
    graphs: dict[Name, Digest]
    weights: dict[Name, Digest]
    tools: dict[Text, Text]
    gpu: Gpu
    layout: Layout
    precision: Precision
    flags: dict[Text, Text]

    @property
    def key(self) -> str:
        """sha256 of the recipe: another one for anything that could give other engines."""
        return hashlib.sha256(canonical_json(self)).hexdigest()


class EngineWeight(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """An input of an engine that is a weight: bytes of one of the bundle's weights files."""

    name: Text
    file: str
    offset: Bytes
    length: Bytes


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled engine. file: in the set, packed; size: in bytes, unpacked."""

    file: str
    size: Bytes


class EngineSetManifest(FolderManifest, frozen=True):
    """The manifest of an engine set.

    plans: every stage's compiled engine; weights: the inputs of each that are weights, where these
    are not inside.
    """

    recipe: Recipe
    plans: dict[Name, Plan]
    weights: dict[Name, tuple[EngineWeight, ...]] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plans.keys() != self.recipe.graphs.keys():
            expected = sorted(self.recipe.graphs)
            raise ValueError(f"plans of {sorted(self.plans)}, where {expected} were expected")
        for stage, plan in self.plans.items():
            if plan.file not in self.files:
                raise ValueError(f"{stage}'s {plan.file!r} is not in files")
        if unknown := self.weights.keys() - self.plans.keys():
            raise ValueError(f"weights of {sorted(unknown)}, which have no plan")


@dataclass(frozen=True)
class EngineSet:
    """An opened set. digest: of its manifest, which has the digests of its plans."""

    path: Path
    manifest: EngineSetManifest
    digest: str

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> "EngineSet":
        """Raises BundleError when the set is damaged, or its digest is not the one given."""
        manifest, digest = open_manifest(path, EngineSetManifest, digest)
        engines = cls(path, manifest, digest)
        engines._folder.check_sizes()
        return engines

    @property
    def _folder(self) -> Folder:
        return Folder(self.path, self.manifest.files)

    def verify(self) -> None:
        """Hash all files. Raises BundleError on damage."""
        for file in self.manifest.files:
            self._folder.verify(file, lambda count: None)

    def packed_plan(self, stage: str) -> Iterator[bytes]:
        """The file of a stage's plan in pieces. Raises BundleError at its end if it is damaged."""
        return self._folder.chunks(self.manifest.plans[stage].file)

    def plan_bytes(self, stage: str) -> bytearray:
        """A stage's compiled engine: of exactly the bytes that were hashed and found right.

        Raises BundleError when there is none, or it is damaged or not as large as is said.
        """
        if stage not in self.manifest.plans:
            known = ", ".join(self.manifest.plans)
            raise BundleError(f"{self.path} has no engine for {stage!r}; it has {known}")
        plan = self.manifest.plans[stage]
        chunks = self.packed_plan(stage)
        try:
            return unpack(chunks, self.manifest.files[plan.file].size, plan.size)
        except ValueError as error:
            deque(chunks, maxlen=0)  # to its end, where it says whether it is damaged
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
        layout: Layout,
        flags: Mapping[str, str],
        baked: Sequence[str] = (),
    ) -> Recipe:
        """What engines for these stages of the bundle depend on.

        baked: the components whose weights are in the engines. Raises BundleError when the bundle
        does not have one of these parts.
        """
        manifest = self.bundle.manifest
        if unknown := set(baked) - set(self.bundle.components):
            known = ", ".join(self.bundle.components)
            raise BundleError(f"there are no weights of {sorted(unknown)}; there are {known}")
        graphs = {stage: manifest.variant(variant).graph(stage).file for stage in stages}
        weights = {component: weights_file(component) for component in baked}
        return Recipe(
            backend=backend,
            variant=variant,
            graphs={stage: manifest.files[file].sha256 for stage, file in graphs.items()},
            weights={name: manifest.files[file].sha256 for name, file in weights.items()},
            tools=dict(tools),
            gpu=gpu,
            layout=layout,
            precision=manifest.precision,
            flags=dict(flags),
        )

    def open(
        self,
        recipe: Recipe,
        digest: str | None = None,
        trust: bool = False,
        verify: bool = False,
    ) -> EngineSet | None:
        """The engines made from this recipe, None when there are none.

        digest: the set's own, from where it was published; verify: hash all files now, and not
        only when they are read. Raises BundleError when engines are damaged, of another recipe, or
        have weights that are not in the bundle; or were not built here, and neither is their digest
        given nor are they trusted.
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
        """The engines of a variant for a GPU and these tools.

        Of several, those of the layout with the smallest plans, and compiled with the fewest
        settings. gpu: architecture and model, as in "sm90 NVIDIA H200". digest: of that set and no
        other; trust: as for `open`. Raises BundleError when there are none, saying what is there
        instead, and why it is not used.
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
        """Refuse engines of other graphs, weights, tools or GPUs."""
        if not self.of_this_bundle(engines.manifest.recipe):
            raise BundleError("they are of other graphs or weights than the bundle's")
        if reason := mismatch(engines.manifest.recipe, tools, [gpu]):
            raise BundleError(f"they are {reason}")
        self._check_weights(engines)

    def of_this_bundle(self, recipe: Recipe) -> bool:
        """Whether it is of the bundle as it is. Raises BundleError if the bundle lacks parts."""
        ours = self.recipe(
            recipe.variant,
            list(recipe.graphs),
            backend=recipe.backend,
            tools=recipe.tools,
            gpu=recipe.gpu,
            layout=recipe.layout,
            flags=recipe.flags,
            baked=list(recipe.weights),
        )
        return ours == recipe

    def _open_trusted(
        self, folder: Path, recipe: Recipe, digest: str | None, trust: bool
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
        """Refuse weights that lie elsewhere than in the bundle's weights."""
        files = self.bundle.manifest.files
        sizes = {file: files[file].size for file in map(weights_file, self.bundle.components)}
        for stage, weights in engines.manifest.weights.items():
            for weight in weights:
                if weight.offset + weight.length > sizes.get(weight.file, -1):
                    there = ", ".join(f"{file} of {size}" for file, size in sizes.items())
                    raise BundleError(
                        f"{engines.path}: {stage}'s weight {weight.name!r} is to be "
                        f"{weight.length} bytes at {weight.offset} of {weight.file!r}, and the "
                        f"bundle's weights are {there}; compile the engines again"
                    )

    @property
    def folders(self) -> list[Path]:
        """Of the sets that there are: all in the bundle, and the cached that share a graph with it.

        What is damaged in the cache so that its recipe cannot be read may be any bundle's.
        """
        inside, cached = self._places
        return sorted([*sets_in(inside), *filter(self.shares, sets_in(cached))])

    def shares(self, folder: Path) -> bool:
        """Whether a set's manifest says that it has a graph of this bundle, whose plan can serve.

        Its files are not looked at.
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

    def places_of(self, recipe: Recipe) -> tuple[Path, Path]:
        """Where a set may be: in the bundle, and in the user's cache, whatever the bundle."""
        name = f"{recipe.backend}-{recipe.key[:16]}"
        inside, cached = self._places
        return inside / name, cached / name


def _preference(engines: EngineSet) -> tuple[int, int, str]:
    recipe = engines.manifest.recipe
    settings = sum(value not in (str(None), str(False)) for value in recipe.flags.values())
    return LAYOUTS.index(recipe.layout), settings, engines.path.name


def sets_in(place: Path) -> list[Path]:
    """The folders of all engine sets in a folder, whole or damaged."""
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if path.is_dir() and path.name[0] != "."]


def mismatch(recipe: Recipe, tools: Mapping[str, str], gpus: Collection[str]) -> str | None:
    """Why engines cannot run with these tools, by name, on these GPUs; None where they can.

    gpus: architecture and model of each, as in "sm90 NVIDIA H200".
    """
    for tool, needed in recipe.tools.items():
        found = tools.get(tool)
        if found is None or not _version_serves(recipe, needed, found):
            return f"of {tool} {needed}, and {f'{found} is' if found else 'none is'} installed"
    if not any(_gpu_serves(recipe, gpu) for gpu in gpus):
        return f"for {recipe.gpu}, and this machine has {', '.join(sorted(gpus)) or 'no GPU'}"
    return None


def _version_serves(recipe: Recipe, needed: str, found: str) -> bool:
    """Compatible engines run with later versions up to the next major one."""
    if recipe.flags.get("version_compatible") != str(True):
        return found == needed
    own, other = ([int(part) for part in re.findall(r"\d+", text)] for text in (needed, found))
    return own[:1] == other[:1] and own <= other


def _gpu_serves(recipe: Recipe, gpu: str) -> bool:
    """TensorRT's engines are for a model unless they are compatible, RTX's for architectures."""
    architecture = gpu.split()[0]
    compatible = recipe.flags.get("hardware_compatible")
    if compatible == "ampere-plus":
        return int(architecture.removeprefix("sm")) >= AMPERE
    if compatible == "same-compute-capability":
        return architecture == recipe.gpu.split()[0]
    return gpu == recipe.gpu or architecture in recipe.gpu.split("+")


def built_here(digest: str) -> Path:
    """A file that exists when this user built the engine set of this digest on this machine."""
    return records() / digest


def records() -> Path:
    return data_folder() / "engines-built-here"

"""Collecting the facts about this machine and a bundle on it, without raising where they lack."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from varedit_runtime.backends import BACKENDS, find_backend
from varedit_runtime.backends.engines.engine_set import EngineSet, EngineSets
from varedit_runtime.backends.engines.memory import budget
from varedit_runtime.backends.host import available_memory, nvidia
from varedit_runtime.backends.machine import (
    BundleFacts,
    EngineSetFacts,
    Machine,
    Nvidia,
    ProbeResult,
)
from varedit_runtime.backends.onnxruntime.memory import HostBudget, host_budget
from varedit_runtime.backends.spec import BackendSpec
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ANY_FAILURE, BundleError, one_line, reason
from varedit_runtime.files import free_space
from varedit_runtime.locate import default_root
from varedit_runtime.manifest import weights_file
from varedit_runtime.values import checked


def detect_machine(
    bundle: Bundle | Path | None = None,
    variant: str | None = None,
    gpus: Nvidia | None = None,
    offload: str | None = None,
) -> Machine:
    """Return this machine as it is now.

    variant: whose engines count; by default those of all variants. gpus: what `nvidia` found, where
    it was asked already. offload: what the bundle is to be opened with, for less memory. Raises
    BundleError when the bundle cannot be opened.
    """
    opened = Bundle.open(bundle) if isinstance(bundle, Path) else bundle
    return Machine(
        python=platform.python_version(),
        nvidia=gpus or nvidia(),
        packages=installed(),
        probes=_Probes(),
        memory=available_memory(),
        disk=free_space(default_root()),
        bundle=None if opened is None else _bundle_facts(opened, variant, offload),
    )


class _Probes(Mapping[str, ProbeResult]):
    """What every backend finds; it is asked when somebody wants to know, as that takes time."""

    def __init__(self) -> None:
        self._found: dict[str, ProbeResult] = {}

    def __getitem__(self, name: str) -> ProbeResult:
        if name not in self._found:
            self._found[name] = _probe(find_backend(name))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(BACKENDS)

    def __len__(self) -> int:
        return len(BACKENDS)


def _probe(spec: BackendSpec[Any]) -> ProbeResult:
    try:
        return checked("what it found", spec.probe(), ProbeResult)
    except ANY_FAILURE as error:  # a library may be half removed: it imports and offers nothing
        return ProbeResult(reason(error))


def installed() -> dict[str, str]:
    """Return the versions of all installed distributions, by their normalised names."""
    packages: dict[str, str] = {}
    for found in distributions():
        name = found.metadata["Name"]
        if name is not None:  # what a failed uninstallation left has none
            # The first on the path is the one that is imported.
            packages.setdefault(name.lower().replace("_", "-"), found.version)
    return packages


def _bundle_facts(bundle: Bundle, variant: str | None, offload: str | None) -> BundleFacts:
    manifest, sets = bundle.manifest, EngineSets(bundle)
    engines = [_engines(sets, path, offload) for path in sets.folders]
    needed = list(_needed(bundle, variant))
    return BundleFacts(
        path=bundle.path,
        precision=manifest.policy,
        weights=sum(manifest.files[weights_file(name)].size for name in bundle.components),
        variants=tuple(variant.name for variant in manifest.variants),
        unfit=manifest.unfit,
        memory=max((told.offloaded if offload else told.total for told, _ in needed), default=0),
        offloaded=max((told.offloaded for told, _ in needed), default=0),
        gpu_memory=max((on_gpu for _, on_gpu in needed), default=0),
        engines=tuple(
            facts
            for facts in engines
            if variant is None or facts.recipe is None or facts.recipe.variant == variant
        ),
    )


def _needed(bundle: Bundle, variant: str | None) -> Iterator[tuple[HostBudget, int]]:
    """Yield what editing takes on a CPU, and the bytes on a GPU, for the variants that count.

    The bytes on a GPU are those without offload, with it too: ONNX Runtime's CUDA provider keeps
    the memory of freed caches for later buffers, and the text encoder takes memory of its own.
    """
    for one in bundle.manifest.variants:
        if variant in (None, one.name):
            with suppress(BundleError):  # opening it says what is wrong
                told = host_budget(bundle, one)
                yield told, budget(bundle, one).total + told.activations


def _engines(sets: EngineSets, path: Path, offload: str | None) -> EngineSetFacts:
    bundle = sets.bundle
    try:
        engines = EngineSet.open(path).manifest
        recipe = engines.recipe
        if not sets.of_this_bundle(recipe):
            return EngineSetFacts(
                path, None, "they are of other graphs or weights than the bundle's"
            )
        sets.open(recipe)  # says whether they were built here
        if offload and recipe.layout != "external":
            return EngineSetFacts(
                path, None, "they contain their weights, which --offload text cannot release"
            )
        variant = bundle.manifest.variant(recipe.variant)
        needed, offloaded = (
            budget(bundle, variant, recipe.layout, engines, how).total for how in (offload, "text")
        )
    except BundleError as error:
        return EngineSetFacts(path, None, one_line(error))
    return EngineSetFacts(path, recipe, gpu_memory=needed, offloaded=offloaded)

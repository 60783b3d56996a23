"""Collecting the facts about this machine and a bundle on it, without raising where they lack."""

import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from varedit_runtime.backends import specs
from varedit_runtime.backends.engines.engine_set import EngineSet, EngineSets
from varedit_runtime.backends.engines.memory import budget
from varedit_runtime.backends.machine import (
    BundleFacts,
    EngineSetFacts,
    Machine,
    ProbeResult,
    available_memory,
    nvidia,
)
from varedit_runtime.backends.spec import BackendSpec
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ANY_FAILURE, BundleError, one_line, reason
from varedit_runtime.files import free_space
from varedit_runtime.locate import default_root
from varedit_runtime.manifest import weights_file
from varedit_runtime.values import checked


def detect_machine(bundle: Path | None = None) -> Machine:
    """Return this machine as it is now. Raises BundleError when the bundle cannot be opened."""
    return Machine(
        python=platform.python_version(),
        nvidia=nvidia(),
        packages=installed(),
        probes={spec.name: _probe(spec) for spec in specs()},
        memory=available_memory(),
        disk=free_space(default_root()),
        bundle=None if bundle is None else _bundle_facts(Bundle.open(bundle)),
    )


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


def _bundle_facts(bundle: Bundle) -> BundleFacts:
    manifest, sets = bundle.manifest, EngineSets(bundle)
    return BundleFacts(
        path=bundle.path,
        precision=manifest.policy,
        weights=sum(manifest.files[weights_file(name)].size for name in bundle.components),
        variants=tuple(variant.name for variant in manifest.variants),
        engines=tuple(_engines(sets, path) for path in sets.folders),
    )


def _engines(sets: EngineSets, path: Path) -> EngineSetFacts:
    bundle = sets.bundle
    try:
        engines = EngineSet.open(path).manifest
        recipe = engines.recipe
        if not sets.of_this_bundle(recipe):
            return EngineSetFacts(
                path, None, "they are of other graphs or weights than the bundle's"
            )
        sets.open(recipe)  # says whether they were built here
        variant = bundle.manifest.variant(recipe.variant)
        needed = budget(bundle, variant, recipe.layout, engines)
    except BundleError as error:
        return EngineSetFacts(path, None, one_line(error))
    return EngineSetFacts(path, recipe, gpu_memory=needed.total)

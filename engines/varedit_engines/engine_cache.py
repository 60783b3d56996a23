"""Make the engine sets of a bundle: one process at a time, each set complete or not at all."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from varedit_engines.publish import Staging
from varedit_runtime.backends.engines.engine_set import (
    EngineRecipe,
    EngineSet,
    EngineSets,
    built_here,
    records,
    sets_in,
)
from varedit_runtime.bundle import Bundle, digest_line, read_at_most, regular_file
from varedit_runtime.errors import BundleError
from varedit_runtime.files import same_file
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import DIGEST, ENGINES, MANIFEST, MAX_MANIFEST_BYTES


class EngineCache(EngineSets):
    """The engine sets of a bundle, to find and to make.

        recipe = cache.recipe("512", stages, backend="tensorrt", ...)
        engines = cache.open(recipe)
        if engines is None:
            with cache.create(recipe) as staging:  # waits while another process compiles
                engines = cache.open(recipe)  # made by that process
                ...  # otherwise compile, record and publish

    Creating a set replaces an existing one. Ask `built_elsewhere` before for a damaged set, and
    `check_replaceable` for a whole one: sets that others built are not ours to replace.
    """

    def built_elsewhere(self, recipe: EngineRecipe) -> list[Path]:
        """Return the existing sets of this recipe that this user did not build on this machine."""
        places = self.places_of(recipe)
        return [folder for folder in places if folder.exists() and not _made_here(folder)]

    def check_replaceable(self, engines: EngineSet) -> None:
        """Raise BundleError if a new set would replace another builder's, or would not be found."""
        inside, _ = self.places_of(engines.manifest.recipe)
        for folder in self.built_elsewhere(engines.manifest.recipe):
            raise BundleError(
                f"{folder} has engines that were built elsewhere, which are not replaced: delete "
                "the folder to compile your own"
            )
        if engines.path == inside and not _writable(inside.parent):
            raise BundleError(
                f"{inside} cannot be replaced: make the folder {inside.parent} writable"
            )

    def create(self, recipe: EngineRecipe) -> Staging:
        """Return a staging for a set: in the bundle, or in the user's cache.

        A bundle that is read-only, or part of this program, takes none.
        A published set is recorded as built here, so that opening it needs no digest and no trust.
        """
        folder, cached = self.places_of(recipe)
        if same_file(self.bundle.path, embedded()):
            folder = cached
        else:
            with suppress(OSError):
                folder.parent.mkdir(exist_ok=True)
            folder = folder if _writable(folder.parent) else cached
        # Not beside the engines: the journal vouches for finished plans, which are native code, and
        # a stranger could put a forged one into a bundle.
        journal = records() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()}.journal"
        return Staging(folder, wait=True, check=_vouch_for, journal=journal)


def copy_sets(source: Bundle, target: Bundle) -> None:
    """Copy the engine sets in a bundle that serve another one too into that one.

    They serve it if graphs are the same, and weights too where they are inside. Damaged sets, and
    those that there is no room for, are left out. Who built a set is known by its digest, which
    stays the same.
    """
    serves = EngineSets(target).of_this_bundle
    for folder in sets_in(source.path / ENGINES):
        copy = target.path / ENGINES / folder.name
        with suppress(BundleError):
            engines = EngineSet.open(folder)
            if serves(engines.manifest.recipe) and not copy.exists():
                with Staging(copy, wait=True, check=EngineSet.open) as staging:
                    for name in engines.manifest.files:
                        shutil.copyfile(folder / name, staging.file(name))
                        staging.record(name)
                    staging.publish(engines.manifest)


def _made_here(folder: Path) -> bool:
    """Return whether records list the digest of the manifest, or the one beside a damaged one."""
    try:
        manifest, beside = (
            read_at_most(regular_file(folder, name), MAX_MANIFEST_BYTES)
            for name in (MANIFEST, DIGEST)
        )
    except BundleError:
        return False
    told = {digest_line(hashlib.sha256(manifest).hexdigest()), beside}
    return any(digest_line(record.name) in told for record in records().glob("*"))


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


def _vouch_for(folder: Path) -> None:
    """Record that this user built this set on this machine."""
    record = built_here(EngineSet.open(folder).digest)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()

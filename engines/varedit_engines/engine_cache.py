"""Making the engine sets of a bundle: one at a time, whole or not at all."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from varedit_engines.publish import Staging
from varedit_runtime.backends.engines.engine_set import (
    EngineSet,
    EngineSets,
    Recipe,
    built_here,
    records,
)
from varedit_runtime.bundle import digest_line, read_at_most, regular_file
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import DIGEST, MANIFEST, MAX_MANIFEST_BYTES


class EngineCache(EngineSets):
    """The engine sets of a bundle, found or made.

        recipe = cache.recipe("512", stages, backend="tensorrt", ...)
        engines = cache.open(recipe)
        if engines is None:
            with cache.create(recipe) as staging:  # waits while another process compiles
                engines = cache.open(recipe)  # the other's
                ...  # else compile, record and publish

    Creating a set replaces the one that is there: a damaged one that `made_here` says to be ours,
    or a whole one that `check_replaceable` lets pass.
    """

    def made_here(self, recipe: Recipe) -> bool:
        """Whether this user built here what is in the places of this set, whole or damaged."""
        return not self._foreign(recipe)

    def check_replaceable(self, engines: EngineSet) -> None:
        """Raises BundleError when a new set would replace another's, or would not be found."""
        inside, _ = self.places_of(engines.manifest.recipe)
        for folder in self._foreign(engines.manifest.recipe):
            raise BundleError(
                f"{folder} has engines that were built elsewhere, and they are not replaced: "
                "delete the folder"
            )
        if engines.path == inside and not _writable(inside.parent):
            raise BundleError(f"{inside} cannot be replaced: the bundle cannot be written")

    def _foreign(self, recipe: Recipe) -> list[Path]:
        places = self.places_of(recipe)
        return [folder for folder in places if folder.exists() and not _made_here(folder)]

    def create(self, recipe: Recipe) -> Staging:
        """Where to write a set: in the bundle or, if that is read-only, in the user's cache.

        Opening it once it is published needs neither digest nor trust.
        """
        inside, cached = self.places_of(recipe)
        with suppress(OSError):
            inside.parent.mkdir(exist_ok=True)
        folder = inside if _writable(inside.parent) else cached
        # Not beside the engines: it vouches for what an interrupted compilation left there.
        journal = records() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()}.journal"
        return Staging(folder, wait=True, check=_vouch_for, journal=journal)


def _made_here(folder: Path) -> bool:
    """As the manifest tells or, should that be damaged, the digest beside it."""
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
    record = built_here(EngineSet.open(folder).digest)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()

"""Making the engine sets of a bundle: one at a time, whole or not at all."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from varedit_engines.publish import Staging
from varedit_runtime.engine_set import EngineSet, EngineSets, Recipe, built_here, records


class EngineCache(EngineSets):
    """The engine sets of a bundle, found or made.

        recipe = cache.recipe("512", stages, backend="tensorrt", ...)
        engines = cache.open(recipe)
        if engines is None:
            with cache.create(recipe) as staging:  # waits while another process compiles
                engines = cache.open(recipe)  # the other's
                ...  # else compile, record and publish

    A set that is found damaged is replaced by creating it again.
    """

    def create(self, recipe: Recipe) -> Staging:
        """Where to write a set: in the bundle or, if that is read-only, in the user's cache.

        Opening it once it is published needs neither digest nor trust.
        """
        inside, cached = self.places_of(recipe)
        with suppress(OSError):
            inside.parent.mkdir(exist_ok=True)
        folder = inside if os.access(inside.parent, os.W_OK) else cached
        # Not beside the engines: it vouches for what an interrupted compilation left there.
        journal = records() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()}.journal"
        return Staging(folder, wait=True, check=_vouch_for, journal=journal)


def _vouch_for(folder: Path) -> None:
    record = built_here(EngineSet.open(folder).digest)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()

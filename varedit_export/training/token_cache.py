"""Keep on a disk what a model sees of pairs, so that a training step encodes nothing.

    FOLDER/MADE_BY/KEY[:2]/KEY.npz    a file for each pair, by digests, in half precision

Pairs are found by what they consist of, so that data may grow, shrink and be shuffled. A file is
there whole or not at all: processes may share the folder, and what was killed goes on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from varedit_export.errors import DatasetError
from varedit_export.pairs.pair import Pair
from varedit_runtime.errors import ConfigError, readable_size
from varedit_runtime.files import atomic_file, free_space, writing

Arrays = Mapping[str, np.ndarray]
Encode = Callable[[Pair], Arrays]

_FORMAT = 1  # of the files: another number makes all tokens anew


class TokenCache:
    """A folder of pairs' tokens."""

    def __init__(self, folder: Path, made_by: Sequence[object], encode: Encode) -> None:
        """Name the cache of what encodes pairs.

        made_by: what tokens depend on beside the pair, such as digests of weights and the pictures'
        size. encode: returns a pair's tokens, as arrays of floats by name.
        """
        told = json.dumps([_FORMAT, *made_by]).encode()
        self._folder, self._encode = folder / hashlib.sha256(told).hexdigest()[:32], encode

    def __getitem__(self, pair: Pair) -> Arrays:
        """Return a pair's tokens, fp32 arrays of fp16's values, after making them if need be.

        Raises DatasetError if they are not finite, ConfigError if they cannot be written, and what
        encoding raises.
        """
        if (found := self.find(pair.key)) is None:
            self._write(pair)
            found = self.find(pair.key)
        if found is None:
            raise ConfigError(f"{self._path(pair.key)} cannot be read: is the disk well?")
        return found

    def find(self, key: str) -> Arrays | None:
        """Return the tokens of the pair with a key; None if they are not there, or damaged."""
        return _read(self._path(key))

    def fill(
        self,
        pairs: Sequence[Pair],
        on_step: Callable[[int, int], None] = lambda done, count: None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Make the tokens that are missing, or of several processes the share of one.

        on_step: called before each pair, with the number that are done, of how many. Raises as
        `cache[pair]`, and ConfigError if the disk has no room for all.
        """
        own = range(rank, len(pairs), ranks)  # in turn: lists may begin with what is already made
        room = False
        for done, place in enumerate(own):
            on_step(done, len(own))
            pair = pairs[place]
            if not self._path(pair.key).is_file():
                size = self._write(pair)
                if not room:
                    self._check_room(size * (len(own) - done - 1) * ranks)
                    room = True

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.npz"

    def _write(self, pair: Pair) -> int:
        """Make a pair's tokens and write them; return the bytes of the file."""
        with np.errstate(over="ignore"):
            made = self._encode(pair).items()
            arrays: dict[str, Any] = {k: np.asarray(v).astype(np.float16) for k, v in made}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise DatasetError(f"{pair.id}: its tokens are not finite numbers")
        path = self._path(pair.key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as whole:
                np.savez(whole, **arrays)
                return whole.stat().st_size

    def _check_room(self, needed: int) -> None:
        if needed > (free := free_space(self._folder)):
            raise ConfigError(
                f"the pairs' tokens take {readable_size(needed)} more, and {readable_size(free)} "
                f"are free in {self._folder.parent}: make room, or take fewer pairs"
            )


def _read(path: Path) -> Arrays | None:
    """Return the arrays of a file; None if it is not there, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name].astype(np.float32) for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None

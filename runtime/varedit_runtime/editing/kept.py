"""What earlier edits computed of a picture and its instruction, kept for the next ones.

Several results of one picture and instruction differ in their seeds alone: the text, the picture
and the prefill, which reads both, are computed once. Edits of the same picture, or by the same
instruction, share what their encoders computed. Everything is found by its whole content; of a text
this includes the padding, on which the last bits of its features depend.
"""

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from varedit_runtime.backends.base import Backend, Prompts

MOST_KEPT = 16  # texts, and pictures; a text of the published models takes 1 MB, a picture less


class Kept:
    """The results of a backend's encoders, and what its caches hold of the last edit.

    A backend computes the same for the same arrays, so that it makes no difference to an edit
    whether something was kept.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._texts: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._sources: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._prefilled: tuple[Prompts, np.ndarray] | None = None
        self._shared = False

    def share(self) -> None:
        """Trust no prefill from now on: others have the backend, and may fill its caches."""
        self._shared, self._prefilled = True, None

    def forget(self) -> None:
        """Drop everything."""
        self._texts.clear()
        self._sources.clear()
        self._prefilled = None

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        """Encode texts as `Backend.encode_text` does."""
        return self._of_rows(self._texts, self._backend.encode_text, token_ids, text_mask)

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Encode pictures as `Backend.encode_pictures` does."""
        return self._of_rows(self._sources, self._backend.encode_pictures, pictures)

    def take_prefilled(self, prompts: Prompts, pictures: np.ndarray) -> bool:
        """Return whether the backend's caches hold the prefill of an edit.

        Nothing is known of them until `prefilled`, in case the edit fails.
        """
        held, self._prefilled = self._prefilled, None
        return held is not None and _same((prompts, pictures), held)

    def prefilled(self, prompts: Prompts, pictures: np.ndarray) -> None:
        """Say that the caches hold the prefill of an edit, with all rows that it began with."""
        self._prefilled = None if self._shared else (prompts, pictures)

    def _of_rows(
        self,
        kept: OrderedDict[bytes, np.ndarray],
        encode: Callable[..., np.ndarray],
        *batch: np.ndarray,
    ) -> np.ndarray:
        """Return each row's kept result; encode the rows that have none, each once."""
        keys = [_key(*row) for row in zip(*batch, strict=True)]
        results = {key: kept[key] for key in keys if key in kept}
        places = list({key: place for place, key in enumerate(keys) if key not in kept}.values())
        if places:
            size = next(n for n in self._backend.batches if n >= len(places))
            places += places[-1:] * (size - len(places))
            encoded = encode(*(array[places] for array in batch))
            # A copy of each: a row alone would keep the memory of the whole batch.
            new = {keys[p]: row.copy() for p, row in zip(places, encoded, strict=True)}
            results |= new
            kept.update((key, row) for key, row in new.items() if np.isfinite(row).all())
        for key in keys:
            if key in kept:
                kept.move_to_end(key)
        while len(kept) > MOST_KEPT:
            kept.popitem(last=False)
        return np.stack([results[key] for key in keys])


def _key(*arrays: np.ndarray) -> bytes:
    digest = blake2b(digest_size=32)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _same(one: tuple[Prompts, np.ndarray], other: tuple[Prompts, np.ndarray]) -> bool:
    return all(map(np.array_equal, _arrays(*one), _arrays(*other)))


def _arrays(prompts: Prompts, pictures: np.ndarray) -> list[np.ndarray]:
    nothing = np.empty(0)
    negatives = prompts.negatives
    unconditional = (nothing,) * 3
    if negatives is not None:
        unconditional = (negatives.ids, negatives.mask, negatives.present)
    return [prompts.ids, prompts.mask, *unconditional, pictures]

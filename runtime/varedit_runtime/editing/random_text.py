"""Edit with random text features, to measure a bundle that was built without a text encoder."""

from typing import Any, cast

import numpy as np

from varedit_runtime.backends.base import Backend
from varedit_runtime.backends.wiring import TEXT
from varedit_runtime.editing.editor import Editor
from varedit_runtime.text import Instructions

SAID = "no text encoder: random features in place of an instruction's"


def with_any_text(editor: Editor) -> Editor:
    """Return an editor that takes instructions: itself or, without a text encoder, a stand-in.

    The stand-in runs the same backend on random features of the full length. The same bundle always
    gets the same ones.
    """
    if TEXT in editor.variant.graphs:
        return editor
    variant = editor.variant
    shape = (variant.batch, variant.text_tokens, editor.bundle.manifest.model.text_channels)
    features = np.random.default_rng(0).standard_normal(shape, np.float32)
    backend = cast(Backend, _RandomText(editor.backend, features))
    return Editor(editor.bundle, variant, backend, _AnyText(variant.text_tokens), editor.chosen)


class _AnyText(Instructions):
    """Takes every text for an instruction of the full length."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def tokenise(self, prompt: str, *, truncate: bool = False) -> list[int]:
        return [0] * self.limit

    def mostly_unknown(self, prompt: str) -> bool:
        return False


class _RandomText:
    """A backend, but for its text encoder."""

    def __init__(self, backend: Backend, features: np.ndarray) -> None:
        self._backend, self._features = backend, features

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        return self._features

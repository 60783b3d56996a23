"""What the parent and the child process tell each other: pickled tuples over a socket.

The parent sends:

    ("open", Opening)                   first
    ("edit", number, [Order, ...])      a batch
    ("cancel", number)                  nobody waits for the batch any more

The child sends, besides ("alive",) every second:

    ("ready", Ready) or ("unfit", text) the editor is open, or cannot be opened
    ("partial", number, place, index, image)
    ("edited", number, [EditResult, ...])
    ("failed", number, text, own)       own: the edit is at fault, and not the process
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend

BEAT = 1.0  # seconds


@dataclass(frozen=True)
class Opening:
    """What the child opens; see `Editor.open`."""

    bundle: Path
    variant: str | None
    backend: ChosenBackend | AutoBackend
    digest: str | None = None


@dataclass(frozen=True)
class Order:
    """One picture to make. prepared: a pickled PreparedEdit. previews: scales to decode after."""

    prepared: bytes
    seed: int
    previews: tuple[int, ...]


@dataclass(frozen=True)
class Ready:
    """What the parent learns of the editor.

    group: edits for which it returns the same can share a batch, bit for bit. batch: how many that
    may be. seconds: that an edit takes. usual: how many share a batch where no number is asked for.
    """

    provider: str
    group: Callable[[Any], Any]
    batch: int
    seconds: float
    usual: int

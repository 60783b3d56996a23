"""What an edit returns, and what it tells on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event

from PIL import Image


@dataclass(frozen=True)
class EditResult:
    """An edited picture.

    image: RGB, or RGBA with the source's alpha if any pixel of the source is not wholly opaque; of
    the source's size unless another was asked for. seed: the same edit with it gives the same bits,
    up to ties, alone or in any batch. timings: seconds by stage, in the order they ran, of the
    whole batch that the picture was in. cpu_timings: the same of the processors, all threads of the
    process together. warnings: why the picture will hardly be what was wanted, a line each.
    """

    image: Image.Image
    seed: int
    timings: Mapping[str, float]
    cpu_timings: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """A scale of an edit that was just predicted.

    scale: from 0, the coarsest, to scales - 1. seconds: the time it took. pictures: the places of
    this batch's pictures in the call's results.
    """

    scale: int
    scales: int
    seconds: float
    pictures: range
    _draw: Callable[[], list[Image.Image]]
    _cancelled: Event

    def preview(self) -> list[Image.Image]:
        """Decode the pictures as they are so far, one for each of `pictures`."""
        return self._draw()

    def cancel(self) -> None:
        """End the edit before its next scale: `Editor.edit` raises EditCancelled."""
        self._cancelled.set()


OnScale = Callable[[Progress], None]

"""What an edit returns, and what it tells on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from PIL import Image

from varedit_runtime.backends.handle import EditHandle
from varedit_runtime.errors import ConfigError, shown


@dataclass(frozen=True)
class EditResult:
    """An edited picture.

    image: RGB, or RGBA with the source's alpha if any pixel of the source is not wholly opaque; of
    the source's size unless another was asked for. seed: the same edit with it gives the same bits,
    up to ties, alone or in any batch. timings: seconds by stage, in the order they ran, of the
    whole batch that the picture was in. cpu_timings: the same of the processors, all threads of the
    process together. waited: seconds that the call waited before, while other threads used the
    editor. warnings: why the picture will hardly be what was wanted, a line each.
    """

    image: Image.Image
    seed: int
    timings: Mapping[str, float]
    cpu_timings: Mapping[str, float]
    waited: float
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
    pictures: Sequence[int]
    _draw: Callable[[int], Image.Image]
    _handle: EditHandle

    @overload
    def preview(self) -> list[Image.Image]: ...

    @overload
    def preview(self, place: int) -> Image.Image: ...

    def preview(self, place: int | None = None) -> Image.Image | list[Image.Image]:
        """Decode the pictures as they are so far, one for each of `pictures`.

        place: the only one to return, as it is in `pictures`. Graphs decode a whole batch at once:
        it is kept, so that further previews of this scale only bring pictures to their sizes.
        Raises ConfigError on another place, EditorError if the editor cannot be used now.
        """
        if place is None:
            return [self._draw(row) for row in range(len(self.pictures))]
        if place not in self.pictures:
            told = ", ".join(map(str, self.pictures))
            raise ConfigError(f"place is {shown(place)}; give one of {told}, as in `pictures`")
        return self._draw(self.pictures.index(place))

    def cancel(self) -> None:
        """End the edit before its next stage: `Editor.edit` raises EditCancelled.

        It is the same as `cancel` of the edit's handle.
        """
        self._handle.cancel()


OnScale = Callable[[Progress], None]

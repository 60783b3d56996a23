"""Run a batch of prepared edits through a backend."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from varedit_runtime.backends.base import (
    Backend,
    EditWhole,
    Prompts,
    Sampling,
    edit_by_stages,
)
from varedit_runtime.backends.wiring import DECODER, ENCODER, TEXT
from varedit_runtime.editing.batch import PictureBatch
from varedit_runtime.editing.kept import Kept
from varedit_runtime.editing.masks import SourceKeeper
from varedit_runtime.editing.results import EditResult, Progress
from varedit_runtime.errors import NoPictureError
from varedit_runtime.manifest import Model, Variant, scale_name, scale_of
from varedit_runtime.noise import uniform_noise
from varedit_runtime.pictures import from_decoder, to_encoder

WHOLE_EDIT = "edit"  # the only entry in the timings of an edit that ran as one launch


@dataclass(frozen=True)
class Run:
    """Runs batches of one call.

    usable: returns the backend, or raises EditorError where it cannot be used. decode: decodes a
    sum of codes in any thread, also after the call, or raises EditorError.
    """

    usable: Callable[[], Backend]
    kept: Kept
    model: Model
    variant: Variant
    decode: Callable[[np.ndarray], np.ndarray]

    def edit(self, batch: PictureBatch) -> list[EditResult]:
        """Edit a batch; return its pictures. Raises EditCancelled if its handle ends it."""
        with nullcontext() if batch.handle is None else batch.handle.heeded():
            images = self._edited(batch)
        seconds, cpu_seconds = batch.timings.seconds, batch.timings.cpu_seconds
        return [
            EditResult(image, one.seed, seconds, cpu_seconds, batch.waited, one.warnings)
            for one, image in zip(batch.edits, images, strict=True)
        ]

    def _edited(self, batch: PictureBatch) -> list[Image.Image]:
        # What a mask forces depends on every scale before: the host must see it, as on_scale does.
        stepwise = batch.on_scale is not None or batch.masked
        edit = None if stepwise else self.usable().whole
        with batch.timings.of(WHOLE_EDIT if edit else TEXT):
            prompts = batch.prompts(self.variant.guided)
        with batch.timings.of(WHOLE_EDIT if edit else ENCODER):
            squares = np.stack([to_encoder(row.square) for row in batch.rows])
            prefilled = self.kept.take_prefilled(prompts, squares)
        given = batch, prompts, squares, prefilled
        images = self._edit_whole(*given, edit) if edit else self._edit_by_stages(*given)
        if batch.group.guided_scales in (0, len(self.variant.grids)):  # else half of it is gone
            self.kept.prefilled(prompts, squares)
        return images

    def _edit_whole(
        self,
        batch: PictureBatch,
        prompts: Prompts,
        squares: np.ndarray,
        prefilled: bool,
        edit: EditWhole,
    ) -> list[Image.Image]:
        with batch.timings.of(WHOLE_EDIT):
            samplings = [self._sampling(batch, scale) for scale in range(len(self.variant.grids))]
            edited = edit(prompts, squares, samplings, prefilled)
            for scale, logits in enumerate(edited.logits):
                _sound(scale_name(scale), logits, batch)
            return self._restored(_sound(DECODER, edited.pictures, batch), batch)

    def _edit_by_stages(
        self, batch: PictureBatch, prompts: Prompts, squares: np.ndarray, prefilled: bool
    ) -> list[Image.Image]:
        timings, seen = batch.timings, dict[str, np.ndarray]()
        samplings = self._samplings(batch, seen)
        stages = edit_by_stages(self.usable(), prompts, squares, samplings, self.kept, prefilled)
        for output in timings.of_each(stages):
            for array in output.arrays.values():
                _sound(output.stage, array, batch)
            seen.update(output.arrays)
            if batch.on_scale is not None and (scale := scale_of(output.stage)) is not None:
                batch.on_scale(self._progress(batch, scale, output.arrays["running_sum"]))
                self.usable()  # on_scale may have forked: nothing goes on in the child
            if batch.handle is not None and output.stage != DECODER:
                batch.handle.check()
        with timings.of(DECODER):
            return self._restored(seen["pictures"], batch)

    def _sampling(self, batch: PictureBatch, scale: int) -> Sampling:
        """Return a scale's sampling, with the noise of each picture's own seed."""
        rows, columns = self.variant.grids[scale]
        channels = self.model.token_channels
        noise = [uniform_noise(one.seed, scale, rows * columns, channels) for one in batch.rows]
        settings = [one.settings for one in batch.rows]
        return Sampling(
            np.stack(noise).reshape(len(noise), rows, columns, channels),
            np.array([one.guidance_scale[scale] for one in settings], np.float32),
            np.array([one.temperature[scale] for one in settings], np.float32),
            guided=scale < batch.group.guided_scales,
        )

    def _samplings(self, batch: PictureBatch, seen: dict[str, np.ndarray]) -> Iterator[Sampling]:
        """Yield each scale's sampling in its turn. seen: what the stages before it put out."""
        grids = self.variant.grids
        keeper = SourceKeeper([row.marked for row in batch.rows], grids[-1], self.model.patch)
        for scale in range(len(grids)):
            drawn = self._sampling(batch, scale)
            yield keeper.force(drawn, seen["source_tokens"], seen.get("running_sum"))

    def _restored(self, decoded: np.ndarray, batch: PictureBatch) -> list[Image.Image]:
        """Turn decoded pictures [B, 3, H, W] into results."""
        return [self._result(decoded, batch, row) for row in range(len(batch.edits))]

    def _result(self, decoded: np.ndarray, batch: PictureBatch, row: int) -> Image.Image:
        pixels = from_decoder(decoded[row])
        return batch.edits[row].finish.finished(pixels, self.variant.grids[-1])

    def _progress(self, batch: PictureBatch, scale: int, total: np.ndarray) -> Progress:
        @cache
        def decoded() -> np.ndarray:
            return _sound(DECODER, self.decode(total), batch)

        assert batch.handle is not None
        return Progress(
            scale=scale,
            scales=len(self.variant.grids),
            seconds=batch.timings.seconds[scale_name(scale)],
            pictures=batch.places,
            _draw=lambda row: self._result(decoded(), batch, row),
            _handle=batch.handle,
        )


def _sound(stage: str, array: np.ndarray, batch: PictureBatch) -> np.ndarray:
    """Return a stage's output [B, ...]. Raises NoPictureError if the arithmetic failed before.

    Where fp16 overflows, TensorRT can give zeros in place of NaN, and the decoder a single colour.
    """
    for row, values in enumerate(array):
        wrong = None
        if not np.isfinite(values).all():
            wrong = "numbers that are not finite"
        elif stage == DECODER and not np.ptp(values, (-2, -1)).any():
            wrong = "the same colour for all pixels"
        if wrong is not None:
            with batch.naming(row):
                raise NoPictureError(
                    f"{stage} computed {wrong}, so there is no picture: run "
                    "`varedit-export verify` on the bundle"
                )
    return array

"""Edit pictures with a bundle: from pictures, instructions and seeds to edited pictures.

    with Editor.open("bundles/2b-512") as editor:
        result = editor.edit("photo.png", "add a hat", seed=7)

All arguments of a call are checked before anything is computed.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, RLock, get_ident
from typing import Literal, overload

import numpy as np
from PIL import Image

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AUTO, AutoBackend, wanted_backend
from varedit_runtime.backends.base import (
    Backend,
    EditWhole,
    Prompts,
    Sampling,
    WeightsLostError,
    edit_by_stages,
)
from varedit_runtime.backends.interrupt import held_signals
from varedit_runtime.backends.wiring import DECODER, ENCODER, TEXT
from varedit_runtime.bundle import Bundle, load_standing
from varedit_runtime.editing.arguments import (
    OutputSize,
    PerEntry,
    Settings,
    Wanted,
    choose_pictures,
    choose_size,
)
from varedit_runtime.editing.batch import PictureBatch, guided_scales
from varedit_runtime.editing.caution import warnings_of
from varedit_runtime.editing.finish import finished
from varedit_runtime.editing.kept import Kept
from varedit_runtime.editing.masks import SourceKeeper
from varedit_runtime.editing.results import EditResult, OnScale, Progress
from varedit_runtime.editing.swapping import check_swappable
from varedit_runtime.errors import (
    BackendError,
    BundleError,
    EditCancelled,
    EditorError,
    EditWarning,
)
from varedit_runtime.manifest import TOKENIZER, Variant, scale_name, scale_of
from varedit_runtime.noise import uniform_noise
from varedit_runtime.pictures import Source, from_decoder, to_square
from varedit_runtime.text import Instructions, read_tokenizer
from varedit_runtime.values import AnyPath, PerPicture, PerScale, checked, is_list

WHOLE_EDIT = "edit"  # the only entry in the timings of an edit that ran as one launch


class Editor:
    """An editor of pictures with one variant of a bundle; made by `Editor.open`, ended by `close`.

    bundle, variant: what it runs. provider: the device or library that computes. chosen: the
    backend that `open` chose, its options, and why. Memory for caches and tensors between graphs is
    allocated once. What the encoders computed of the last few pictures and instructions is kept,
    and the last prefill, until `forget`, `swap_weights` or `close`. Threads may share an editor:
    their calls run one after the other.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        backend: Backend,
        instructions: Instructions | None,
        chosen: ChosenBackend | None = None,
    ) -> None:
        self.bundle, self.variant, self.provider = bundle, variant, backend.provider
        self.chosen = chosen
        self._backend: Backend | None = backend
        self._kept = Kept(backend)
        self._instructions = instructions
        self._turn = RLock()
        self._editing: int | None = None  # the thread that edits

    @classmethod
    def open(
        cls,
        bundle: AnyPath,
        *,
        backend: str | ChosenBackend | AutoBackend = AUTO,
        provider: str | None = None,
        threads: int | None = None,
        digest: str | None = None,
        variant: str | None = None,
        engines_digest: str | None = None,
        trust_engines: bool = False,
        offload: str | None = None,
    ) -> "Editor":
        """Open a bundle for editing.

        backend: "auto", the best that can run the variant here (see `chosen`); a name, such as
        "onnxruntime", or "tensorrt" or "tensorrt-rtx" for compiled engines; or the result of
        `backends.choose`, for options that are not arguments here. digest: the bundle's digest as
        its publisher states it; with it no other bundle is accepted, and all files are hashed.
        variant: its name; by default the bundle's first.

        provider, threads: see `OnnxRuntimeOptions`; they name that backend in place of "auto".
        engines_digest, trust_engines: see `EngineBackendOptions`; for engines alone. offload:
        "text" to hold the text encoder's weights only while instructions are encoded: results are
        the same, with less memory at the peak and more time for every new instruction.

        Raises BundleError if the folder is no bundle, is damaged, has another digest, or has no
        such variant or no engines for this GPU; BackendError if the provider or a GPU is missing, a
        graph cannot be loaded or memory is too small; MissingExtraError if the backend is not
        installed; ConfigError on other arguments that cannot be used.
        """
        variant = checked("variant", variant, str | None)
        wanted = wanted_backend(
            backend,
            provider=provider,
            threads=threads,
            engines_digest=engines_digest,
            trust_engines=trust_engines,
            offload=offload,
        )

        def load(opened: Bundle) -> Editor:
            if digest is not None:
                opened.verify()
            return cls._load(opened, opened.manifest.variant(variant), wanted)

        return load_standing(bundle, digest, load, lambda editor: editor.close())

    @classmethod
    def _load(
        cls, bundle: Bundle, variant: Variant, wanted: ChosenBackend | AutoBackend
    ) -> "Editor":
        instructions = None
        if "text_encoder" in variant.graphs:
            instructions = read_instructions(bundle, variant.text_tokens)
        chosen = wanted.pick(bundle, variant)
        return cls(bundle, variant, chosen.open(bundle, variant), instructions, chosen)

    def __enter__(self) -> "Editor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs and their memory, after an edit that another thread is running.

        Raises EditorError inside `on_scale`. Closing twice does nothing.
        """
        with self._turn:
            if self._editing is not None:
                raise EditorError("the editor cannot be closed inside on_scale: cancel() first")
            if self._backend is not None:
                self._backend.close()
            self._backend = None
            self._kept.forget()

    def forget(self) -> None:
        """Drop what was kept of earlier pictures and instructions, after an edit that is running.

        Later edits are the same without it, and compute it again.
        """
        with self._turn:
            self._kept.forget()

    def swap_weights(self, bundle: AnyPath, *, digest: str | None = None) -> None:
        """Edit with the weights of another bundle from now on, or, if that fails, as before.

        bundle: one that differs from the present one in its weights alone, such as one that was
        built with `--graphs-from`; all of its files are hashed. digest: as for `open`. Edits of
        other threads go on while files are hashed, and wait while weights are loaded: each has the
        old weights or the new ones. On ONNX Runtime both are in memory until the old ones go;
        engines take the new ones in the place of the old.

        Raises BundleError if it is no bundle, is damaged, or differs in anything but weights, which
        the message lists; BackendError if the backend cannot exchange weights, such as those
        inside engines, or memory is too small; EditorError if the editor is closed, or called by
        on_scale.
        """
        self._check_usable()
        opened, put_in_place = load_standing(bundle, digest, self._prepare)
        with self._my_turn(), held_signals():  # which must not come between weights and bundle
            try:
                put_in_place()
            except WeightsLostError:
                self._open_backend().close()
                self._backend = None
                raise
            finally:
                self._kept.forget()  # it was computed with the old weights
            self.bundle = opened

    def _prepare(self, bundle: Bundle) -> tuple[Bundle, Callable[[], None]]:
        check_swappable(self.bundle, bundle, self.variant)
        bundle.verify()
        with self._my_turn():
            return bundle, self._open_backend().prepare_weights(bundle)

    @property
    def backend(self) -> Backend:
        """The backend, to run stages one by one while nothing else uses the editor.

        Once it was asked for, edits keep no prefill: its caches may be another picture's.

        Raises EditorError if the editor is closed.
        """
        self._kept.share()
        return self._open_backend()

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise EditorError("the editor is closed: open another one")
        return self._backend

    @overload
    def edit(  # pyright: ignore[reportOverlappingOverload]: a str is a sequence of str
        self,
        image: Source,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        mask: Source | None = None,
        guidance_scale: PerScale | None = None,
        temperature: PerScale | None = None,
        fast: bool = False,
        num_images_per_prompt: Literal[1] = 1,
        seed: int | None = None,
        output_size: OutputSize = "source",
        on_scale: OnScale | None = None,
    ) -> EditResult: ...

    @overload
    def edit(
        self,
        image: Source | Sequence[Source],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        mask: Source | Sequence[Source | None] | None = None,
        guidance_scale: PerPicture | None = None,
        temperature: PerPicture | None = None,
        fast: bool = False,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        output_size: OutputSize = "source",
        on_scale: OnScale | None = None,
    ) -> list[EditResult]: ...

    def edit(
        self,
        image: Source | Sequence[Source],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        mask: Source | Sequence[Source | None] | None = None,
        guidance_scale: PerPicture | None = None,
        temperature: PerPicture | None = None,
        fast: bool = False,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        output_size: OutputSize = "source",
        on_scale: OnScale | None = None,
    ) -> EditResult | list[EditResult]:
        """Edit pictures as instructed.

        image: what `pictures.open_picture` takes, or a list. prompt, negative_prompt: a text, or a
        list. Lists must be equally long; an argument that is not a list is used for every entry.
        num_images_per_prompt: results per entry, which follow each other. Returns a list, or one
        result if nothing is a list and one picture was asked for.

        mask: a picture of the image's size, or a list of these and None: only what is white, or
        transparent, may change (see `pictures.open_mask`).
        guidance_scale, temperature: one number, or one per scale, by default the bundle's own; or a
        list of lists, or an array of two dimensions, with a row of these for each entry. With a
        guidance of 1 the negative prompt has no effect, and an edit takes half as long. fast:
        switch guidance off at the last two scales (docs/benchmarks.md). seed: result i gets
        seed + i; or a list with one for each result; by default random, see the results.
        output_size: "source" for results of their sources' sizes, "model" for the model's own
        pixels, neither enlarged nor reduced, or the number of pixels of the longest side, at most
        the source's. on_scale: called after every scale, in this thread.

        Raises ConfigError, TextError or PictureError on arguments that cannot be used;
        EditCancelled if on_scale cancelled; EditorError if the editor is closed, or called by
        on_scale; BackendError if a graph fails, or computes numbers that are not finite or a
        picture of a single colour. Issues EditWarnings first, which are also in the results.
        """
        on_scale = checked("on_scale", on_scale, OnScale | None)
        size = choose_size(output_size, self.variant.picture)
        settings = Settings(self.bundle.manifest, self.variant, checked("fast", fast, bool))
        asked = PerEntry(image, prompt, negative_prompt, mask, guidance_scale, temperature)
        wanted = choose_pictures(
            *(asked, num_images_per_prompt, seed, self._tokenise, size, settings, self._warn)
        )
        several = is_list(seed) or any(x is not None for x in asked.listed().values())
        _issue_warnings(wanted)
        with self._my_turn():
            results = self._edit_all(wanted, on_scale)
        return results if several or len(results) > 1 else results[0]

    def _tokenise(self, text: str) -> list[int]:
        if self._instructions is None:
            self.bundle.check_text()
        assert self._instructions is not None
        return self._instructions.tokenise(text)

    def _warn(self, text: str, picture: Image.Image) -> Iterator[str]:
        assert self._instructions is not None
        return warnings_of(self.bundle.manifest.model, self._instructions, text, picture)

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        with self._turn:
            self._check_usable()
            self._editing = get_ident()
            try:
                yield
            finally:
                self._editing = None

    def _check_usable(self) -> None:
        """Raise EditorError if the editor is closed, or this thread edits: it is in on_scale."""
        self._open_backend()  # raises if closed
        if self._editing == get_ident():
            raise EditorError("on_scale cannot use the editor that calls it: return first")

    def _edit_all(self, wanted: Sequence[Wanted], on_scale: OnScale | None) -> list[EditResult]:
        places, size, cancelled = range(len(wanted)), self.variant.batch, Event()
        results: list[EditResult] = []
        for first in places[::size]:
            own = places[first : first + size]
            # The graphs take batches of this size: a smaller one repeats its last picture.
            rows = [wanted[min(i, own[-1])] for i in range(first, first + size)]
            guided = len(self.variant.grids)
            if self._open_backend().drops_rows:
                guided = guided_scales(row.settings.guidance_scale for row in rows)
            results += self._edit_batch(
                PictureBatch(rows, own, len(wanted), guided, on_scale, cancelled)
            )
        return results

    def _edit_batch(self, batch: "PictureBatch") -> list[EditResult]:
        # What a mask forces depends on every scale before: the host must see it.
        backend = self._open_backend()
        edit = None if batch.on_scale or batch.masked else backend.whole
        with batch.timings.of(WHOLE_EDIT if edit else TEXT):
            prompts = batch.prompts(self.variant.guided, backend.text_lengths)
        with batch.timings.of(WHOLE_EDIT if edit else ENCODER):
            squares = self._squares(batch)
            prefilled = self._kept.take_prefilled(prompts, squares)
        given = batch, prompts, squares, prefilled
        images = self._edit_whole(*given, edit) if edit else self._edit_by_stages(*given)
        if batch.guided_scales in (0, len(self.variant.grids)):  # else half of the rows is gone
            self._kept.prefilled(prompts, squares)
        seconds, cpu_seconds = batch.timings.seconds, batch.timings.cpu_seconds
        return [
            EditResult(image, one.seed, seconds, cpu_seconds, one.warnings)
            for one, image in zip(batch.wanted, images, strict=True)
        ]

    def _edit_whole(
        self,
        batch: "PictureBatch",
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
            _sound(DECODER, edited.pictures, batch)
            return self._restored(edited.pictures, batch)

    def _edit_by_stages(
        self, batch: "PictureBatch", prompts: Prompts, squares: np.ndarray, prefilled: bool
    ) -> list[Image.Image]:
        timings, seen = batch.timings, dict[str, np.ndarray]()
        stages = edit_by_stages(
            self._open_backend(),
            prompts,
            squares,
            self._samplings(batch, seen),
            self._kept,
            prefilled,
        )
        for output in timings.of_each(stages):
            for array in output.arrays.values():
                _sound(output.stage, array, batch)
            seen.update(output.arrays)
            if batch.on_scale is not None and (scale := scale_of(output.stage)) is not None:
                batch.on_scale(self._progress(batch, scale, output.arrays["running_sum"]))
            if output.stage != DECODER and batch.cancelled.is_set():
                raise EditCancelled("the edit was cancelled")
        with timings.of(DECODER):
            return self._restored(seen["pictures"], batch)

    def _squares(self, batch: "PictureBatch") -> np.ndarray:
        """Return the pictures as the image encoder reads them, [B, 3, H, W]."""
        squares = []
        for number, row in enumerate(batch.rows):
            with batch.naming(number):
                squares.append(to_square(row.picture, self.variant.picture))
        return np.stack(squares)

    def _sampling(self, batch: "PictureBatch", scale: int) -> Sampling:
        """Return a scale's sampling, with the noise of each picture's own seed."""
        rows, columns = self.variant.grids[scale]
        channels = self.bundle.manifest.model.token_channels
        noise = [uniform_noise(one.seed, scale, rows * columns, channels) for one in batch.rows]
        settings = [one.settings for one in batch.rows]
        return Sampling(
            np.stack(noise).reshape(len(noise), rows, columns, channels),
            np.array([one.guidance_scale[scale] for one in settings], np.float32),
            np.array([one.temperature[scale] for one in settings], np.float32),
            guided=scale < batch.guided_scales,
        )

    def _samplings(self, batch: "PictureBatch", seen: dict[str, np.ndarray]) -> Iterator[Sampling]:
        """Yield each scale's sampling in its turn. seen: what the stages before it put out."""
        model, grids = self.bundle.manifest.model, self.variant.grids
        keeper = SourceKeeper([row.mask for row in batch.rows], grids, model.patch)
        for scale in range(len(grids)):
            drawn = self._sampling(batch, scale)
            yield keeper.force(drawn, seen["source_tokens"], seen.get("running_sum"))

    def _restored(self, decoded: np.ndarray, batch: "PictureBatch") -> list[Image.Image]:
        """Turn decoded pictures [B, 3, H, W] into results."""
        finest = self.variant.grids[-1]
        return [
            finished(from_decoder(pixels), one, finest)
            for pixels, one in zip(decoded, batch.wanted, strict=False)
        ]

    def _progress(self, batch: "PictureBatch", scale: int, total: np.ndarray) -> Progress:
        bundle = self.bundle

        def draw() -> list[Image.Image]:
            with self._turn:  # a preview from another thread waits for the edit to end
                if self.bundle is not bundle:
                    raise EditorError("the weights that predicted this scale were swapped since")
                decoded = _sound(DECODER, self._open_backend().decode(total), batch)
                return self._restored(decoded, batch)

        return Progress(
            scale=scale,
            scales=len(self.variant.grids),
            seconds=batch.timings.seconds[scale_name(scale)],
            pictures=batch.places,
            _draw=draw,
            _cancelled=batch.cancelled,
        )


def _issue_warnings(wanted: Sequence[Wanted]) -> None:
    """Issue each warning once, for the line that calls the caller."""
    for warning in {text: None for one in wanted for text in one.warnings}:
        warnings.warn(warning, EditWarning, stacklevel=3)


def read_instructions(bundle: Bundle, limit: int) -> Instructions:
    try:
        return Instructions(read_tokenizer(bundle.tokenizer_json()), limit)
    except ValueError as error:
        raise BundleError(f"{bundle.path / TOKENIZER} {error}: build the bundle again") from error


def _sound(stage: str, array: np.ndarray, batch: PictureBatch) -> np.ndarray:
    """Return a stage's output [B, ...]. Raises BackendError if the arithmetic failed before.

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
                raise BackendError(
                    f"{stage} computed {wrong}, so there is no picture: run "
                    "`varedit-export verify` on the bundle"
                )
    return array

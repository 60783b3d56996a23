"""Edit pictures with a bundle: from pictures, instructions and seeds to edited pictures.

    with Editor.open("bundles/2b-512") as editor:
        result = editor.edit("photo.png", "add a hat", seed=7)

All arguments of a call are checked before anything is computed.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from time import perf_counter
from typing import Literal, overload

import numpy as np

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AUTO, AutoBackend, wanted_backend
from varedit_runtime.backends.base import Backend, WeightsLostError
from varedit_runtime.backends.forks import Home
from varedit_runtime.backends.handle import EditHandle
from varedit_runtime.backends.interrupt import held_signals
from varedit_runtime.bundle import Bundle, load_standing
from varedit_runtime.editing.arguments import OutputSize, PerEntry
from varedit_runtime.editing.batch import PictureBatch, batches
from varedit_runtime.editing.kept import Kept
from varedit_runtime.editing.prepared import Grouping, PreparedEdit
from varedit_runtime.editing.preparer import Preparer, Wanted, read_instructions
from varedit_runtime.editing.results import EditResult, OnScale
from varedit_runtime.editing.run import Run
from varedit_runtime.editing.swapping import check_swappable
from varedit_runtime.errors import ConfigError, EditCancelled, EditorError, EditWarning, shown
from varedit_runtime.manifest import Variant
from varedit_runtime.pictures import Source
from varedit_runtime.text import Instructions
from varedit_runtime.values import AnyPath, PerPicture, PerScale, checked, entries

_log = logging.getLogger("varedit_runtime")


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
        self._preparer = Preparer(bundle, variant, instructions)
        self._home = Home(backend)
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

        begun = perf_counter()
        editor = load_standing(bundle, digest, load, lambda editor: editor.close())
        _log.info("opened %s in %.3f s", editor, perf_counter() - begun)
        return editor

    def __repr__(self) -> str:
        name, digest = self.bundle.path.name, self.bundle.digest[:16]
        return f"<Editor of {name} ({digest}), {self.variant.name}, on {self.provider}>"

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

        Raises EditorError inside `on_scale`. Closing twice does nothing, and so does closing in a
        forked child.
        """
        if not self._home.here:
            return
        with self._turn:
            if self._editing is not None:
                raise EditorError("the editor cannot be closed inside on_scale: cancel() first")
            if self._backend is not None:
                self._backend.close()
                _log.info("closed %s", self)
            self._backend = None
            self._kept.forget()

    def forget(self) -> None:
        """Drop what was kept of earlier pictures and instructions, after an edit that is running.

        Later edits are the same without it, and compute it again.
        """
        self._home.check()
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
        opened, put_in_place = load_standing(bundle, digest, self._prepare_weights)
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
            self._preparer = Preparer(opened, self.variant, self._preparer.instructions)
        _log.info("swapped weights: %s", self)

    def _prepare_weights(self, bundle: Bundle) -> tuple[Bundle, Callable[[], None]]:
        check_swappable(self.bundle, bundle, self.variant)
        bundle.verify()
        with self._my_turn():
            return bundle, self._open_backend().prepare_weights(bundle)

    @property
    def backend(self) -> Backend:
        """The backend, to run stages one by one while nothing else uses the editor.

        Once it was asked for, edits keep no prefill: its caches may be another picture's.

        Raises EditorError if the editor is closed or was opened before a fork.
        """
        self._kept.share()
        return self._open_backend()

    def _open_backend(self) -> Backend:
        self._home.check()
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
        handle: EditHandle | None = None,
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
        handle: EditHandle | None = None,
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
        handle: EditHandle | None = None,
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
        the source's. on_scale: called after every scale, in this thread. handle: ends the edit.

        Raises ConfigError, TextError or PictureError on arguments that cannot be used;
        EditCancelled if on_scale or the handle cancelled, DeadlineExceeded at its deadline;
        EditorError if the editor is closed, called by on_scale, or opened before a fork;
        BackendError if a graph fails, NoPictureError if it computes numbers that are not finite or
        a picture of a single colour. Issues EditWarnings first, which are also in the results.
        """
        self._check_usable()
        asked = PerEntry(image, prompt, negative_prompt, mask, guidance_scale, temperature)
        several = entries("seed", seed) is not None or asked.several
        prepared = self._preparer.prepare_all(
            Wanted(asked, num_images_per_prompt, seed, fast, output_size)
        )
        _issue_warnings(prepared)
        results = self.edit_prepared(prepared, on_scale=on_scale, handle=handle)
        return results if several or len(results) > 1 else results[0]

    def prepare(
        self,
        image: Source,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        mask: Source | None = None,
        guidance_scale: PerScale | None = None,
        temperature: PerScale | None = None,
        fast: bool = False,
        seed: int | None = None,
        output_size: OutputSize = "source",
    ) -> PreparedEdit:
        """Check an edit of one picture and prepare it; see `Preparer.prepare`.

        It waits for no edit of other threads. Raises EditorError if the editor is closed, or was
        opened before a fork.
        """
        self._open_backend()
        return self._preparer.prepare(
            image,
            prompt,
            negative_prompt=negative_prompt,
            mask=mask,
            guidance_scale=guidance_scale,
            temperature=temperature,
            fast=fast,
            seed=seed,
            output_size=output_size,
        )

    @property
    def grouping(self) -> Grouping:
        """Tell which prepared edits may share a batch; it can be pickled.

        Raises EditorError if the editor is closed, or was opened before a fork.
        """
        backend = self._open_backend()
        lengths, scales = tuple(backend.text_lengths), len(self.variant.grids)
        return Grouping(lengths, scales, backend.drops_rows)

    def edit_prepared(
        self,
        edits: Sequence[PreparedEdit],
        *,
        on_scale: OnScale | None = None,
        handle: EditHandle | None = None,
    ) -> list[EditResult]:
        """Make edits that `prepare` returned; return their results in the same order.

        Only edits of one group (see `grouping`) share a batch, so that each result has the bits
        that it has alone. Warnings are in the results and not issued. Raises ConfigError on other
        arguments, also on edits that were prepared for another model; else as `edit` does.
        """
        on_scale = checked("on_scale", on_scale, OnScale | None)
        handle = checked("handle", handle, EditHandle | None)
        prepared = entries("edits", edits)
        if prepared is None:
            raise ConfigError(f"edits is {shown(edits)}; give a list of what `prepare` returned")
        for one in prepared:
            if checked("an edit", one, PreparedEdit).made_for != self._preparer.made_for:
                raise ConfigError(
                    "an edit was prepared for another model or size: prepare it for this variant"
                )
        if on_scale is not None:
            handle = handle or EditHandle()  # for `Progress.cancel`
        begun = perf_counter()
        with self._my_turn(handle):
            return self._edit_all(prepared, on_scale, handle, perf_counter() - begun)

    @contextmanager
    def _my_turn(self, handle: EditHandle | None = None) -> Iterator[None]:
        """Wait until no other thread uses the editor, and then keep it from them."""
        self._check_usable()  # also before: in a forked child nobody would release the lock
        with self._turn if handle is None else handle.taking(self._turn):
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

    def _edit_all(
        self,
        edits: Sequence[PreparedEdit],
        on_scale: OnScale | None,
        handle: EditHandle | None,
        waited: float,
    ) -> list[EditResult]:
        sizes, results = self._open_backend().batches, dict[int, EditResult]()
        model = self.bundle.manifest.model
        run = Run(self._open_backend, self._kept, model, self.variant, self._decoder())
        for group, places in batches(edits, self.grouping, sizes[-1]):
            rows = [edits[place] for place in places]
            rows += rows[-1:] * (next(n for n in sizes if n >= len(rows)) - len(rows))
            batch = PictureBatch(rows, tuple(places), len(edits), group, on_scale, handle, waited)
            with _logged(batch):
                results |= zip(places, run.edit(batch), strict=True)
        return [results[place] for place in range(len(edits))]

    def _decoder(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return what decodes sums of codes in any thread, as long as the weights are the same."""
        bundle = self.bundle

        def decode(total: np.ndarray) -> np.ndarray:
            self._home.check()
            with self._turn:  # a preview from another thread waits for the edit to end
                if self.bundle is not bundle:
                    raise EditorError("the weights that predicted this scale were swapped since")
                return self._open_backend().decode(total)

        return decode


@contextmanager
def _logged(batch: PictureBatch) -> Iterator[None]:
    """Log an edit, without its texts and where its pictures come from."""
    begun, ended = perf_counter(), "edited"
    try:
        yield
    except EditCancelled:
        ended = "cancelled"
        raise
    except BaseException as error:
        ended = f"failed ({type(error).__name__})"
        raise
    finally:
        _log.debug(
            "%s %d in a batch of %d: sizes %s, seeds %s, %s; waited %.3f s, took %.3f s",
            ended,
            len(batch.edits),
            len(batch.rows),
            [one.size for one in batch.edits],
            [one.seed for one in batch.edits],
            batch.group,
            batch.waited,
            perf_counter() - begun,
        )


def _issue_warnings(edits: Sequence[PreparedEdit]) -> None:
    """Issue each warning once, for the line that calls the caller."""
    for warning in {text: None for one in edits for text in one.warnings}:
        warnings.warn(warning, EditWarning, stacklevel=3)

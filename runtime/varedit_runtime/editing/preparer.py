"""Prepare edits: check all of their arguments, and bring pictures into the model's form.

    preparer = Preparer.open("bundles/2b-512")
    prepared = preparer.prepare("photo.png", "add a hat", seed=7)

This needs a bundle's manifest and text tokenizer, but no graph, no weights and no backend, and can
be done by another process than the one that edits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from varedit_runtime.bundle import Bundle, load_standing
from varedit_runtime.editing.arguments import (
    OutputSize,
    PerEntry,
    Settings,
    SizeOf,
    check_copies,
    choose_seeds,
    choose_size,
    one_by_one,
)
from varedit_runtime.editing.caution import warnings_of
from varedit_runtime.editing.finish import Finish
from varedit_runtime.editing.masks import fitted, marked_tokens, visible
from varedit_runtime.editing.prepared import PreparedEdit, ScaleSettings
from varedit_runtime.errors import BundleError, ConfigError, about
from varedit_runtime.manifest import TOKENIZER, Variant
from varedit_runtime.pictures import Source, open_mask, open_picture, pad_and_resize
from varedit_runtime.text import Instructions, read_tokenizer
from varedit_runtime.values import AnyPath, PerScale, checked, entries


@dataclass(frozen=True)
class Wanted:
    """What a caller asks for, unchecked: pictures with their own arguments, and what all share."""

    pictures: PerEntry
    copies: int
    seed: int | Sequence[int] | None
    fast: bool
    output_size: OutputSize


class _View(NamedTuple):
    """What is taken from a picture, its mask and its text; see `PreparedEdit`."""

    square: np.ndarray
    marked: np.ndarray | None
    finish: Finish
    warnings: tuple[str, ...]


class Preparer:
    """Prepares edits for a variant of a bundle. Threads may share it, and it survives a fork."""

    def __init__(
        self, bundle: Bundle, variant: Variant, instructions: Instructions | None = None
    ) -> None:
        """instructions: None for a bundle without a text encoder, for which nothing is prepared."""
        self.bundle, self.variant, self.instructions = bundle, variant, instructions
        tokenizer = bundle.manifest.files.get(TOKENIZER)
        shapes = variant.picture, variant.grids, variant.text_tokens, variant.guided
        self.made_for = (*shapes, tokenizer and tokenizer.sha256)

    @classmethod
    def open(
        cls, bundle: AnyPath, *, variant: str | None = None, digest: str | None = None
    ) -> "Preparer":
        """Open a bundle's manifest and tokenizer; its other files must be there, but are not read.

        variant, digest: as for `Editor.open`; the digest covers what is read. Raises BundleError if
        the folder is no bundle, is damaged, has another digest, or takes no instructions;
        ConfigError on other arguments that cannot be used.
        """
        name = checked("variant", variant, str | None)

        def load(opened: Bundle) -> Preparer:
            opened.check_text()
            chosen = opened.manifest.variant(name)
            return cls(opened, chosen, read_instructions(opened, chosen.text_tokens))

        return load_standing(bundle, digest, load)

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
        """Check an edit of one picture, and prepare it for `Editor.edit_prepared`.

        The arguments are those of `Editor.edit`. A seed is drawn if none is given. Raises
        ConfigError, TextError or PictureError on arguments that cannot be used, each with the name
        of its `argument`; BundleError if the bundle takes no instructions.
        """
        asked = PerEntry(image, prompt, negative_prompt, mask, guidance_scale, temperature)
        if entries("seed", seed) is not None or asked.several:
            raise ConfigError("one edit is prepared at a time: call it for each entry of a list")
        (prepared,) = self.prepare_all(Wanted(asked, 1, seed, fast, output_size))
        return prepared

    def prepare_all(self, wanted: Wanted) -> list[PreparedEdit]:
        """Prepare all pictures to make, in order: the copies of the first entry come first.

        Raises ConfigError on lists of unequal lengths and on too many results, else as `prepare`
        does. Errors about an entry of a list say which of how many it is.
        """
        asked, size = wanted.pictures, choose_size(wanted.output_size, self.variant.picture)
        copies = check_copies(wanted.copies, asked.count)
        seeds = choose_seeds(wanted.seed, asked.count * copies)
        prompts = asked.each("prompt", self._tokenise)
        negatives = asked.each("negative_prompt", self._tokenise_negative)
        settings = self._settings(wanted, any(negatives))
        views = self._views(asked, size, settings)
        entries = zip(prompts, negatives, *zip(*views, strict=True), settings, strict=True)
        repeated = [entry for entry in entries for _ in range(copies)]
        return [
            PreparedEdit(*entry, made_for=self.made_for, seed=seed)
            for entry, seed in zip(repeated, seeds, strict=True)
        ]

    def _tokenise(self, prompt: object) -> list[int]:
        text = _text(prompt)
        if self.instructions is None:
            self.bundle.check_text()
        assert self.instructions is not None
        return self.instructions.tokenise(text)

    def _tokenise_negative(self, prompt: object) -> list[int] | None:
        """Return a negative prompt's token ids; None, as for none, where it is empty."""
        text = checked("a negative prompt", prompt, str | None)
        return self._tokenise(text) if text and text.strip() else None

    def _settings(self, wanted: Wanted, negative: bool) -> list[ScaleSettings]:
        """Return each entry's settings. negative: whether there is any negative prompt."""
        asked = wanted.pictures
        with about("fast"):
            fast = checked("fast", wanted.fast, bool)
        settings = Settings(self.bundle.manifest, self.variant, fast)
        with about("negative_prompt"):
            settings.check(negative)
        guidance = asked.each("guidance_scale", settings.guidance)
        temperature = asked.each("temperature", settings.temperature)
        return list(map(ScaleSettings, guidance, temperature))

    def _views(self, asked: PerEntry, size: SizeOf, settings: list[ScaleSettings]) -> list[_View]:
        """Return what the model and the result take from each entry's picture and mask."""
        pictures = asked.each("image", open_picture)
        opened = asked.each("mask", lambda source: None if source is None else open_mask(source))
        with about("mask"):
            masks = one_by_one(fitted, opened, pictures)
        texts = asked.each("prompt", _text)

        def view(
            picture: Image.Image, mask: Image.Image | None, text: str, chosen: ScaleSettings
        ) -> _View:
            shown = visible(picture, mask)
            return _View(
                np.asarray(pad_and_resize(shown, self.variant.picture)),
                None if mask is None else marked_tokens(mask, self.variant.grids[-1]),
                Finish.of(shown, mask, size(shown.size)),
                tuple(self._warnings(text, shown, chosen)),
            )

        with about("image"):
            return one_by_one(view, pictures, masks, texts, settings)

    def _warnings(self, text: str, picture: Image.Image, chosen: ScaleSettings) -> Iterator[str]:
        assert self.instructions is not None
        model, guidance = self.bundle.manifest.model, chosen.guidance_scale
        return warnings_of(model, self.instructions, text, picture, guidance)


def _text(prompt: object) -> str:
    return checked("a prompt", prompt, str)


def read_instructions(bundle: Bundle, limit: int) -> Instructions:
    """Read a bundle's tokenizer. limit: see `Instructions`. Raises BundleError."""
    try:
        return Instructions(read_tokenizer(bundle.tokenizer_json()), limit)
    except ValueError as error:
        raise BundleError(f"{bundle.path / TOKENIZER} {error}: build the bundle again") from error

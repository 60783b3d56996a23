"""The edits of an evaluation that a bundle makes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varedit_export.evaluation.case import Made, Wanted, batches
from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend, wanted_backend
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.prepared import PreparedEdit
from varedit_runtime.errors import BundleError, NoPictureError, PictureError, TextError


@dataclass(frozen=True)
class Dials:
    """The settings of all edits, as `Editor.edit` has them; None is the bundle's own."""

    guidance_scale: float | None = None
    temperature: float | None = None
    fast: bool = False


@dataclass(frozen=True)
class Opening:
    """How a bundle is opened to edit, by any process that has it."""

    path: Path
    digest: str
    backend: ChosenBackend
    variant: str
    dials: Dials

    def editor(self) -> Editor:
        """Open an editor. Raises BundleError if another bundle is there by now."""
        editor = Editor.open(self.path, backend=self.backend, variant=self.variant)
        if editor.bundle.digest != self.digest:
            editor.close()
            raise BundleError(f"{self.path} is not the bundle that this run began with")
        return editor

    def results(self, editor: Editor, batch: Sequence[Wanted]) -> list[Image.Image | str]:
        """Return the result of each edit of a batch, or why there is none.

        The instruction or the picture cannot be used, or the arithmetic gave no picture.
        """
        prepared, failed = [], dict[int, str]()
        for place, one in enumerate(batch):
            try:
                dials = vars(self.dials)
                prepared.append(editor.prepare(one.source, one.instruction, seed=one.seed, **dials))
            except (TextError, PictureError) as error:
                failed[place] = str(error)
        made = iter(_made(editor, prepared))
        return [failed.get(place) or next(made) for place in range(len(batch))]


def _made(editor: Editor, prepared: Sequence[PreparedEdit]) -> list[Image.Image | str]:
    """Make edits, alone if one of them fails, so that it is known which."""
    try:
        return [result.image for result in editor.edit_prepared(prepared)]
    except NoPictureError as error:
        if len(prepared) == 1:
            return [str(error)]
        return [made for one in prepared for made in _made(editor, [one])]


class BundleEdits:
    """A bundle that edits, and is open while it does."""

    def __init__(
        self,
        bundle: Path,
        backend: str | ChosenBackend | AutoBackend,
        variant: str | None,
        dials: Dials,
    ) -> None:
        """Choose the backend. Raises BundleError, and ConfigError on an unknown variant."""
        self.bundle = Bundle.open(bundle)
        self.bundle.check_text()
        self.variant = self.bundle.manifest.variant(variant)
        chosen = wanted_backend(backend).pick(self.bundle, self.variant)
        self.opening = Opening(
            self.bundle.path, self.bundle.digest, chosen, self.variant.name, dials
        )
        self.name = bundle.name
        self.identity: dict[str, Any] = {
            "bundle": self.bundle.digest,
            "variant": self.variant.name,
            "backend": chosen.label,
            "guidance_scale": dials.guidance_scale,
            "temperature": dials.temperature,
            "fast": dials.fast,
        }

    def edit(self, wanted: Iterable[Wanted]) -> Made:
        """Make edits; see `Edits`."""
        with self.opening.editor() as editor:
            for batch in batches(wanted, self.variant.batch):
                yield from zip(batch, self.opening.results(editor, batch), strict=True)

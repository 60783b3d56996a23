"""Evaluate a bundle: the edits of an evaluation that it makes, alone or beside another."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from varedit_engines import OnStep
from varedit_export.evaluation.case import Case
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.report import Report
from varedit_export.evaluation.run import RUN, Run
from varedit_export.options import EvaluateOptions
from varedit_export.weights.published import Download
from varedit_runtime.backends import BACKENDS, ChosenBackend
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


class BundleEdits:
    """A bundle that edits; it is opened with the first edit, and closed by the with block."""

    def __init__(
        self,
        bundle: Path,
        backend: str | ChosenBackend | AutoBackend,
        variant: str | None,
        dials: Dials,
    ) -> None:
        """Choose the backend. Raises BundleError, and ConfigError on an unknown variant."""
        self._bundle, self._dials = Bundle.open(bundle), dials
        self._bundle.check_text()
        chosen = self._bundle.manifest.variant(variant)
        self._backend = wanted_backend(backend).pick(self._bundle, chosen)
        self._variant, self.at_once = chosen.name, chosen.batch
        self.name = bundle.name
        self.identity: dict[str, Any] = {
            "bundle": self._bundle.digest,
            "variant": chosen.name,
            "backend": self._backend.label,
            "guidance_scale": dials.guidance_scale,
            "temperature": dials.temperature,
            "fast": dials.fast,
        }

    def __enter__(self) -> "BundleEdits":
        return self

    def __exit__(self, *error: object) -> None:
        if "_editor" in vars(self):
            self._editor.close()

    @cached_property
    def _editor(self) -> Editor:
        editor = Editor.open(self._bundle.path, backend=self._backend, variant=self._variant)
        if editor.bundle.digest != self._bundle.digest:
            editor.close()
            raise BundleError(f"{self._bundle.path} was replaced meanwhile: evaluate it again")
        return editor

    def edit(
        self, sources: Sequence[Image.Image], cases: Sequence[Case], seeds: Sequence[int]
    ) -> Sequence[Image.Image | str]:
        """Return each case's result, or why there is none.

        The instruction or the picture cannot be used, or the arithmetic gave no picture.
        """
        prepared, failed = [], dict[int, str]()
        for place, (source, case, seed) in enumerate(zip(sources, cases, seeds, strict=True)):
            try:
                prepared.append(
                    self._editor.prepare(source, case.instruction, seed=seed, **vars(self._dials))
                )
            except (TextError, PictureError) as error:
                failed[place] = str(error)
        made = iter(self._made(prepared))
        return [failed.get(place) or next(made) for place in range(len(cases))]

    def _made(self, prepared: Sequence[PreparedEdit]) -> list[Image.Image | str]:
        """Make edits, alone if one of them fails, so that it is known which."""
        try:
            return [result.image for result in self._editor.edit_prepared(prepared)]
        except NoPictureError as error:
            if len(prepared) == 1:
                return [str(error)]
            return [made for one in prepared for made in self._made([one])]


def evaluate_bundle(
    bundle: Path,
    options: EvaluateOptions,
    on_step: OnStep,
    notice: Callable[[str], None],
    accept: Callable[[Download], None],
) -> Report:
    """Evaluate a bundle; see `varedit_export.evaluate`."""
    dials = Dials(options.guidance_scale, options.temperature, options.fast)
    backend, against = options.backend, options.against
    with ExitStack() as stack:
        edits = stack.enter_context(BundleEdits(bundle, backend, options.variant, dials))
        other = None
        if against is not None and (Path(against) / RUN).is_file():
            other = Run(Path(against))
        elif against in BACKENDS:
            other = BundleEdits(bundle, str(against), options.variant, dials)
            other.name = str(against)
        elif against is not None:
            other = BundleEdits(Path(against), backend, options.variant, dials)
        if isinstance(other, BundleEdits):
            stack.enter_context(other)
        return evaluate(edits, options, other, {}, on_step, notice, accept)

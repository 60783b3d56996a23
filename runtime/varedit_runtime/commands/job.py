"""What all edits of a command have in common: the bundle, the settings, and how they are told."""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.bundle import Bundle
from varedit_runtime.commands.orders import Order
from varedit_runtime.editing.arguments import DRAWN_SEEDS, Settings
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.results import EditResult, OnScale
from varedit_runtime.errors import ConfigError
from varedit_runtime.locate import Found, find_bundle
from varedit_runtime.manifest import Variant
from varedit_runtime.terminal.command import say
from varedit_runtime.text import check_instruction
from varedit_runtime.values import PerScale, per_scale, temperature_per_scale


@dataclass(frozen=True)
class Job:
    """What is done with every picture.

    then: instructions that follow each order's own. settings: further arguments of `Editor.edit`.
    digest: of the only bundle that may be used.
    """

    then: tuple[str, ...]
    settings: dict[str, Any]
    bundle: Path | None
    digest: str | None
    variant: str | None
    backend: ChosenBackend | AutoBackend
    keep_steps: bool
    overwrite: bool
    as_json: bool

    @property
    def kept(self) -> int:
        """How many pictures are written for each order: those of the last turns."""
        return 1 + len(self.then) if self.keep_steps else 1

    def check(self) -> None:
        """Raise ConfigError or TextError on what no bundle can take."""
        if self.keep_steps and not self.then:
            raise ConfigError("--keep-steps is for the pictures between turns: give --then too")
        for text in self.then:
            check_instruction(text)
        guidance, temperature = self.settings["guidance_scale"], self.settings["temperature"]
        if guidance is not None:
            per_scale(guidance, _scales(guidance), "guidance_scale")
        if temperature is not None:
            temperature_per_scale(temperature, _scales(temperature))

    @contextmanager
    def opened(self) -> Iterator["OpenJob"]:
        """Open the bundle, and tell on stderr which it is and why.

        Raises BundleError if it takes no instructions.
        """
        found = self.find()
        with self.open(found) as editor:
            known = self, found, editor.bundle, editor.variant, editor.chosen, editor.provider
            opened = OpenJob(*known, editor=editor)
            opened.check_then()  # not only after the first turns
            yield opened

    def open(self, found: Found) -> Editor:
        """Open an editor with the bundle that was found."""
        given = {"backend": self.backend, "variant": self.variant, "digest": self.digest}
        return Editor.open(found.path, **given)

    def find(self) -> Found:
        """Return the bundle, and tell on stderr which it is and why.

        Raises BundleError if it takes no instructions.
        """
        found = find_bundle(self.bundle)
        say(f"bundle: {found.path} ({found.why})")
        Bundle.open(found.path, self.digest).check_text()  # before minutes are spent on loading
        return found


@dataclass
class KnownJob:
    """A job whose bundle is known. chosen, provider: what edits, as far as that is known."""

    job: Job
    found: Found
    bundle: Bundle
    variant: Variant
    chosen: ChosenBackend | None = None
    provider: str = ""

    def check_then(self) -> None:
        """Raise TextError if an instruction of a later turn has too many tokens."""
        if self.job.then:
            instructions = read_instructions(self.bundle, self.variant.text_tokens)
            for text in self.job.then:
                instructions.tokenise(text)

    @property
    def common(self) -> dict[str, Any]:
        """Return what results depend on beside their orders, for the record."""
        told = {"then": self.job.then, "keep_steps": self.job.keep_steps, **self.job.settings}
        return {**told, "bundle": self.bundle.digest, "variant": self.variant.name}

    def tell(self, order: Order, output: Path | str, turns: Sequence[EditResult]) -> str:
        """Return a line about an edit: of JSON, if that is wanted."""
        result, seconds = turns[-1], dict[str, float]()
        for stage, took in (item for turn in turns for item in turn.timings.items()):
            seconds[stage] = seconds.get(stage, 0.0) + took
        if not self.job.as_json:
            width, height = result.image.size
            return (
                f"{output}: {width} x {height}, seed {result.seed}, {sum(seconds.values()):.1f} s"
            )
        given = self.job.settings
        settings = Settings(self.bundle.manifest, self.variant, given["fast"])
        assert self.chosen
        told = {
            **self.asked(order, output),
            "width": result.image.width,
            "height": result.image.height,
            "seed": result.seed,
            "guidance_scale": settings.guidance(given["guidance_scale"]),
            "temperature": settings.temperature(given["temperature"]),
            "bundle": str(self.found.path),
            "bundle_chosen": self.found.why,
            "digest": self.bundle.digest,
            "variant": self.variant.name,
            "backend": self.chosen.spec.name,
            "backend_chosen": self.chosen.why,
            "provider": self.provider,
            "timings": seconds,
            "warnings": list(dict.fromkeys(text for turn in turns for text in turn.warnings)),
        }
        return json.dumps(told)

    def asked(self, order: Order, output: Path | str | None = None) -> dict[str, Any]:
        """Return what an order asks for, and where its result is, for JSON."""
        return {
            "input": str(order.image),
            "output": output and str(output),
            "instruction": order.instruction,
            "then": self.job.then,
            "negative_prompt": order.negative_prompt,
            "mask": order.mask and str(order.mask),
            "seed": order.seed,
        }


@dataclass(kw_only=True)
class OpenJob(KnownJob):
    """A job whose bundle is open."""

    editor: Editor

    def edit(
        self,
        orders: Sequence[Order],
        sources: Sequence[Image.Image],
        masks: Sequence[Image.Image | None],
        on_scale: OnScale | None = None,
    ) -> list[tuple[EditResult, ...]]:
        """Edit pictures, in turn from instruction to instruction; return the results of each.

        One seed serves all turns of a picture.
        """
        seeds = [
            secrets.randbelow(DRAWN_SEEDS) if order.seed is None else order.seed for order in orders
        ]
        turns: list[list[EditResult]] = []
        for place, instruction in enumerate((None, *self.job.then)):
            settings = dict(self.job.settings)
            if place < len(self.job.then):  # further instructions see the picture as large as it is
                settings["output_size"] = "source"
            images = [one.image for one in turns[-1]] if turns else sources
            turns.append(
                self.editor.edit(
                    images,
                    [instruction or order.instruction for order in orders],
                    negative_prompt=[order.negative_prompt for order in orders],
                    mask=masks,
                    seed=seeds,
                    on_scale=on_scale,
                    **settings,
                )
            )
        return list(zip(*turns, strict=True))


def _scales(value: PerScale) -> int:
    """Return how many scales a value can be for."""
    return len(value) if isinstance(value, list) else 1

"""Check the arguments of an edit, and spread them over the pictures to make."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeVar

from varedit_runtime.errors import ConfigError, about, one_of_many, shown
from varedit_runtime.manifest import Manifest, Variant
from varedit_runtime.pictures import Source, canvas_size
from varedit_runtime.values import (
    MOST_ENTRIES,
    PerPicture,
    PerScale,
    checked,
    entries,
    per_picture,
    per_scale,
    temperature_per_scale,
)

T = TypeVar("T")

OutputSize = int | Literal["source", "model"]
SizeOf = Callable[[tuple[int, int]], tuple[int, int]]

SEEDS = 2**64
FAST_SCALES = 2  # docs/benchmarks.md has what each more of them gains and loses
DRAWN_SEEDS = 2**32  # drawn seeds are below this, short enough to be typed again


@dataclass(frozen=True)
class Settings:
    """What a variant of a bundle makes of callers' settings; None stands for the bundle's own.

    fast: switch guidance off at the last FAST_SCALES scales, whatever is asked for.
    """

    manifest: Manifest
    variant: Variant
    fast: bool = False

    def guidance(self, value: PerScale | None) -> tuple[float, ...]:
        """Return the guidance of every scale. Raises ConfigError as `per_scale` does.

        Also raises it on guidance if the bundle was built without.
        """
        if value is None:
            value = self.manifest.guidance_scale if self.variant.guided else 1.0
        guidance = per_scale(value, len(self.variant.grids), "guidance_scale")
        self.check(set(guidance) != {1.0})
        return fast_guidance(guidance) if self.fast else guidance

    def temperature(self, value: PerScale | None) -> tuple[float, ...]:
        """Return the temperature of every scale, or raise as `temperature_per_scale` does."""
        value = self.manifest.temperature if value is None else value
        return temperature_per_scale(value, len(self.variant.grids))

    def check(self, guided: bool) -> None:
        """Raise ConfigError if guidance is asked for that the bundle does not have."""
        if guided and not self.variant.guided:
            raise ConfigError(
                "this bundle was built without guidance: leave out negative_prompt and any "
                "guidance_scale but 1, or build a bundle with guidance"
            )


def fast_guidance(guidance: tuple[float, ...]) -> tuple[float, ...]:
    """Return the guidance of every scale with 1 at the last FAST_SCALES."""
    return (*guidance[:-FAST_SCALES], *(1.0 for _ in guidance[-FAST_SCALES:]))


@about("output_size")
def choose_size(output_size: OutputSize, model: tuple[int, int]) -> SizeOf:
    """Return what gives the (width, height) of a result by that of its source.

    model: (height, width) of what the model draws. Raises ConfigError on another kind of size, or
    one below 1.
    """
    wanted = checked("output_size", output_size, OutputSize)
    if isinstance(wanted, int) and wanted < 1:
        raise ConfigError(f"output_size is {wanted}; the longest side must have at least 1 pixel")

    def size(picture: tuple[int, int]) -> tuple[int, int]:
        if wanted == "source":
            return picture
        if wanted == "model":
            canvas = canvas_size(picture, model)
            across, down = model[1] / canvas[0], model[0] / canvas[1]
        else:
            across = down = min(1, wanted / max(picture))
        return max(1, round(picture[0] * across)), max(1, round(picture[1] * down))

    return size


@dataclass(frozen=True)
class PerEntry:
    """The arguments of an edit that have one value, or a list with one for each entry."""

    image: Source | Sequence[Source]
    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str | None] | None
    mask: Source | Sequence[Source | None] | None
    guidance_scale: PerPicture | None
    temperature: PerPicture | None

    @cached_property
    def _lists(self) -> dict[str, list[Any]]:
        """The entries of those that are lists, by name. Raises ConfigError on unequal lengths."""
        lists = {}
        for field in fields(self):
            with about(field.name):
                read = per_picture if field.name in _PER_SCALE else entries
                lists[field.name] = read(field.name, getattr(self, field.name))
        return {name: values for name, values in lists.items() if values is not None}

    @property
    def several(self) -> bool:
        """Whether any of them is a list."""
        return bool(self._lists)

    @cached_property
    def count(self) -> int:
        """The number of entries. Raises ConfigError if lists are not equally long."""
        return _common_length(self._lists)

    def each(self, name: str, convert: Callable[[Any], T]) -> list[T]:
        """Convert an argument's value for each entry; errors about one of a list say which."""
        count = self.count
        with about(name):
            if name in self._lists:
                return one_by_one(convert, self._lists[name])
            return [convert(getattr(self, name))] * count


_PER_SCALE = ("guidance_scale", "temperature")  # of these a list has one number for each scale


@about("num_images_per_prompt")
def check_copies(copies: int, count: int) -> int:
    """Return the number of results for each of `count` entries. Raises ConfigError."""
    copies = checked("num_images_per_prompt", copies, int)
    if copies < 1 or count * copies > MOST_ENTRIES:
        told = shown(copies)
        raise ConfigError(
            f"num_images_per_prompt is {told}; give at least 1, for at most {MOST_ENTRIES} results"
        )
    return copies


def one_by_one(convert: Callable[..., T], *lists: Sequence[Any]) -> list[T]:
    """Convert the entries of lists; errors say which of how many."""
    results = []
    for place, values in enumerate(zip(*lists, strict=True)):
        with one_of_many("picture", place, len(lists[0])):
            results.append(convert(*values))
    return results


def _common_length(lists: Mapping[str, list[Any]]) -> int:
    """Return the length of the arguments that are lists; 1 if none is.

    One picture and one prompt ask for a result: what goes with them cannot be an empty list.
    """
    lengths = {name: len(values) for name, values in lists.items()}
    if 0 in lengths.values() and lengths.keys().isdisjoint(("image", "prompt")):
        lengths = {"image": 1, **lengths}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ConfigError(f"{told} entries: lists must be equally long")
    return next(iter(lengths.values()), 1)


@about("seed")
def choose_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return a seed for each picture to make; without one, successive seeds from a random one.

    Raises ConfigError on what are no seeds, or not as many.
    """
    wanted = "an integer, or one for each result"
    given = entries("seed", seed)
    if given is None:
        drawn = secrets.randbelow(DRAWN_SEEDS) if seed is None else seed
        first = checked("seed", drawn, int, wanted)
        seeds = [first + i for i in range(count)]
    else:
        seeds = [checked("seed", value, int, wanted) for value in given]
    if len(seeds) != count:
        raise ConfigError(f"there are {len(seeds)} seeds for {count} results; give one for each")
    for place, value in enumerate(seeds):
        with one_of_many("result", place, count):
            check_seed(value)
    return seeds


def check_seed(seed: int) -> None:
    """Raise ConfigError if a seed is out of range."""
    if not 0 <= seed < SEEDS:
        raise ConfigError(f"the seed is {seed}; it must be at least 0 and less than 2^64")

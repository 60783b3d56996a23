"""Check the arguments of `Editor.edit`, and spread them over the pictures to make."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from PIL import Image

from varedit_runtime.errors import ConfigError, shown
from varedit_runtime.manifest import Manifest, Variant
from varedit_runtime.pictures import Source, open_picture
from varedit_runtime.settings import PerScale, per_scale, temperature_per_scale

SEEDS = 2**64
DRAWN_SEEDS = 2**32  # drawn seeds are below this, short enough to be typed again


@dataclass(frozen=True)
class Wanted:
    """One picture to make. prompt, negative (the negative prompt): token ids."""

    picture: Image.Image
    prompt: list[int]
    negative: list[int] | None
    seed: int


@dataclass(frozen=True)
class ScaleSettings:
    """Guidance scale and temperature of every scale, coarse to fine."""

    guidance_scale: tuple[float, ...]
    temperature: tuple[float, ...]


def choose_sampling(
    manifest: Manifest,
    variant: Variant,
    guidance_scale: PerScale | None,
    temperature: PerScale | None,
    negative_prompt: object,
) -> ScaleSettings:
    """Return guidance and temperature per scale; None stands for the bundle's own.

    Raises ConfigError if they are not one number or one per scale, and on guidance or a negative
    prompt if the bundle was built without guidance.
    """
    guided, scales = variant.guided, len(variant.grids)
    if guidance_scale is None:
        guidance_scale = manifest.guidance_scale if guided else 1.0
    guidance = per_scale(guidance_scale, scales, "guidance_scale")
    if not guided and (set(guidance) != {1.0} or negative_prompt is not None):
        raise ConfigError(
            "this bundle was built without guidance: leave out negative_prompt and any "
            "guidance_scale but 1, or build a bundle with guidance"
        )
    if temperature is None:
        temperature = manifest.temperature
    return ScaleSettings(guidance, temperature_per_scale(temperature, scales))


def choose_pictures(
    image: Source | Sequence[Source],
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str | None] | None,
    copies: int,
    seed: int | Sequence[int] | None,
    tokenise: Callable[[str], list[int]],
) -> list[Wanted]:
    """Return all pictures to make, in order: the copies of the first picture and prompt come first.

    Raises ConfigError on lists of unequal lengths and on values that are no text, count or seed,
    TextError and PictureError as `tokenise` and `open_picture` do.
    """
    if not isinstance(copies, int) or copies < 1:
        raise ConfigError(
            f"num_images_per_prompt is {shown(copies)}; give an integer of at least 1"
        )
    count = _common_length(image=image, prompt=prompt, negative_prompt=negative_prompt)
    seeds = _seeds(seed, count * copies)
    prompts = [tokenise(_text(p)) for p in _listed(prompt)]
    negatives = [None if p is None else tokenise(_text(p)) for p in _listed(negative_prompt)]
    pictures = [open_picture(source) for source in _listed(image)]
    entries = zip(
        _spread(pictures, count), _spread(prompts, count), _spread(negatives, count), strict=True
    )
    repeated = [entry for entry in entries for _ in range(copies)]
    return [Wanted(*entry, seed) for entry, seed in zip(repeated, seeds, strict=True)]


def is_list(value: object) -> bool:
    """Return whether an argument has one value per entry, rather than one for all of them."""
    return isinstance(value, list | tuple)


def _listed(value: Any) -> list[Any]:
    return list(value) if is_list(value) else [value]


def _spread(values: list[Any], count: int) -> list[Any]:
    """Repeat a single value for all entries."""
    return values * count if len(values) == 1 else values


def _common_length(**arguments: object) -> int:
    """Return the length of the arguments that are lists; 1 if none is."""
    lengths = {name: len(_listed(value)) for name, value in arguments.items() if is_list(value)}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ConfigError(f"{told} entries: lists must be equally long")
    return next(iter(lengths.values()), 1)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"a prompt is {shown(value)}; give a string")
    return value


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return a seed for each picture to make; without one, successive seeds from a random one."""
    first = secrets.randbelow(DRAWN_SEEDS) if seed is None else seed
    try:
        if is_list(first):
            seeds = [index(s) for s in _listed(first)]
        else:
            seeds = [index(first) + i for i in range(count)]  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(
            f"seed is {shown(seed)}; give an integer, or one for each result"
        ) from error
    if len(seeds) != count:
        raise ConfigError(f"there are {len(seeds)} seeds for {count} results; give one for each")
    for value in seeds:
        if not 0 <= value < SEEDS:
            told = value if abs(value) < SEEDS**2 else "far off"
            raise ConfigError(f"the seed is {told}; it must be at least 0 and less than 2^64")
    return seeds

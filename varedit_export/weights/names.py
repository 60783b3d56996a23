"""The names of weights, as users type them and as data: it needs neither PyTorch nor a network."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from varedit_runtime.errors import ConfigError, shown
from varedit_runtime.values import LARGEST

NANO_SIZE = "nano"  # the size whose weights come with the package, in the embedded bundle
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Published:
    """The published weights of a size: a repository, and its files.

    transformers: by resolution in px. tokenizer: the picture tokenizer.
    """

    repository: str
    transformers: Mapping[int, str]
    tokenizer: str


PUBLISHED = {
    "2b": Published("HiDream-ai/VAREdit", {}, "infinity_vae_d32reg.pth"),
    "8b": Published(
        "HiDream-ai/VAREdit",
        {512: "8B-512.pth", 1024: "8B-1024.pth"},
        "infinity_vae_d56_f8_14_patchify.pth",
    ),
}


def parse(text: str) -> tuple[str, float]:
    """Return the place and the scale that FILE[:SCALE] stands for; the scale is 1 by default.

    Raises ConfigError if the scale is no finite number.
    """
    place, colon, number = text.rpartition(":")
    if not colon or number.startswith("//") or os.path.exists(text):
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        scale = float("nan")
    if not (place and abs(scale) <= LARGEST):
        raise ConfigError(
            f"--lora {shown(text)}: {shown(number)} is no scale: give FILE or FILE:SCALE, such as "
            f"style{SUFFIX}:0.8"
        )
    return place, scale

"""An operator's own code that judges prompts and pictures."""

from importlib import import_module
from typing import Protocol

from PIL import Image

from varedit_runtime.errors import ConfigError, reason
from varedit_serve.errors import wrong


class Moderation(Protocol):
    """Judges in a thread; several may judge at once. What it raises refuses too, as a fault."""

    def prompt(self, text: str) -> str | None:
        """Return why an instruction, or a negative prompt, is refused; None if it is not."""

    def result(self, image: Image.Image) -> str | None:
        """Return why a result or preview, RGB or RGBA, is refused; None if it is not."""


class Everything:
    """Lets everything pass."""

    def prompt(self, text: str) -> str | None:
        """Return None."""

    def result(self, image: Image.Image) -> str | None:
        """Return None."""


def heed(why: str | None, param: str | None = None) -> None:
    """Raise ApiError 400 where a judgement says why something is refused."""
    if why is not None:
        raise wrong(param, f"moderation refused it: {why}", "moderation_blocked")


def find_moderation(name: str) -> Moderation:
    """Import MODULE:OBJECT. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # it is an operator's code
        raise ConfigError(f"{name} is no MODULE:OBJECT ({reason(error)})") from error
    if not all(callable(getattr(found, judged, None)) for judged in ("prompt", "result")):
        raise ConfigError(f"{name} must have two methods, prompt(text) and result(image)")
    return found

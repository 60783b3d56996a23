"""The families of metrics by name: each is a `Family` in a file of its own."""

from importlib import import_module
from typing import TYPE_CHECKING

from varedit_runtime.errors import ConfigError, shown

if TYPE_CHECKING:
    from varedit_export.evaluation.case import Family

_HERE = __name__
FAMILIES = {
    "clip": f"{_HERE}.clip:CLIP",
    "dino": f"{_HERE}.dino:DINO",
    "structure": f"{_HERE}.dino:STRUCTURE",
    "lpips": f"{_HERE}.lpips:LPIPS",
    "pixels": f"{_HERE}.pixels:PIXELS",
    "judge-paper": f"{_HERE}.judges:PAPER",
    "judge-imgedit": f"{_HERE}.judges:IMGEDIT",
    "judge-gedit": f"{_HERE}.judges:GEDIT",
    "nano": "varedit_nano.benchmark:FAMILY",  # in a clone of the project only
}


def family(name: str) -> "Family":
    """Return a family of metrics. Raises ConfigError on an unknown name."""
    if name not in FAMILIES:
        raise ConfigError(f"no metric is called {shown(name)}; there are {', '.join(FAMILIES)}")
    module, _, variable = FAMILIES[name].partition(":")
    return getattr(import_module(module), variable)

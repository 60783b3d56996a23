"""The families of metrics by name: each is a `Family` in a file of its own."""

from typing import TYPE_CHECKING

from varedit_export.evaluation.registry import entry

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
    "judge-uge": f"{_HERE}.judges:UGE",
    "judge-gedit": f"{_HERE}.judges:GEDIT",
    "nano": "varedit_nano.benchmark:FAMILY",  # in a clone of the project only, as the next one
    "nano-turns": "varedit_nano.turns:FAMILY",
}


def family(name: str) -> "Family":
    """Return a family of metrics. Raises ConfigError on an unknown name, or as `benchmark`."""
    return entry("metric", FAMILIES, name)

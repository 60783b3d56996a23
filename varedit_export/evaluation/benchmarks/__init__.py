"""The benchmarks by name: each is a `Benchmark` in a file of its own."""

from importlib import import_module
from typing import TYPE_CHECKING

from varedit_runtime.errors import ConfigError, shown

if TYPE_CHECKING:
    from varedit_export.evaluation.case import Benchmark

_HERE = __name__
BENCHMARKS = {
    "emu-edit": f"{_HERE}.emu_edit:EMU_EDIT",
    "pie-bench": f"{_HERE}.pie_bench:PIE_BENCH",
    "imgedit": f"{_HERE}.imgedit:BASIC",
    "imgedit-uge": f"{_HERE}.imgedit:UGE",
    "imgedit-turns": f"{_HERE}.imgedit:TURNS",
    "gedit-en": f"{_HERE}.gedit:ENGLISH",
    "gedit-cn": f"{_HERE}.gedit:CHINESE",
    "magicbrush": f"{_HERE}.magicbrush:MAGICBRUSH",
    "folder": f"{_HERE}.folder:FOLDER",
    "nano": "varedit_nano.benchmark:SCENES",  # in a clone of the project only
}


def benchmark(name: str) -> "Benchmark":
    """Return a benchmark. Raises ConfigError on an unknown name, or if it is not installed."""
    if name not in BENCHMARKS:
        raise ConfigError(
            f"no benchmark is called {shown(name)}; there are {', '.join(BENCHMARKS)}"
        )
    module, _, variable = BENCHMARKS[name].partition(":")
    try:
        return getattr(import_module(module), variable)
    except ModuleNotFoundError as error:
        if error.name not in ("varedit_nano", "skia"):
            raise
        raise ConfigError(
            "nano's scenes are drawn in a clone of the project: run pip install -e '.[train]' there"
        ) from error

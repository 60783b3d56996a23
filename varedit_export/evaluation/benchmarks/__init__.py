"""The benchmarks by name: each is a `Benchmark` in a file of its own."""

from typing import TYPE_CHECKING

from varedit_export.evaluation.registry import entry

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
    "nano": "varedit_nano.benchmark:SCENES",  # in a clone of the project only, as the next one
    "nano-turns": "varedit_nano.turns:BENCHMARK",
}


def benchmark(name: str) -> "Benchmark":
    """Return a benchmark. Raises ConfigError on an unknown name, or if it is not installed."""
    return entry("benchmark", BENCHMARKS, name)

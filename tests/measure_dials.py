"""Measure what the dials of an edit gain, in turns: guidance off, `fast`, further results.

    python tests/measure_dials.py bundles/125m --variant 512-b1 --repeat 3 --threads 2

Every turn makes one edit of each kind, so that whatever else the machine does meets all of them.
The first turn is a warm-up. Seconds of the processor count what other programs do not disturb.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import click

from varedit_runtime.bench import INSTRUCTION, synthetic_picture
from varedit_runtime.editing.editor import Editor

CPUINFO = Path("/proc/cpuinfo")
SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")


@click.command()
@click.argument("bundle")
@click.option("--variant")
@click.option("--repeat", default=5, show_default=True)
@click.option("--threads", type=int)
def main(bundle: str, variant: str | None, repeat: int, threads: int | None) -> None:
    with Editor.open(bundle, variant=variant, threads=threads) as editor:
        edits, taken = kinds(editor), dict[str, list[tuple[float, float]]]()
        for turn in range(repeat + 1):
            for name, edit in edits.items():
                wall, own = perf_counter(), process_time()
                edit()
                if turn:
                    times = perf_counter() - wall, process_time() - own
                    taken.setdefault(name, []).append(times)
    print(f"{processor()}; {bundle}, median of {repeat}")
    first = median(taken["guided"])
    for name, times in taken.items():
        wall, own = median(times)
        print(f"{name:<24}{own:9.3f} s of processors, {wall:9.3f} s: {first[1] / own:.2f} times")


def kinds(editor: Editor) -> dict[str, Callable[[], None]]:
    """Return an edit of each kind; all but the further result forget what was computed before."""
    picture, scales = synthetic_picture(editor.variant), len(editor.variant.grids)
    guidance = editor.bundle.manifest.guidance_scale

    def edit(unguided: int, further: bool = False) -> Callable[[], None]:
        per_scale = [guidance] * (scales - unguided) + [1.0] * unguided

        def run() -> None:
            if not further:
                editor.forget()
            editor.edit(picture, INSTRUCTION, guidance_scale=per_scale, seed=0)

        return run

    off = {f"guidance off at {n}": edit(n) for n in (1, 2, 3, scales)}
    return {**off, "guided": edit(0), "a further result": edit(0, further=True)}


def median(times: list[tuple[float, float]]) -> tuple[float, float]:
    walls, own = zip(*times, strict=True)
    return statistics.median(walls), statistics.median(own)


def processor() -> str:
    """Return the processor's name and those of its instruction sets that matter here."""
    lines = dict(line.split(":", 1) for line in CPUINFO.read_text().splitlines() if ":" in line)
    facts = {name.strip(): value for name, value in lines.items()}
    flags = facts["flags"].split()
    return f"{facts['model name'].strip()} ({', '.join(s for s in SETS if s in flags)})"


if __name__ == "__main__":
    main()

"""Measure a build: time, peak anonymous memory of its processes, disk against stored weights.

    python tests/measure_build.py [--folder DIR] -- --size 2b --res 512 --precision fp16 \\
        --random-weights 0

What follows `--` goes to `varedit-export build`. Anonymous memory (RssAnon) is what a machine must
have; pages of files that are mapped or were written are not counted, for the system drops them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

INTERVAL = 0.05  # seconds between samples


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a build.")
    parser.add_argument("--folder", type=Path, help="where to build; a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    parser.add_argument("options", nargs="*", help="of varedit-export build")
    given = parser.parse_args()
    folder = Path(mkdtemp(prefix="varedit-build-", dir=given.folder))
    bundle = folder / "bundle"
    try:
        print(json.dumps(measure([*given.options, "-o", str(bundle)], bundle), indent=1))
    finally:
        if not given.keep:
            shutil.rmtree(folder)


def measure(options: list[str], bundle: Path) -> dict[str, object]:
    command = [sys.executable, "-c", "from varedit_export.cli import main; main()", "build"]
    start = time.monotonic()
    process = subprocess.Popen([*command, *options])
    peak, disk, at = 0, 0, 0.0
    while process.poll() is None:
        anonymous = sum(map(_anonymous, _tree(process.pid)))
        if anonymous > peak:
            peak, at = anonymous, time.monotonic() - start
        disk = max(disk, _size(bundle.parent)) if _ticks(start) else disk
        time.sleep(INTERVAL)
    seconds = time.monotonic() - start
    disk = max(disk, _size(bundle.parent))
    weights = _size(bundle / "graphs" / "weights")
    return {
        "exit status": process.returncode,
        "seconds": round(seconds, 1),
        "peak anonymous GB": round(peak / 1e9, 3),
        "reached after seconds": round(at, 1),
        "stored weights GB": round(weights / 1e9, 3),
        "peak disk GB": round(disk / 1e9, 3),
        "disk / weights": round(disk / weights, 4) if weights else None,
    }


def _ticks(start: float) -> bool:
    """Sample about once a second."""
    return (time.monotonic() - start) % 1 < INTERVAL * 2


def _tree(root: int) -> list[int]:
    """Yield a process and all its descendants."""
    found, queue = [], [root]
    while queue:
        found.append(queue.pop())
        for file in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                queue += map(int, file.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _size(folder: Path) -> int:
    """Return the bytes that the files below a folder take on the disk."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 512 * path.lstat().st_blocks
        except OSError:  # renamed meanwhile
            continue
    return total


if __name__ == "__main__":
    main()

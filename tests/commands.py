"""Run `varedit-run` with the small bundle, in this process or in one of its own."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bundles import small_bundle
from click.testing import CliRunner, Result

from varedit_runtime.cli import main

THREADS = ("--threads", 1, "--backend", "onnxruntime")


def run(*words: object, bundle: Callable[[], Path] = small_bundle, **more: Any) -> Result:
    line = [*words, "--bundle", bundle(), *THREADS]
    return CliRunner().invoke(main, list(map(str, line)), prog_name="varedit-run", **more)


def start(*words: object, code: str = "", **streams: Any) -> "subprocess.Popen[bytes]":
    """Start the command, after some code that changes it."""
    script = f"{code}\nfrom varedit_runtime.terminal.start import varedit_run; varedit_run()"
    line = [*words, "--bundle", small_bundle(), *THREADS]
    return subprocess.Popen[bytes]([sys.executable, "-c", script, *map(str, line)], **streams)


def slowed(condition: str) -> str:
    """Return code that says "under way" and waits where noise is drawn, on a condition."""
    return f"""if True:
        import time
        from varedit_runtime.editing import run
        noise = run.uniform_noise
        def uniform_noise(seed, scale, *rest):
            if {condition}:
                print("under way", flush=True)
                time.sleep(120)
            return noise(seed, scale, *rest)
        run.uniform_noise = uniform_noise
        """


def spoken(stderr: str) -> list[str]:
    """Return the lines on stderr beside those about the bundle, whose weights are random."""
    usual = ("bundle: ", "Warning: the bundle's weights are random")
    return [line for line in stderr.splitlines() if not line.startswith(usual)]


def fails(result: Result, *patterns: str) -> None:
    """Check for exit code 1 and these errors, in order, on a line each."""
    assert result.exit_code == 1, result.output
    told = spoken(result.stderr)
    assert len(told) == len(patterns), told
    for line, pattern in zip(told, patterns, strict=True):
        assert line.startswith("Error: ") and re.search(pattern, line), line

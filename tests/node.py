"""Programs in JavaScript that tests run, with OpenAI's client."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "javascript"
SECONDS = 180  # that a program may take on a busy machine


def _why_not() -> str:
    if shutil.which("node") is None:
        return "Node.js is not installed"
    if not (FOLDER / "node_modules" / "openai").is_dir():
        return "OpenAI's client is not installed: run npm ci in tests/javascript"
    asked = ["node", "--eval", "process.exitCode = +(parseInt(process.versions.node) < 20)"]
    old = subprocess.run(asked, timeout=SECONDS, stdin=subprocess.DEVNULL).returncode
    return "OpenAI's client needs Node.js 20 or newer" if old else ""


NEEDED = pytest.mark.skipif(bool(WHY_NOT := _why_not()), reason=WHY_NOT)


def answers(program: str, *words: object) -> Any:
    """Return the JSON that a program prints."""
    command = ["node", FOLDER / program, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

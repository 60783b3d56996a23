"""Measure what a server adds to edits: throughput beside the bare editor, and its own CPU time.

    python tests/measure_serving.py [--bundle nano] [--clients 16] [--edits 64] [--turns 3]

The bare editor edits prepared edits one after the other in this process, while the server rests;
then clients ask the server for the same edits. Both use one thread, in turns, as speed changes.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import openai
from PIL import Image

from varedit_runtime import Editor
from varedit_runtime.locate import named

TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a server.")
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    serving = [sys.executable, "-m", "varedit_serve.cli", given.bundle, "--port", "0"]
    server = subprocess.Popen([*serving, "--threads", "1"], stderr=subprocess.PIPE, text=True)
    try:
        print(json.dumps(measure(server, given), indent=1))
    finally:
        server.terminate()


def measure(server: "subprocess.Popen[str]", given: argparse.Namespace) -> dict[str, float]:
    assert server.stderr is not None
    lines = iter(server.stderr.readline, "")
    told = next(filter(None, (re.search(r"is served at (\S+)", line) for line in lines)))
    next(line for line in lines if "ready:" in line)
    client = openai.OpenAI(base_url=f"{told[1]}/v1", api_key="none", max_retries=0)
    content = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(content, "PNG")

    def ask(seed: int) -> None:
        extra = {"seed": seed}
        client.images.edit(image=content.getvalue(), prompt="add a red hat", extra_body=extra)

    bare, served, share = [], [], []
    with (
        Editor.open(named(given.bundle), threads=1) as editor,
        ThreadPoolExecutor(given.clients) as clients,
    ):
        edit = editor.prepare(content.getvalue(), "add a red hat", seed=0)
        editor.edit_prepared([edit])
        for _ in range(given.turns):
            start, cpu = time.monotonic(), time.process_time()
            for _ in range(given.edits):
                editor.edit_prepared([edit])
            cpu = time.process_time() - cpu
            bare.append(time.monotonic() - start)
            start, own = time.monotonic(), seconds(server.pid)
            list(clients.map(ask, range(given.edits)))
            served.append(time.monotonic() - start)
            share.append((seconds(server.pid) - own) / cpu)
    ratios = [one / other for one, other in zip(served, bare, strict=True)]
    return {"time of served edits / bare ones": median(ratios), "server's CPU": median(share)}


def seconds(pid: int) -> float:
    """Return the CPU seconds of a process, without those of its children."""
    with open(f"/proc/{pid}/stat") as file:
        numbers = file.read().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / TICKS


if __name__ == "__main__":
    main()

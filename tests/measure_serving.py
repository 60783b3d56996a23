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
from operator import truediv
from statistics import median
from threading import Thread

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
    told = next(filter(None, (re.search(r"served at (\S+)", line) for line in lines)))
    next(line for line in lines if "ready:" in line)
    Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop the server
    client = openai.OpenAI(base_url=f"{told[1]}/v1", api_key="none", max_retries=0)

    def ask(number: int) -> None:
        client.images.edit(image=picture(number), prompt="add a red hat")

    bare, served, own_cpu, cpu = [], [], [], []
    with (
        Editor.open(named(given.bundle), threads=1) as editor,
        ThreadPoolExecutor(given.clients) as clients,
    ):
        edit = editor.prepare(picture(0), "add a red hat", seed=0)
        editor.edit_prepared([edit])
        for _ in range(given.turns):
            start, before = time.monotonic(), time.process_time()
            for _ in range(given.edits):
                editor.forget()
                editor.edit_prepared([edit])
            cpu.append((time.process_time() - before) / given.edits)
            bare.append(time.monotonic() - start)
            start, before = time.monotonic(), seconds(server.pid)
            list(clients.map(ask, range(given.edits)))
            served.append(time.monotonic() - start)
            own_cpu.append((seconds(server.pid) - before) / given.edits)
    return {
        "time of served edits / bare ones": median(map(truediv, served, bare)),
        "server's CPU / an edit's": median(map(truediv, own_cpu, cpu)),
        "server's CPU seconds an edit": median(own_cpu),
    }


def picture(number: int) -> bytes:
    """Return a picture that differs from others, so that nothing is kept of earlier edits."""
    content = io.BytesIO()
    Image.radial_gradient("L").resize((128, 128)).point([v ^ number for v in range(256)]).save(
        content, "PNG"
    )
    return content.getvalue()


def seconds(pid: int) -> float:
    """Return the CPU seconds of a process, without those of its children."""
    with open(f"/proc/{pid}/stat") as file:
        numbers = file.read().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / TICKS


if __name__ == "__main__":
    main()

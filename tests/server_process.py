"""A server of nano in a process of its own, as a user starts it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

PERSON = Path(__file__).parent.parent / "docs" / "samples" / "person.png"
OPTIONS = ("--threads", "1", "--upload-seconds", "3", "--max-queue", "8")


class Process:
    """A server of its own."""

    def __init__(self, *options: str, key: str = "none") -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "varedit_serve.cli", "nano", "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stderr is not None
        line = next(line for line in self.popen.stderr if "served at" in line)
        self.port = int(line.rsplit(":", 1)[1])
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0
        )

    def get(self, path: str) -> tuple[int, str]:
        root = str(self.client.base_url).removesuffix("v1/")
        reply = self.client._client.get(f"{root}{path}")
        return reply.status_code, reply.text

    def child(self) -> int:
        """Return the number of the process that edits."""
        return self.children()[0]

    def children(self) -> list[int]:
        told = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(self.popen.pid)])
        return list(map(int, told.split()))

    def edit(self, prompt: str = "add a hat", **fields: Any) -> Any:
        ours = {
            name: fields.pop(name)
            for name in ("seed", "guidance_scale", "temperature", "negative_prompt")
            if name in fields
        }
        edit: Any = self.client.images.edit
        return edit(image=PERSON.read_bytes(), prompt=prompt, extra_body=ours, **fields)


def until(true: Callable[[], object]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.02)
    pytest.fail("it never came true")


@contextmanager
def running(*options: str, key: str = "none") -> Iterator[Process]:
    """Run a server; key: what its client sends."""
    server = Process(*OPTIONS, *options, key=key)
    try:
        until(lambda: server.get("readyz")[0] == 200)
        yield server
    finally:
        server.popen.kill()
        server.popen.wait()
        server.client.close()

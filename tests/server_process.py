"""A server of nano in a process of its own, as a user starts it."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import openai
import psutil
import pytest

PERSON = Path(__file__).parent.parent / "docs" / "samples" / "person.png"
OPTIONS = ("--threads", "1", "--upload-seconds", "3", "--max-queue", "8")
PATIENCE = 120  # seconds, for machines that are slow and busy


class Process:
    """A server of its own, which may be starting."""

    def __init__(self, *options: str, key: str = "none") -> None:
        # A pipe would have to be read all the time: a full one stops the server.
        self._log = NamedTemporaryFile("a")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "varedit_serve.cli", "nano", "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
        )
        self.client = openai.OpenAI(
            base_url="http://127.0.0.1", api_key=key, max_retries=0, timeout=PATIENCE
        )

    def said(self) -> str:
        """Return what it has written to stderr."""
        return Path(self._log.name).read_text()

    def listens(self) -> None:
        """Wait until it does."""
        until(lambda: "served at" in self.said() or self.popen.poll() is not None)
        found = re.search(r"served at \S+:(\d+)", self.said())
        assert found, "the server has ended"
        self.port = int(found[1])
        self.client.base_url = f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> tuple[int, str]:
        root = str(self.client.base_url).removesuffix("v1/")
        reply = self.client._client.get(f"{root}{path}")
        return reply.status_code, reply.text

    def child(self) -> psutil.Process:
        """Return the process that edits."""
        return self.children()[0]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children()

    def edit(self, image: bytes | None = None, prompt: str = "add a hat", **fields: Any) -> Any:
        ours = {
            name: fields.pop(name)
            for name in ("seed", "guidance_scale", "temperature", "negative_prompt")
            if name in fields
        }
        edit: Any = self.client.images.edit
        image = image or PERSON.read_bytes()
        return edit(image=image, prompt=prompt, extra_body=ours, **fields)

    def end(self) -> None:
        """End it at once; pytest shows what it said if the test has failed."""
        self.popen.kill()
        self.popen.wait(PATIENCE)
        self.client.close()
        print(self.said())
        self._log.close()


def until(true: Callable[[], object]) -> None:
    late = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > late:
            pytest.fail("it never came true")
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    """Return whether it has ended, maybe without anyone who asks how, as in some containers."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def started(*options: str, key: str = "none") -> Iterator[Process]:
    """Start a server; key: what its client sends."""
    server = Process(*options, key=key)
    try:
        server.listens()
        yield server
    finally:
        server.end()


@contextmanager
def running(*options: str, key: str = "none") -> Iterator[Process]:
    """Start a server and wait until it is ready."""
    with started(*OPTIONS, *options, key=key) as server:
        until(lambda: server.get("readyz")[0] == 200)
        yield server

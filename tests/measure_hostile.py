"""Measure how soon a server answers /livez while hostile clients do their worst.

    python tests/measure_hostile.py [--clients 4] [--seconds 30]

So many clients of each kind attack from another process. The bare /livez, before they begin, says
how busy the machine is with other things.
"""

import argparse
import io
import itertools
import json
import os
import socket
import struct
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from threading import Thread

from PIL import Image
from server_process import Process, running
from serving import form

PAUSE = 0.02  # seconds between two questions
JSON = {"content-type": "application/json"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a server under attack.")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    with running("--max-queue", "32") as server:
        told = {"load": os.getloadavg()[0], "bare": latencies(server, given.seconds / 3)}
        asked = server.port, given.clients
        attacking = get_context("spawn").Process(target=attack, args=asked, daemon=True)
        attacking.start()
        time.sleep(5)  # they make their pictures
        told["attacked"] = latencies(server, given.seconds)
        attacking.kill()
        said = server.get("metrics")[1].splitlines()
        told["answers"] = [line for line in said if "images/edits" in line and "0.0" not in line]
        print(json.dumps(told, indent=1))


def latencies(server: Process, seconds: float) -> dict[str, float]:
    """Return how many milliseconds answers took, each on a connection of its own."""
    taken, end = list[float](), time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b" 200 " in connection.recv(4096)
        taken.append((time.perf_counter() - start) * 1000)
        time.sleep(PAUSE)
    taken.sort()
    return {
        "asked": len(taken),
        "half within": taken[len(taken) // 2],
        "99 % within": taken[len(taken) * 99 // 100],
        "all within": taken[-1],
    }


def attack(port: int, clients: int) -> None:
    """Attack a server in all ways until this process is killed."""
    for way in ways():
        for _ in range(clients):
            Thread(target=repeat, args=(way, port), daemon=True).start()
    time.sleep(10**6)


def repeat(way: Callable[[socket.socket], None], port: int) -> None:
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 60) as connection:
            way(connection)


def ways() -> list[Callable[[socket.socket], None]]:
    """Return what one connection does, for each kind of client."""
    large = picture(4096)
    url = b"data:image/png;base64," + b64encode(large)
    told = b'{"prompt": "add a hat", "image": "%s"}'
    whole = [
        request(*form([("image", large), ("prompt", "add a hat"), ("n", "4")])),
        request(*form([("image", large), ("prompt", "add a hat"), ("stream", "true")])),
        request(*form([("image", bomb()), ("prompt", "add a hat")])),
        request(*form([("image", large), ("mask", large), ("prompt", "add a hat " * 3000)])),
        request(JSON, told % url),
        request(JSON, told % url.replace(b"/", b"\\/")),
        request(JSON, told % (b"\\u0061" * 3_000_000)),
        request(JSON, b'{"seed": %s}' % (b"1" * 19_000_000)),
        request(JSON, b'{"temperature": [%s1]}' % (b"1e9, " * 9_000)),
        request(JSON, b"[" * 19_000_000),
        request(*form([("user", "x" * 10)] * 40)),
        request(*header_lines()),
    ]
    return [*map(sending, whole), trickling, unread, reset, endless]


def picture(side: int) -> bytes:
    content = io.BytesIO()
    noise = Image.effect_noise((side // 8, side // 8), 90).resize((side, side)).convert("RGB")
    noise.save(content, "JPEG", quality=90)
    return content.getvalue()


def bomb() -> bytes:
    """Return a small file of as many pixels as may be."""
    content = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(content, "PNG")
    return content.getvalue()


def header_lines() -> tuple[dict[str, str], bytes]:
    kind, _ = form([])
    return kind, b"--XX\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n--XX--\r\n"


def request(kind: dict[str, str], body: bytes) -> bytes:
    head = "POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    told = f"content-length: {len(body)}\r\ncontent-type: {kind['content-type']}\r\n\r\n"
    return f"{head}{told}".encode() + body


def sending(content: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        """Send a request, and read what the server says until it closes the connection."""
        connection.sendall(content)
        while connection.recv(2**20):
            pass

    return send


def trickling(connection: socket.socket) -> None:
    for byte in request(*form([("prompt", "x" * 1000)])):
        connection.sendall(bytes([byte]))
        time.sleep(0.01)


def unread(connection: socket.socket) -> None:
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 1000)
    time.sleep(2)


def reset(connection: socket.socket) -> None:
    connection.sendall(b"GET /livez HTTP/1.1\r\nhost:")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.1)  # else all connections that there may be are taken


def endless(connection: socket.socket) -> None:
    head = "POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
    kind, _ = form([])
    connection.sendall(f"{head}content-type: {kind['content-type']}\r\n\r\n".encode())
    part = b"--XX\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
    for content in itertools.chain([part], itertools.repeat(bytes(65_536))):
        connection.sendall(b"%x\r\n%s\r\n" % (len(content), content))


if __name__ == "__main__":
    main()

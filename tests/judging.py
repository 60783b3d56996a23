"""A judge on the loopback that answers as a test wants: well, badly, late, or not at all."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = 'All was done. {"success": 8, "overedit": 6}'
HOW_LATE = 0.5


class Late(str):
    """An answer that comes too late."""


class Never(Late):
    """An answer that comes when the test has ended."""


# A text, a body, a status, or a status and headers, with a body or without.
Answer = str | bytes | int | tuple[int, dict[str, str]] | tuple[int, dict[str, str], bytes]


class Server(ThreadingHTTPServer):
    """Answers a request with what `answer` returns for its prompt and its number."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.lock = answer, list[dict[str, Any]](), threading.Lock()
        self.at_once = self.most_at_once = 0
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append(body | {"key": self.headers["Authorization"], "path": self.path})
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        prompt, *_ = body["messages"][0]["content"]
        answer = server.answer(prompt["text"], number)
        if isinstance(answer, Late):
            server.stopped.wait(HOW_LATE * (10 if isinstance(answer, Never) else 1))
        with server.lock:
            server.at_once -= 1
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        status, headers, content = 200, dict[str, str](), b'{"error": {"message": "no"}}'
        if isinstance(answer, str):
            message = {"role": "assistant", "content": str(answer)}
            content = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }
            ).encode()
        elif isinstance(answer, bytes):
            content = answer
        elif isinstance(answer, int):
            status = answer
        else:
            status, headers, *bodies = answer
            content = bodies[0] if bodies else content
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client has given up

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def serving(answer: Callable[[str, int], Answer]) -> Iterator[Server]:
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()

"""A stand-in of the Hugging Face hub on loopback, for the real client library to talk to.

It speaks the part of the hub's HTTP API that downloads need: a repository's files and commit,
HEAD and GET of a file at a revision, redirects of large files to a store of blobs, byte ranges.
Faults are planted by its fields.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

LARGE = 1000  # bytes from which a file is a blob behind a redirect


@dataclass
class Repository:
    """A repository: its files by path, its licence, and who may read it."""

    files: dict[str, bytes]
    licence: str = "mit"
    token: str | None = None  # the only token that may read it
    gated: bool = False

    @property
    def commit(self) -> str:
        """Return the hash of its only commit."""
        content = [(name, sha256(data).hexdigest()) for name, data in sorted(self.files.items())]
        return sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Hub:
    """The repositories by name (datasets/NAME for data), planted faults, and what was asked."""

    repositories: dict[str, Repository]
    address: str = ""
    cuts: list[int] = field(default_factory=list)  # the next blobs end after so many bytes
    hangs: bool = False  # whether a cut blob keeps the connection open instead of ending it
    damaged: bool = False  # whether blobs are sent with their first byte changed
    answer: dict[str, Any] = field(default_factory=dict)  # said about every repository instead
    requests: list[str] = field(default_factory=list)  # method, path and range of all so far


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run a hub while the context lasts."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library talk to a stand-in for one test, with a cache and without a token."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {asked}".strip())
        path = self.path.partition("?")[0].replace("/api/models/", "/api/")
        name = r"((?:datasets/)?[^/]+/[^/]+)"
        if match := re.fullmatch(rf"/api/{name}(?:/revision/([^/]+))?", path):
            self._information(*match.groups())
        elif match := re.fullmatch(rf"/api/{name}/tree/([^/]+)", path):
            self._tree(*match.groups())
        elif match := re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        elif match := re.fullmatch(rf"/blobs/{name}/(.+)", path):
            self._blob(*match.groups())
        else:
            self._answer(404)

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        """Return a repository that may be read, or answer why not."""
        repository = self.hub.repositories.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token is not None and given != repository.token):
            if repository is not None and repository.gated:
                self._answer(403, {"X-Error-Code": "GatedRepo"})
            else:
                self._answer(401 if not given else 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in (None, "main", repository.commit):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository

    def _information(self, name: str, revision: str | None) -> None:
        if repository := self._repository(name, revision):
            siblings = [
                {"rfilename": file, "size": len(data), "blobId": _oid(data)}
                | (
                    {"lfs": {"sha256": _sha(data), "size": len(data), "pointerSize": 130}}
                    if _large(data)
                    else {}
                )
                for file, data in repository.files.items()
            ]
            tags = ["pytorch", f"license:{repository.licence}"]
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": repository.commit,
                    "tags": tags,
                    "siblings": siblings,
                    **self.hub.answer,
                }
            )

    def _tree(self, name: str, revision: str) -> None:
        if repository := self._repository(name, revision):
            self._json(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                    | (
                        {"lfs": {"oid": _sha(data), "size": len(data), "pointerSize": 130}}
                        if _large(data)
                        else {}
                    )
                    for file, data in repository.files.items()
                ]
            )

    def _file(self, name: str, revision: str, file: str) -> None:
        if repository := self._repository(name, revision):
            data = repository.files.get(file)
            commit = {"X-Repo-Commit": repository.commit}
            if data is None:
                self._answer(404, commit | {"X-Error-Code": "EntryNotFound"})
            elif _large(data):
                linked = {"X-Linked-Etag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
                # The hub's store is another host; the client reads the headers of that redirect.
                store = self.hub.address.replace("127.0.0.1", "localhost")
                place = {"Location": f"{store}/blobs/{name}/{file}"}
                self._answer(302, commit | linked | place)
            else:
                self._answer(200, commit | {"ETag": f'"{_oid(data)}"'}, data)

    def _blob(self, name: str, file: str) -> None:
        data = self.hub.repositories[name].files[file]
        if self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        headers = {"ETag": f'"{_sha(data)}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.pop(0) if self.hub.cuts and self.command == "GET" else None
        self._answer(206 if start else 200, headers, data[start:], cut)

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            if self.hub.hangs:
                self.rfile.read(1)  # returns when the client is gone
            self.close_connection = True


def _large(data: bytes) -> bool:
    return len(data) >= LARGE


def _sha(data: bytes) -> str:
    return sha256(data).hexdigest()


def _oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()

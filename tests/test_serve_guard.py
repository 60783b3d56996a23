"""Who may ask, what all answers have in common, and bodies that are too large or too slow."""

import asyncio
import re
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from serving import EDITS, Server, form, logged, png, served

from varedit_runtime.errors import ConfigError
from varedit_serve.cli import settings_of
from varedit_serve.keys import VARIABLE, Keys, read_keys
from varedit_serve.limits import Limits
from varedit_serve.server import serve_numbers

SECRET = "sk-0123456789abcdef"


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def keys(*lines: str) -> Keys:
    return read_keys(None, "\n".join(lines))


def test_pages_of_other_sites_and_other_names_are_refused() -> None:
    async def test() -> None:
        async with served(origins=("https://app.example",)) as server:
            for host in ("evil.example", "localhost.evil.example", "", "[", "127.0.0.1:8000"):
                reply = await server.ask(path="/livez", headers={"host": host})
                assert (reply.status, reply.json["error"]["code"]) == (403, "foreign_host")
            for origin in (
                "http://evil.example",
                "null",
                "http://localhost:9000",
                "localhost:8000",
            ):
                reply = await server.edit(headers={"origin": origin})
                assert (reply.status, reply.json["error"]["code"]) == (403, "foreign_origin")
                assert "access-control-allow-origin" not in reply.headers
            assert (await server.edit(headers={"origin": "http://localhost:8000"})).status == 200
            assert (await server.edit(headers={"origin": "https://localhost:8000"})).status == 200

    run(test())


def test_names_of_a_server_are_compared_as_names_are() -> None:
    async def test() -> None:
        async with served(hosts=("Edits.Example.org",)) as server:
            reply = await server.ask(path="/livez", headers={"host": "edits.example.ORG:80"})
            assert reply.status == 200

    run(test())


def test_a_site_may_be_named_as_people_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    given = None, None, None, (), ("https://App.example/",), None, None
    chosen = settings_of("127.0.0.1", *given, **vars(Limits()))
    assert chosen["origins"] == ["https://app.example"]


def test_pages_of_named_sites_may_use_the_server() -> None:
    async def test() -> None:
        origin = "https://app.example"
        async with served(origins=(origin,), keys=keys(f"me {SECRET}")) as server:
            ask = {"origin": origin, "access-control-request-method": "POST"}
            reply = await server.ask("OPTIONS", EDITS, ask)
            assert reply.status == 204
            assert reply.headers["access-control-allow-origin"] == origin
            assert "authorization" in reply.headers["access-control-allow-headers"]
            refused = await server.edit(headers={"origin": origin})
            assert refused.status == 401  # which the page can read
            assert refused.headers["access-control-allow-origin"] == origin
            assert refused.headers["vary"] == "origin"
            # As OpenAI's JavaScript client sends its own headers.
            ask["access-control-request-headers"] = "authorization, x-stainless-os"
            reply = await server.ask("OPTIONS", EDITS, ask)
            assert "x-stainless-os" in reply.headers["access-control-allow-headers"]

    run(test())


def test_headers_of_a_stream_are_its_own() -> None:
    async def test() -> None:
        async with served(origins=("https://app.example",)) as server:
            stream = ("stream", "true")
            first = await server.edit(stream, headers={"origin": "https://app.example"})
            other = await server.edit(stream)
            assert first.headers["access-control-allow-origin"] == "https://app.example"
            assert "access-control-allow-origin" not in other.headers
            assert other.headers["vary"] == "origin"

    run(test())


def test_a_key_is_needed_where_there_are_keys() -> None:
    async def test() -> None:
        digest = sha256(SECRET.encode()).hexdigest()
        for line in (f"me {SECRET}", f"me sha256:{digest}"):
            async with served(keys=keys("other sk-aaaaaaaaaaaaaaaa", line)) as server:
                for given in ("", "Bearer", f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer é"):
                    reply = await server.edit(headers={"authorization": given})
                    assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
                right = {"authorization": f"Bearer {SECRET}"}
                assert (await server.edit(headers=right)).status == 200
                for path in ("/v1/models", "/metrics"):
                    assert (await server.ask(path=path)).status == 401
                    assert (await server.ask(path=path, headers=right)).status == 200
                for path in ("/", "/livez", "/readyz", "/openapi.json"):
                    assert (await server.ask(path=path)).status == 200

    run(test())


def test_each_key_has_its_rate() -> None:
    async def test() -> None:
        async with served(keys=keys(f"a {SECRET} 3", f"b {SECRET}b")) as server:
            a = {"authorization": f"Bearer {SECRET}"}
            assert (await server.edit(("n", "2"), headers=a)).status == 200
            reply = await server.edit(("n", "2"), headers=a)
            assert (reply.status, reply.json["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            b = {"authorization": f"Bearer {SECRET}b"}
            assert (await server.edit(("n", "4"), headers=b)).status == 200
            assert (await server.edit(("n", "4"), headers=a)).blamed == (400, "n")

    run(test())


def test_who_waits_as_long_as_told_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("varedit_serve.keys.monotonic", lambda: now)

    async def test() -> None:
        nonlocal now
        async with served(keys=keys(f"a {SECRET} 4")) as server:
            a = {"authorization": f"Bearer {SECRET}"}
            waits = []
            while len(waits) < 5:
                reply = await server.edit(("n", "4"), headers=a)
                waits.append(int(reply.headers.get("retry-after", 0)))
                now += waits[-1]
            # What is charged before a request was read is given back if there is too little.
            assert waits == [0, 15, 45, 0, 15]

    run(test())


def test_a_key_that_is_not_its_own_is_told_with_its_line() -> None:
    for other in (f"b {SECRET}", f"a {SECRET}b"):
        with pytest.raises(ConfigError, match=r"key 3 has the name or the key of .*, key 2"):
            keys(f"c {SECRET}c", f"a {SECRET}", other)


@pytest.mark.parametrize(
    "line",
    [
        *("short", "name short", f"name {SECRET} 0", f"name {SECRET} fast"),
        *(f"a {SECRET}\nb {SECRET}", f"name sha256:{SECRET}"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_without_being_shown(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        keys(line)
    assert SECRET not in str(refused.value)


def test_a_file_of_keys_is_read_with_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(file, "")
    file.write_bytes(b"me \xff")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        read_keys(file, "")
    file.write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="has no key"):
        read_keys(file, "")
    file.write_text(f"# ours\nme {SECRET} 60\n")
    found = read_keys(file, "").find(f"Bearer {SECRET}")
    assert found is not None and (found.name, found.rate) == ("me", 60)
    assert SECRET not in repr(found)


def test_unknown_paths_and_methods_have_openais_shape() -> None:
    async def test() -> None:
        async with served() as server:
            for method, path, status in (
                ("GET", "/nothing", 404),
                ("GET", EDITS, 405),
                ("POST", "/livez", 405),
                ("GET", "/v1/models/other", 404),
                ("GET", "/livez/", 404),  # a redirect would leave the https of a proxy
            ):
                reply = await server.ask(method, path)
                assert reply.status == status and len(reply.json["error"]["message"]) > 30
            assert (await server.ask(path="/v1/models/nano")).json["id"] == "nano"
            numbers = (await server.ask(path="/metrics")).body.decode()
            assert 'varedit_requests_total{path="other",status="404"} 2.0' in numbers
            assert 'varedit_requests_total{path="/v1/models/{name}",status="404"} 1.0' in numbers

    run(test())


def test_no_prompt_key_or_trace_is_in_an_answer_or_log() -> None:
    async def test(lines: list[str]) -> None:
        async with served(keys=keys(f"me {SECRET}")) as server:

            def broken(*given: object, **named: object) -> None:
                raise RuntimeError(f"{given} {named}")

            server.application.edits._answer = broken  # type: ignore[method-assign]
            me = {"authorization": f"Bearer {SECRET}"}
            reply = await server.edit(("prompt", "add a secret hat"), headers=me)
            assert reply.status == 500
            said = "\n".join([reply.body.decode(), *lines])
            assert re.search(r"id=req_\w+: RuntimeError in", said)
            assert not any(hidden in said for hidden in ("secret", SECRET, "Traceback", ".py"))

    with logged() as lines:
        run(test(lines))


def test_a_request_has_an_id_in_its_answer_and_in_the_log() -> None:
    async def test(lines: list[str]) -> None:
        async with served(keys=keys(f"me {SECRET}")) as server:
            me = {"authorization": f"Bearer {SECRET}"}
            for wanted in ("abc-1.2_3", "", "two words", "x" * 65, "a\n"):
                reply = await server.edit(headers={**me, "x-request-id": wanted})
                given = reply.headers["x-request-id"]
                assert (given == wanted) == (wanted == "abc-1.2_3")
                assert re.fullmatch(r"abc-1.2_3|req_[0-9a-f]{24}", given)
            assert (await server.ask(path="/nothing")).headers["x-request-id"]
            lines.clear()
            ours = {**me, "x-request-id": "a"}
            await server.edit(headers=ours)
            await server.edit(("promt", "x"), headers=ours)
            await server.edit(("add a secret", "x"), headers=ours)
            await server.edit(headers={"x-request-id": "b"})
            said = [re.sub(r"=\d\.\d\d", "=0", line) for line in lines]
            assert said == [
                f"{EDITS} id=a key=me status=200 seconds=0",
                f"{EDITS} id=a key=me status=400 code=unknown_field param=promt seconds=0",
                f"{EDITS} id=a key=me status=400 code=unknown_field seconds=0",
                f"{EDITS} id=b status=401 code=invalid_api_key seconds=0",
            ]

    with logged() as lines:
        run(test(lines))


def test_numbers_are_there_from_the_start_and_refusals_are_no_edits() -> None:
    async def test() -> None:
        async with served() as server:
            for name, label in (("restarts", 'reason="stuck"'), ("cancelled", 'when="running"')):
                assert f"varedit_{name}_total{{{label}}} 0.0" in await numbers(server)
            await server.edit(("promt", "x"))
            assert "varedit_edit_request_seconds_count 0.0" in await numbers(server)
            await server.edit()
            assert "varedit_edit_request_seconds_count 1.0" in await numbers(server)
            wanted = 'varedit_requests_total{path="/v1/images/edits",status="%s"} 1.0'
            said = await numbers(server)
            assert all(wanted % status in said for status in (200, 400))

    run(test())


async def numbers(server: Server) -> str:
    return (await server.ask(path="/metrics")).body.decode()


def test_numbers_may_have_an_address_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with served(own_metrics=True) as server:
            assert (await server.ask(path="/metrics")).status == 404
            assert "/metrics" not in (await server.ask(path="/openapi.json")).json["paths"]
            given = server.application, "127.0.0.1"
            port = serve_numbers(*given, 0, Limits(upload_seconds=0.5))
            with pytest.raises(ConfigError, match=r"in use.*--metrics"):
                serve_numbers(*given, port, Limits())
            await asyncio.to_thread(load, port)
            with urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
                assert b"varedit_queue_pictures 0.0" in reply.read()
            assert not capsys.readouterr().err

    run(test())


def load(port: int) -> None:
    """Open connections that are reset, and many that say nothing; return when they are closed."""
    before, address = threading.active_count(), ("127.0.0.1", port)
    for _ in range(3):
        with socket.create_connection(address) as reset:
            reset.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(150)]
        assert [one.recv(1) for one in silent] == [b""] * 150
    assert threading.active_count() <= before  # those of earlier servers may end meanwhile


def test_the_page_loads_nothing_from_elsewhere() -> None:
    async def test() -> None:
        async with served() as server:
            page = await server.ask(path="/")
            assert page.headers["content-type"].startswith("text/html")
            policy = page.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'") and "unsafe" not in policy
            names = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
            assert names == ["data:,", "page.css", "page.js"]
            for name in names[1:]:
                part = await server.ask(path=f"/{name}")
                assert part.status == 200 and b"://" not in part.body

    run(test())


# Bodies


def test_a_body_that_is_too_large_is_a_413_however_it_says_its_length() -> None:
    async def test() -> None:
        async with served(limits=Limits(max_body=1000)) as server:
            kind, body = form([("image", png() + bytes(1000)), ("prompt", "add a hat")])
            assert (await server.ask("POST", headers=kind, body=[])).status == 413
            del kind["content-length"]
            assert (await server.ask("POST", headers=kind, body=[body])).status == 413
            kind, body = form([("image", png())])
            del kind["content-length"]
            body = body.removesuffix(b"--XX--\r\n") + HEAD + b"user\r\n\r\n"
            endless = chain([body], repeat(bytes(300)))
            assert (await server.ask("POST", headers=kind, body=endless)).status == 413
            lying, endless = {**kind, "content-length": "10"}, chain([body], repeat(bytes(300)))
            assert (await server.ask("POST", headers=lying, body=endless)).status == 413
            both = {**lying, "transfer-encoding": "chunked"}
            reply = await server.ask("POST", headers=both, body=[body])
            assert reply.json["error"]["code"] == "bad_length"
            assert server.application.budget.bytes == 0

    run(test())


def test_a_body_that_trickles_is_a_408() -> None:
    async def test() -> None:
        async with served(limits=Limits(upload_seconds=0.05)) as server:
            kind, body = form([("image", png()), ("prompt", "add a hat")])
            slowly = (part for byte in body for part in (bytes([byte]), 0.01))
            reply = await server.ask("POST", headers=kind, body=slowly)
            assert (reply.status, reply.json["error"]["code"]) == (408, "timeout")

    run(test())


def test_a_client_that_leaves_while_uploading_frees_its_place() -> None:
    async def test() -> None:
        async with served() as server:
            left = asyncio.Event()
            left.set()
            kind, body = form([("image", png()), ("prompt", "add a hat")])
            reply = await server.ask("POST", headers=kind, body=[body[:100]], left=left)
            assert reply.status == 0 and server.application.budget.pictures == 0
            numbers = (await server.ask(path="/metrics")).body.decode()
            assert 'varedit_cancelled_total{when="uploading"} 1.0' in numbers

    run(test())


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_kind_is_a_415(kind: str) -> None:
    async def test() -> None:
        async with served() as server:
            reply = await server.ask("POST", headers={"content-type": kind}, body=[b"x"])
            assert reply.status == 415
            zipped = await server.edit(headers={"content-encoding": "gzip"})
            assert zipped.status == 415

    run(test())


HEAD = b"--XX\r\nContent-Disposition: form-data; name="
FORMS = {
    "no boundary": ("multipart/form-data", b"--XX--\r\n"),
    "a long boundary": ("multipart/form-data; boundary=" + "X" * 10_000, b""),
    "an odd charset": (
        "multipart/form-data; boundary=XX; charset=zlib",
        HEAD + b"x\r\n\r\n\r\n--XX--",
    ),
    "a charset in which nobody writes": (
        "multipart/form-data; boundary=XX; charset=undefined",
        HEAD + b"prompt\r\n\r\na\r\n--XX--",
    ),
    "no text": (None, HEAD + b"prompt\r\n\r\nadd \xe9\r\n--XX--"),
    "no name": (None, b"--XX\r\nContent-Disposition: form-data\r\n\r\nx\r\n--XX--\r\n"),
    "no form": (None, b"hello"),
    "cut off": (None, HEAD + b"prompt\r\n\r\nadd"),
    "many headers": (None, b"--XX\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n--XX--\r\n"),
    "a long header": (None, b"--XX\r\nA: " + b"b" * 10**5 + b"\r\n\r\nx\r\n--XX--\r\n"),
    "many fields": (None, (HEAD + b"user\r\n\r\nx\r\n") * 41 + b"--XX--\r\n"),
    "many files": (None, (HEAD + b"image; filename=a\r\n\r\nx\r\n") * 41 + b"--XX--\r\n"),
    "a long field": (None, HEAD + b"prompt\r\n\r\n" + b"a" * 10**6 + b"\r\n--XX--\r\n"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_malformed_form_is_a_400(name: str) -> None:
    kind, body = FORMS[name]

    async def test() -> None:
        async with served() as server:
            headers = {"content-type": kind or "multipart/form-data; boundary=XX"}
            reply = await server.ask("POST", headers=headers, body=[body])
            assert reply.status == 400, reply.body

    run(test())

"""A whole server with nano's bundle, asked by OpenAI's own client: results, faults, its end."""

import base64
import io
import re
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
import psutil
import pytest
from node import NEEDED, answers
from PIL import Image
from server_process import OPTIONS, PERSON, Process, gone, running, started, until
from serving import form, png

from varedit_runtime import Editor


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running() as started:
        yield started


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def resume(child: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):  # it has ended
        child.resume()


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.tobytes() == other.tobytes()


def test_results_are_those_of_the_editor(server: Process, nano: Editor, tmp_path: Path) -> None:
    reply = server.edit(n=2, seed=3, guidance_scale=[2.0] * 7, negative_prompt="blue")
    told = {"guidance_scale": 2.0, "negative_prompt": "blue"}
    edited = nano.edit(PERSON, "add a hat", seed=3, num_images_per_prompt=2, **told)
    assert [one.seed for one in reply.data] == [3, 4]
    assert all(same(opened(a.b64_json), b.image) for a, b in zip(reply.data, edited, strict=True))
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 128, 64))
    mask.save(tmp_path / "mask.png")
    reply = server.edit(mask=(tmp_path / "mask.png").open("rb"), seed=5, quality="low")
    edited = nano.edit(PERSON, "add a hat", mask=tmp_path / "mask.png", seed=5, fast=True)
    assert same(opened(reply.data[0].b64_json), edited.image)


def test_a_stream_has_previews_and_the_same_result(server: Process) -> None:
    events = list(server.edit(stream=True, partial_images=2, seed=3))
    kinds = [event.type for event in events]
    assert kinds == [*["image_edit.partial_image"] * 2, "image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [opened(event.b64_json).size for event in events] == [(128, 128)] * 3
    assert events[-1].b64_json == server.edit(seed=3).data[0].b64_json
    assert events[-1].usage.output_tokens > 0


def test_the_client_lists_the_model(server: Process) -> None:
    assert [model.id for model in server.client.models.list()] == ["nano"]


@NEEDED
def test_the_client_in_javascript_edits_streams_and_lists(server: Process, nano: Editor) -> None:
    told = answers("edits.js", server.client.base_url, PERSON)
    assert (told["models"], told["retrieved"], told["listed"]) == (["nano"], "nano", 1)
    partial = "image_edit.partial_image"
    kinds = [(kind, index) for kind, index, _ in told["events"]]
    assert kinds == [(partial, 0), (partial, 1), ("image_edit.completed", None)]
    edited = nano.edit(PERSON, "add a hat", seed=3)
    assert same(opened(told["events"][-1][2]), edited.image)
    several = nano.edit(PERSON, "add a hat", seed=3, temperature=[0.5] * 7, num_images_per_prompt=2)
    assert [one["seed"] for one in told["two"]] == [3, 4]
    for one, own in zip(told["two"], several, strict=True):
        assert same(opened(one["b64_json"]), own.image)


def test_an_edit_that_is_admitted_survives_the_death_of_its_process(server: Process) -> None:
    def edited(seed: int) -> str:
        if seed % 2:
            return server.edit(seed=seed).data[0].b64_json
        *partials, last = server.edit(seed=seed, stream=True, partial_images=3)
        assert [event.partial_image_index for event in partials] == [0, 1, 2]
        return last.b64_json

    wanted = [edited(seed) for seed in range(4)]
    first = server.child()
    first.suspend()  # so that all of them have come before the first is done
    with ThreadPoolExecutor(4) as clients:
        edits = [clients.submit(edited, seed) for seed in range(4)]
        until(lambda: "varedit_queue_pictures 0.0" not in server.get("metrics")[1])
        first.kill()
        assert [edit.result() for edit in edits] == wanted
    assert server.child() != first
    assert 'varedit_restarts_total{reason="died"} 1.0' in server.get("metrics")[1]


def test_of_two_processes_a_killed_one_loses_nothing_and_sigterm_drains_both(nano: Editor) -> None:
    def edited(seed: int) -> Image.Image:
        if seed % 2:
            return opened(server.edit(seed=seed).data[0].b64_json)
        *partials, last = server.edit(seed=seed, stream=True, partial_images=3)
        assert [event.partial_image_index for event in partials] == [0, 1, 2]
        return opened(last.b64_json)

    with running("--workers", "2") as server:
        until(lambda: "varedit_workers_ready 2.0" in server.get("metrics")[1])
        children = server.children()
        assert len(children) == 2
        with ThreadPoolExecutor(8) as clients:
            for child in children:  # so that both have an edit when one of them dies
                child.suspend()
            edits = [clients.submit(edited, seed) for seed in range(8)]
            until(lambda: "varedit_queue_pictures 6.0" in server.get("metrics")[1])
            children[0].kill()
            until(lambda: "varedit_workers_ready 1.0" in server.get("metrics")[1])
            assert server.get("readyz")[0] == 200
            resume(children[1])
            for seed, edit in enumerate(edits):
                assert same(edit.result(), nano.edit(PERSON, "add a hat", seed=seed).image)
        until(lambda: "varedit_workers_ready 2.0" in server.get("metrics")[1])
        check_drain(server, nano)


def check_drain(server: Process, nano: Editor) -> None:
    """Check that SIGTERM lets a stream and four results finish, and ends all processes."""
    stream = server.edit(seed=3, stream=True, partial_images=3)
    assert next(iter(stream)).type == "image_edit.partial_image"
    children = server.children()
    for child in children:  # so that what comes next cannot be done before the signal
        child.suspend()
    with ThreadPoolExecutor(1) as clients:
        last = clients.submit(server.edit, n=4, seed=4)
        until(lambda: "varedit_queue_pictures 0.0" not in server.get("metrics")[1])
        server.popen.send_signal(signal.SIGTERM)
        waited = "draining; results that are still waited for: [1-5]"
        until(lambda: re.search(waited, server.said()))
        for child in children:
            resume(child)
        results = [list(stream)[-1], *last.result().data]
    for seed, result in enumerate(results, 3):
        assert same(opened(result.b64_json), nano.edit(PERSON, "add a hat", seed=seed).image)
    assert server.popen.wait(30) == 0 and "drained" in server.said()
    until(lambda: all(map(gone, children)))


def test_more_clients_than_places_are_served_or_told_to_come_again(server: Process) -> None:
    def status(seed: int) -> int:
        try:
            server.edit(seed=seed)
        except openai.APIStatusError as error:
            assert 1 <= int(error.response.headers["retry-after"]) <= 120
            return error.status_code
        return 200

    child = server.child()
    child.suspend()  # so that all of them have come before the first is done
    with ThreadPoolExecutor(24) as clients:
        asked = [clients.submit(status, seed) for seed in range(24)]
        until(lambda: sum(one.done() for one in asked) == 16)
        resume(child)
    assert sorted(one.result() for one in asked) == [200] * 8 + [503] * 16


def raw(server: Process, content: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(30)
    with suppress(ConnectionError):  # the server may have closed it
        connection.sendall(content)
    return connection


def read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(2**20)
    except ConnectionResetError:
        return b""


def head(length: int) -> bytes:
    kind, _ = form([])
    return (
        f"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: {kind['content-type']}\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def test_a_client_that_closes_its_connection_is_cancelled(server: Process) -> None:
    _, body = form([("image", png()), ("prompt", "add a hat"), ("n", "4")])
    before = cancelled(server)
    child = server.child()
    child.suspend()
    connection = raw(server, head(len(body)) + body)
    until(lambda: "varedit_queue_pictures 0.0" not in server.get("metrics")[1])
    connection.close()
    until(lambda: cancelled(server) == before + 1)
    resume(child)
    raw(server, head(len(body)) + body[:50]).close()
    until(lambda: cancelled(server) == before + 2)
    assert server.edit(seed=1).data


def cancelled(server: Process) -> float:
    numbers = server.get("metrics")[1]
    return sum(map(float, re.findall(r"varedit_cancelled_total{.*} (.+)", numbers)))


def test_slow_heads_and_endless_bodies_are_closed(server: Process) -> None:
    asked = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    unread = raw(server, asked * 3000)
    trickling = raw(server, b"GET /livez HTTP/1.1\r\nhost: loc")
    slow = raw(server, head(1000) + b"--XX\r\n")
    too_much = raw(server, head(10**9))
    assert trickling.recv(100) == b""
    assert b" 408 " in slow.recv(4096)
    assert b" 413 " in too_much.recv(4096)
    for refused in (slow, too_much):
        with refused:
            while refused.recv(4096):  # the server waits for the rest only so long
                pass
    answers = b""
    while len(answers) < 10**8 and (part := read(unread)):
        answers += part
    assert answers.count(b"HTTP/1.1 200") < 3000
    trickling.close()
    unread.close()


def test_sigterm_ends_a_server_that_loads_and_a_second_one_a_server_that_edits() -> None:
    with started(*OPTIONS) as loading:
        until(lambda: loading.get("livez")[0] == 200)  # which it answers after it hears signals
        loading.popen.send_signal(signal.SIGTERM)
        assert loading.popen.wait(30) == 0
    with running() as server, ThreadPoolExecutor(1) as clients:
        child = server.child()
        child.suspend()
        edit = clients.submit(server.edit, n=2)  # of which one waits
        until(lambda: "varedit_queue_pictures 0.0" not in server.get("metrics")[1])
        server.popen.send_signal(signal.SIGTERM)
        until(lambda: server.get("readyz")[0] == 503)
        assert "draining" in server.get("readyz")[1]
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(openai.APIConnectionError):
            edit.result()
        until(lambda: gone(child))


def test_no_process_outlives_a_server_that_is_killed() -> None:
    with running() as server, ThreadPoolExecutor(1) as clients:
        child = server.child()
        if sys.platform == "linux":
            child.suspend()  # it cannot end itself
        edit = clients.submit(server.edit, n=4)
        until(lambda: "varedit_queue_pictures 0.0" not in server.get("metrics")[1])
        server.popen.kill()
        with pytest.raises(openai.APIConnectionError):
            edit.result()
        until(lambda: gone(child))

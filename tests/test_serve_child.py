"""The editing process as its parent sees it: started, watched, and replaced."""

import asyncio
import shutil
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from types import SimpleNamespace
from typing import Any

import pytest
from serving import until

from varedit_runtime import EditHandle
from varedit_runtime.backends.auto import AutoBackend, wanted_backend
from varedit_runtime.backends.host import VISIBLE
from varedit_runtime.backends.machine import Gpu, Nvidia
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, BundleError
from varedit_runtime.locate import embedded
from varedit_serve.editing import child, workers
from varedit_serve.editing.child import BatchFailedError, Child, ChildDiedError
from varedit_serve.editing.messages import Opening, Order, Ready
from varedit_serve.editing.worker import Worker, opened
from varedit_serve.editing.workers import local_children

WORKER = Path(__file__).with_name("fake_worker.py")
ORDER = Order(b"", 7, ())


def pauses_of_child(
    monkeypatch: pytest.MonkeyPatch, pause: Callable[[float], Awaitable[None]]
) -> None:
    """Replace asyncio.sleep in that module alone.

    Event loops in other threads, which Ray leaves behind, sleep too.
    """
    replaced = SimpleNamespace(**(vars(asyncio) | {"sleep": pause}))
    monkeypatch.setattr(child, "asyncio", replaced)


class Noted:
    """A listener that notes restarts."""

    def __init__(self, restarts: list[str], facts: Ready | None = None) -> None:
        self.restarts, self.facts = restarts, facts

    def on_restart(self, why: str) -> None:
        self.restarts.append(why)

    def on_ready(self, facts: Ready) -> None:
        self.facts = facts


def make(kind: str, restarts: list[str], facts: Ready | None = None) -> Child:
    opening = Opening(embedded(), None, AutoBackend())
    command = (sys.executable, str(WORKER), kind)
    return Child(opening, Noted(restarts, facts), command)


async def edited(one: Child) -> int:
    await until(lambda: one.ready)
    (result,) = await one.edit([ORDER], lambda *partial: None)
    return result.seed


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("killed", "died"), ("stopped", "silent"), ("stuck", "stuck"), ("nonsense", "died")],
)
def test_a_process_that_fails_at_a_batch_is_replaced(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        restarts: list[str] = []
        one = make(kind, restarts)
        running = asyncio.create_task(one.run())
        await until(lambda: one.ready)
        one._command = (*one._command[:2], "works")
        if kind == "stopped":
            one._patience = 0.0
        elif kind == "stuck":
            monkeypatch.setattr(child, "LEAST_TIME", 0.5)
        with pytest.raises(ChildDiedError):
            await edited(one)
        monkeypatch.undo()
        assert await edited(one) == 7
        assert restarts == [reason]
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await until(lambda: one.pid is None)

    asyncio.run(test())


def test_a_process_that_fails_can_be_replaced_while_it_runs() -> None:
    async def test() -> None:
        restarts: list[str] = []
        one = make("fails", restarts)
        running = asyncio.create_task(one.run())
        with pytest.raises(BatchFailedError, match="no memory"):
            await edited(one)
        one._command = (*one._command[:2], "works")
        one.replace("failed")
        assert await edited(one) == 7
        assert restarts == ["failed"]
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(test())


def test_whatever_fails_at_a_batch_is_told_and_the_process_goes_on() -> None:
    ours, theirs = (Connection(end.detach()) for end in socketpair())
    one = Worker(theirs)
    one._handles[1] = EditHandle()
    one._edit(None, 1, [ORDER])  # type: ignore[arg-type]  # a pickle that is cut off
    assert ours.recv()[:2] == ("failed", 1) and not one._handles


def test_a_bundle_that_cannot_be_opened_ends_the_server() -> None:
    with pytest.raises(BackendError, match="there is no such GPU"):
        asyncio.run(make("unfit", []).run())


def test_a_bundle_that_one_of_several_cannot_open_does_not_end_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU or the memory may have no room for one more, while others serve."""

    async def test() -> None:
        restarts: list[str] = []
        one = make("unfit", restarts, Ready("CUDA", len, 1, 0.1, 1))
        running = asyncio.create_task(one.run())
        await until(lambda: len(restarts) == 2)
        one._command = (*one._command[:2], "works")
        assert await edited(one) == 7
        assert set(restarts) == {"unfit"}
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    pauses_of_child(monkeypatch, lambda seconds: asyncio.sleep(0.01))
    asyncio.run(test())


def shares(
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpus: int = 0,
    named: str | None = None,
    **given: Any,
) -> tuple[set[int | None], list[str | None]]:
    """Return threads and GPUs of so many workers on a machine with 8 cores."""
    found = (Gpu("H100", "sm90", None, None),) * gpus
    monkeypatch.setattr(workers, "nvidia", lambda: Nvidia("580", found))
    monkeypatch.setattr(workers, "cores", lambda: 8)
    monkeypatch.delenv(VISIBLE, raising=False)
    if named is not None:
        monkeypatch.setenv(VISIBLE, named)
    opening = Opening(embedded(), None, wanted_backend(given.pop("backend", "auto"), **given))
    children = local_children(opening, Noted([]), count)
    bundle = Bundle.open(embedded())
    monkeypatch.setattr("varedit_runtime.backends.host.nvidia", lambda: Nvidia(None, ()))
    picked = [one._opening.backend.pick(bundle, bundle.manifest.variants[0]) for one in children]
    threads = {vars(one.options).get("threads") for one in picked}
    return threads, [one._environment.get(VISIBLE) for one in children]


def test_workers_have_cores_and_gpus_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(1, monkeypatch) == ({None}, [None])
    assert shares(3, monkeypatch) == ({2}, [None] * 3)
    assert shares(8, monkeypatch, threads=4) == ({4}, [None] * 8)
    assert shares(9, monkeypatch, provider="cpu") == ({1}, [None] * 9)
    assert shares(2, monkeypatch, provider="cuda", gpus=1)[0] == {None}
    assert shares(3, monkeypatch, gpus=2)[1] == ["0", "1", "0"]
    assert shares(3, monkeypatch, gpus=8, named="5,GPU-a")[1] == ["5", "GPU-a", "5"]
    assert shares(2, monkeypatch, gpus=2, named="")[1] == ["", ""]
    assert shares(2, monkeypatch, backend="tensorrt", gpus=2)[1] == ["0", "1"]


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many files may be open, or memory be short, when another process has to be started."""

    async def test() -> None:
        restarts: list[str] = []
        one = make("works", restarts)
        works = one._command
        running = asyncio.create_task(one.run())
        assert await edited(one) == 7
        one._command = ("/no/such/program",)
        one.replace("failed")
        await until(lambda: len(restarts) > 1)
        one._command = works
        assert await edited(one) == 7
        assert set(restarts[1:]) == {"unfit"}
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    pauses_of_child(monkeypatch, lambda seconds: asyncio.sleep(0.01))
    asyncio.run(test())
    one = make("works", [])
    one._command = ("/no/such/program",)
    with pytest.raises(BackendError, match="no process can be started"):
        asyncio.run(one.run())


def test_a_process_that_dies_while_it_loads_is_started_again_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) >= 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(child, "LONGEST_PAUSE", 5)
    pauses_of_child(monkeypatch, noted)

    async def test() -> None:
        with suppress(asyncio.CancelledError):
            await make("dies", []).run()

    asyncio.run(test())
    assert pauses == [2, 4, 5, 5]


def test_with_a_digest_a_bundle_with_other_bytes_is_not_opened(tmp_path: Path) -> None:
    digest = Bundle.open(embedded()).digest
    copy = tmp_path / "nano"
    shutil.copytree(embedded(), copy)
    (weights,) = copy.glob("**/transformer*")
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="transformer"):
        opened(Opening(copy, None, AutoBackend(), digest))

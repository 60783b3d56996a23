"""The editing process as its parent sees it: started, watched, and replaced."""

import asyncio
import shutil
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

import pytest
from serving import until

from varedit_runtime import EditHandle
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, BundleError
from varedit_runtime.locate import embedded
from varedit_serve.editing import child
from varedit_serve.editing.child import BatchFailedError, Child, ChildDiedError
from varedit_serve.editing.messages import Opening, Order
from varedit_serve.editing.worker import Worker, _open

WORKER = Path(__file__).with_name("fake_worker.py")
ORDER = Order(b"", 7, ())


def make(kind: str, restarts: list[str]) -> Child:
    opening = Opening(embedded(), None, AutoBackend())
    command = (sys.executable, str(WORKER), kind)
    return Child(opening, lambda seconds: None, restarts.append, command)


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

    sleep = asyncio.sleep
    monkeypatch.setattr(child.asyncio, "sleep", lambda seconds: sleep(0.01))
    asyncio.run(test())
    one = make("works", [])
    one._command = ("/no/such/program",)
    with pytest.raises(BackendError, match="no process can be started"):
        asyncio.run(one.run())


def test_a_process_that_dies_while_it_loads_is_started_again_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise asyncio.CancelledError
        await sleep(0)

    monkeypatch.setattr(child, "LONGEST_PAUSE", 5)
    monkeypatch.setattr(child.asyncio, "sleep", noted)

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
        _open(Opening(copy, None, AutoBackend(), digest))

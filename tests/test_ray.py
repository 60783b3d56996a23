"""Edits on Ray: replicas behind a server, lists of pictures with Ray Data, evaluations."""

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from evaluating import own_data
from PIL import Image
from server_process import OPTIONS, PATIENCE, PERSON, started, until
from serving import preparer, served

import varedit_export
from varedit_export.evaluation.case import Wanted, batches
from varedit_export.options import EvaluateOptions
from varedit_runtime import Editor
from varedit_runtime.backends.auto import wanted_backend
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.locate import embedded
from varedit_runtime.terminal.ray_cluster import cluster
from varedit_serve.editing.child import BatchFailedError, ChildDiedError
from varedit_serve.editing.messages import Opening, Order, Ready

pytest.importorskip("ray", reason="the extra ray is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

# Ray would end processes because other programs have filled the memory.
CALM = {"RAY_memory_monitor_refresh_ms": "0"}
CLUSTERS = Path("/tmp")


def descendants(parent: int, name: str) -> list[psutil.Process]:
    """Return the processes below one whose title begins with a name."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if " ".join(process.cmdline()).startswith(name):
                found.append(process)
    return found


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended
            process.kill()


def clusters() -> set[Path]:
    return set(CLUSTERS.glob("ray-*"))


def test_a_cluster_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*given: Any, **options: Any) -> None:
        raise Exception("the node timed out\nduring startup")

    monkeypatch.setattr("ray.init", init)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # of what else is tried here
        monkeypatch.delenv(name, raising=False)
    told = "no Ray cluster can be used on this machine: the node timed out during startup"
    with pytest.raises(BackendError, match=told), cluster(1):
        pass


# A server


def test_a_replica_that_is_killed_under_load_loses_nothing(
    nano: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(seed: int) -> bytes:
        if seed % 2:
            return server.edit(seed=seed).data[0].b64_json
        *partials, last = server.edit(seed=seed, stream=True, partial_images=3)
        assert [event.partial_image_index for event in partials] == [0, 1, 2]
        return last.b64_json

    before = clusters()
    monkeypatch.setenv(*next(iter(CALM.items())))
    with started(*OPTIONS, "--ray", "--workers", "2") as server:
        until(lambda: "varedit_workers_ready 2.0" in server.get("metrics")[1])
        wanted = [server.edit(seed=seed).data[0].b64_json for seed in range(2)]
        replicas = descendants(server.popen.pid, "ray::ServeReplica")
        assert len(replicas) == 2
        if sys.platform == "linux":  # strangers need a token
            assert replicas[0].environ()["RAY_AUTH_MODE"] == "token"
        with ThreadPoolExecutor(8) as clients:
            edits = [clients.submit(edited, seed) for seed in range(8)]
            until(lambda: "varedit_queue_pictures 0.0" not in server.get("metrics")[1])
            replicas[0].kill()  # which has an edit then, as what waits says
            results = [edit.result() for edit in edits]
        assert results[:2] == wanted and len(set(results)) == 8
        until(lambda: "varedit_workers_ready 1.0" in server.get("metrics")[1])
        until(lambda: "varedit_workers_ready 2.0" in server.get("metrics")[1])
        assert replicas[0] not in descendants(server.popen.pid, "ray::ServeReplica")
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(60) == 0
    until(lambda: not [path for path in clusters() - before if path.exists()])


class Response:
    """What a handle of Ray Serve returns. steps: messages, an error to raise, or "waits"."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps, self.cancelled = steps, asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[tuple[Any, ...]]:
        for step in self.steps:
            if isinstance(step, BaseException):
                raise step
            if step == "waits":
                await self.cancelled.wait()
                raise asyncio.CancelledError
            yield step

    def cancel(self) -> None:
        self.cancelled.set()


class Handle:
    def __init__(self, *steps: Any) -> None:
        self.response = Response(steps)
        self.edit = self

    def options(self, stream: bool) -> "Handle":
        return self

    def remote(self, orders: list[Order]) -> Response:
        return self.response


def test_a_lane_tells_failures_apart_as_a_child_does() -> None:
    from varedit_serve.editing.replicas import Fleet

    async def test() -> None:
        async with served() as server:
            fleet = Fleet("x", lambda: None, 3, server.application.queue)  # type: ignore[arg-type,return-value]
            lane, shown = fleet.lanes[0], list[Any]()

            async def edit(*steps: Any) -> Any:
                fleet.handle = Handle(*steps)  # type: ignore[assignment]
                return await lane.edit([], lambda *told: shown.append(told))

            assert await edit(("partial", 0, 0, "image"), ("edited", ["result"])) == ["result"]
            assert shown == [(0, 0, "image")]
            with pytest.raises(ChildDiedError):
                await edit(RuntimeError("the actor died"))
            with pytest.raises(ChildDiedError):
                await edit()
            running = asyncio.create_task(edit("waits"))
            await asyncio.sleep(0)
            lane.cancel()
            with pytest.raises(BatchFailedError, match="cancelled"):
                await running
            running = asyncio.create_task(edit("waits"))
            await asyncio.sleep(0)
            running.cancel()  # the server ends
            with pytest.raises(asyncio.CancelledError):
                await running
            fleet.running = 2
            assert [lane.ready for lane in fleet.lanes] == [True, True, False]
            numbers = (await server.ask(path="/metrics")).body.decode()
            assert 'varedit_restarts_total{reason="died"} 1.0' in numbers

    asyncio.run(test())


def test_a_server_goes_on_while_ray_replaces_what_counts_the_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import RayActorError

    from varedit_serve.editing import replicas

    class Deployed:
        @property
        def facts(self) -> "Deployed":
            return self

        async def remote(self) -> Ready:
            return Ready("CUDA", len, 1, 0.5, 1)

    counts = iter([RayActorError(), 2])

    def count() -> int:
        told = next(counts, 2)
        if isinstance(told, Exception):
            raise told
        return told

    async def test() -> None:
        async with served() as server:
            fleet = replicas.Fleet("x", Deployed, 2, server.application.queue)  # type: ignore[arg-type]
            fleet._count = count  # type: ignore[method-assign]
            watching = asyncio.create_task(fleet.run())
            async with asyncio.timeout(20):
                while fleet.running < 2:
                    assert not watching.done()
                    await asyncio.sleep(0.01)
            watching.cancel()

    monkeypatch.setattr(replicas, "BEAT", 0.01)
    asyncio.run(test())


def test_that_ray_serve_cannot_start_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.exceptions import RayServeException

    from varedit_serve.editing import replicas

    def delete(name: str) -> None:
        raise RayServeException("There is no Serve instance")

    async def test() -> None:
        async with served() as server:
            given = server.application.queue, Opening(embedded(), None, wanted_backend()), "0", 1
            with pytest.raises(BackendError, match="no room"), replicas.fleet(*given, None):
                raise BackendError("no room")

    monkeypatch.setattr(replicas.serve, "delete", delete)
    asyncio.run(test())


def test_behind_rays_proxies_keys_are_needed_unless_only_this_machine_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from varedit_serve import on_ray

    monkeypatch.delenv("VAREDIT_SERVE_KEYS", raising=False)
    asked = {"bundle": embedded(), "allow_host": ["edits.example.org"], "max_n": 2}
    with pytest.raises(ConfigError, match="give API keys"):
        on_ray.settings_of(**on_ray._read(on_ray._words(asked)))
    chosen = on_ray.settings_of(**on_ray._read(on_ray._words({**asked, "host": "127.0.0.1"})))
    assert (chosen["limits"].max_n, "edits.example.org" in chosen["hosts"]) == (2, True)


def order(seed: int, previews: tuple[int, ...] = ()) -> Order:
    edit = preparer().prepare(Image.open(PERSON), "add a hat", seed=0)
    return Order(pickle.dumps(edit), seed, previews)


def test_a_replica_edits_is_cancelled_and_tells_when_it_is_stuck_or_damaged(
    nano: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from varedit_serve.editing import replicas

    ended: list[int] = []
    monkeypatch.setattr(replicas.os, "_exit", ended.append)
    opening = Opening(embedded(), None, wanted_backend(threads=1))

    async def test() -> None:
        with pytest.raises(replicas.BundleError, match="another bundle"):
            replicas.Replica(opening, "0")
        replica = replicas.Replica(opening, nano.bundle.digest)
        told = [message async for message in replica.edit([order(3, (1, 4))])]
        assert [message[:3] for message in told[:2]] == [("partial", 0, 0), ("partial", 0, 1)]
        wanted = nano.edit(PERSON, "add a hat", seed=3).image
        assert told[2][1][0].image.tobytes() == wanted.tobytes()
        replica.check_health()
        monkeypatch.setattr(replicas, "patience", lambda *_: -1.0)
        edits = replica.edit([order(3, (0,)), order(4, (0,))])
        assert (await anext(edits))[0] == "partial"
        with pytest.raises(TimeoutError):
            replica.check_health()
        await edits.aclose()  # type: ignore[attr-defined]  # its client has left
        replica.check_health()
        damaged = asyncio.ensure_future(anext(replica.edit([Order(b"", 0, ())])))
        async with asyncio.timeout(20):
            while not ended:
                await asyncio.sleep(0.01)
        damaged.cancel()

    asyncio.run(test())


# Lists of pictures


EDIT = ("varedit_runtime", "photos", "red", "-o", "out", "--seed", "3", "--bundle", "nano")


def test_what_a_dead_process_took_with_it_runs_alone_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from varedit_runtime.commands import on_ray

    passes = list[tuple[list[int], bool]]()

    def outcomes(known: Any, orders: Any, keys: Any, alone: bool) -> Iterator[tuple[int, Any]]:
        passes.append((list(orders), alone))
        for place in list(orders):
            if place == 0 or (alone and place == 1):
                yield place, on_ray._Read(orders[place], "key")

    results = Mock()
    monkeypatch.setattr(on_ray, "_outcomes", outcomes)
    assert on_ray._pass(Mock(), results, dict.fromkeys(range(3), Mock()), frozenset()) == {}
    assert passes == [([0, 1, 2], False), ([1, 2], True)]
    ((place, _, error),) = [call.args for call in results.told.failed.call_args_list]
    assert place == 2 and "died 4 times" in str(error)


def test_that_a_bundle_cannot_be_opened_or_that_ray_fails_is_told_in_one_line(
    nano: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas
    from ray.exceptions import RaySystemError

    from varedit_runtime.commands import on_ray

    job = Mock()
    job.open.side_effect = BackendError("too little memory")
    batch = pandas.DataFrame({"place": [0, 1], "told": [pickle.dumps(None)] * 2})
    editing = on_ray._Editing(job, Mock(), "0")
    (first, second) = map(pickle.loads, editing(batch)["told"])
    monkeypatch.setattr(on_ray, "_outcomes", lambda *_: iter([(0, first), (1, second)]))
    with pytest.raises(BackendError, match="too little memory"):
        on_ray._pass(Mock(), Mock(), {0: Mock(), 1: Mock()}, frozenset())

    monkeypatch.undo()
    rows, known = Mock(), Mock(bundle=nano.bundle, variant=nano.variant)
    rows.map.return_value.map_batches.return_value.iter_rows.side_effect = RaySystemError("x\ny")
    monkeypatch.setattr(on_ray, "from_items", lambda *_, **__: rows)
    monkeypatch.setattr(on_ray, "resources", lambda backend: {"num_cpus": 1.0, "num_gpus": 0.0})
    monkeypatch.setattr(on_ray, "most_editors", lambda *_, **__: 1)
    monkeypatch.setattr(on_ray, "replace", lambda job, **_: job)
    with pytest.raises(BackendError, match=r"Ray cannot go on: .*x y"):
        list(on_ray._outcomes(known, {}, frozenset(), False))


@contextmanager
def started_run(folder: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a command in a folder; it is ended when it takes too long."""
    command = [sys.executable, "-m", *words, "--ray"]
    environment = {**os.environ, **CALM}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe)
    late = Timer(2 * PATIENCE, process.kill)
    late.start()
    try:
        yield process
    finally:
        late.cancel()
        process.kill()
        process.wait(PATIENCE)


def test_a_run_that_was_ended_goes_on_and_a_killed_process_has_each_result_once(
    nano: Editor, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.new("RGB", (32, 24), (number * 15, 90, 30)).save(
            tmp_path / "photos" / f"{number:02}.png"
        )
    (tmp_path / "photos" / "16.png").write_bytes(b"no picture")
    with started_run(tmp_path, *EDIT, "--json") as first:
        assert first.stdout is not None
        told = [json.loads(next(first.stdout)) for _ in range(4)]
        first.send_signal(signal.SIGINT)
        told += map(json.loads, first.stdout)
        assert first.wait(PATIENCE) == 130
    done = {line["output"] for line in told if "error" not in line}
    assert 3 <= len(done) < 16
    (tmp_path / sorted(done)[0]).unlink()

    lines: list[dict[str, Any]] = []
    with started_run(tmp_path, *EDIT, "--json") as second:
        assert second.stdout is not None
        for text in second.stdout:
            lines.append(json.loads(text))
            if sum("finished_before" not in line for line in lines) == 3:
                kill_all(descendants(second.pid, "ray::MapWorker"))
        assert second.wait(PATIENCE) == 1  # one is no picture
    assert [line["input"] for line in lines if "error" in line] == ["photos/16.png"]
    outputs = [line["output"] for line in lines if "error" not in line]
    assert sorted(outputs) == [f"out/{number:02}-edited.png" for number in range(16)]
    before = {line["output"] for line in lines if "finished_before" in line}
    assert before == done - {sorted(done)[0]}
    written = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert written == [f"{number:02}-edited.png" for number in range(16)]
    with Image.open(tmp_path / "out" / "07-edited.png") as result:
        wanted = nano.edit(tmp_path / "photos" / "07.png", "red", seed=3).image
        assert result.tobytes() == wanted.tobytes()
    assert {line["backend"] for line in lines if "backend" in line} == {"onnxruntime"}


# Evaluations


def test_an_evaluation_goes_on_on_ray_to_the_report_of_one_process(tmp_path: Path) -> None:
    """Its processes are killed, and the edits that it had before are not made again."""
    data, backend = own_data(tmp_path / "data", 10), wanted_backend(threads=1)
    options = EvaluateOptions("folder", tmp_path / "one", data, guidance_scale=1, backend=backend)
    varedit_export.evaluate(embedded(), options)
    varedit_export.evaluate(embedded(), replace(options, output=tmp_path / "ray", limit=2))
    edits = tmp_path / "ray/edits.jsonl"
    begun = edits.read_bytes()
    words = ("evaluate", "nano", "--benchmark", "folder", "--data", "data", "-o", "ray")
    with started_run(
        tmp_path, "varedit_export", *words, "--guidance-scale", "1", "--threads", "1"
    ) as run:
        until(lambda: len(edits.read_bytes().splitlines()) > 3)
        processes = descendants(run.pid, "ray::_Editing")
        assert processes
        kill_all(processes)
        assert run.wait(PATIENCE) == 0
    assert edits.read_bytes().startswith(begun) and len(edits.read_bytes().splitlines()) == 10
    for name in ("report.json", "report.html"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


class Actor:
    """A process of a cluster as the driver sees it; its references are its outcomes."""

    def __init__(self, outcome: Callable[[list[Wanted]], Any]) -> None:
        self.edit, self.remote = self, lambda batch: (self, outcome(batch))


def test_batches_go_to_processes_that_are_ready_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    from varedit_export.evaluation import on_ray

    def get(reference: tuple[Actor, Any]) -> Any:
        if isinstance(reference[1], ActorDiedError | RayTaskError):
            raise reference[1]
        return reference[1]

    def wait(references: list[tuple[Actor, Any]], num_returns: int) -> tuple[list[Any], list[Any]]:
        return [one for one in references if one[0] is not starting][:num_returns], []

    monkeypatch.setattr(on_ray.ray, "get", get)
    monkeypatch.setattr(on_ray.ray, "wait", wait)
    dies, starting, ready = (
        ActorDiedError(),
        Actor(lambda batch: ()),
        Actor(lambda batch: (*[one.seed for one in batch],)),
    )
    wanted = [Wanted(place, Image.new("RGB", (8, 8)), "red", 10 + place) for place in range(5)]
    made = list(on_ray._spread([starting, ready], batches(wanted, 2)))
    assert [(one.place, seed) for one, seed in made] == [(n, 10 + n) for n in range(5)]
    deadly = Actor(lambda batch: dies if wanted[1] in batch else (*[one.seed for one in batch],))
    made = {one.place: seed for one, seed in on_ray._spread([deadly], batches(wanted, 2))}
    assert made == {0: 10, 1: "the process that edited it died 4 times", 2: 12, 3: 13, 4: 14}
    raised = RayTaskError("edit", "a traceback", RuntimeError("no such operator"))
    for outcome, told in (
        (BackendError("no room"), "no room"),
        (dies, "opens the bundle died 4 times"),
        (raised, "a process that edits failed: no such operator"),
    ):
        failing = Actor(lambda batch, outcome=outcome: outcome)
        with pytest.raises(BackendError, match=told):
            list(on_ray._spread([failing], batches(wanted, 2)))

"""Pictures that wait: batches, several results, faults, deadlines, clients that leave, room."""

import asyncio
import io
import re
from collections.abc import Coroutine
from typing import Any

import pytest
from PIL import Image, ImageOps
from serving import Reply, Server, form, logged, png, served, until

from varedit_runtime.errors import ConfigError
from varedit_serve.answering.moderation import Everything, find_moderation
from varedit_serve.editing.child import BatchFailedError, ChildDiedError
from varedit_serve.editing.messages import Order, Ready
from varedit_serve.limits import Limits

PREVIEWS = ("stream", "true"), ("partial_images", "3")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def seeded(server: Server, *seeds: int, prompt: str = "add a hat") -> list[asyncio.Task[Reply]]:
    edits = [server.edit(("seed", str(seed)), ("prompt", prompt)) for seed in seeds]
    return [asyncio.create_task(edit) for edit in edits]


def facts(seconds: float) -> Ready:
    return Ready("CUDA", lambda edit: len(edit.prompt), 4, seconds, 4)


async def blocked(server: Server) -> asyncio.Task[Reply]:
    """Let a first edit run, behind which others wait."""
    (first,) = seeded(server, 0)
    await until(lambda: server.child.batches)
    return first


def waiting(server: Server) -> int:
    return len(server.application.queue._waiting)


def test_edits_of_one_group_share_a_batch_and_others_do_not() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            first = await blocked(server)
            edits = seeded(server, 1, 2, prompt="add a red hat")
            edits += seeded(server, 3, 4, 5, 6, 7)
            await until(lambda: waiting(server) == 7)
            server.child.gate.set()
            replies = await asyncio.gather(first, *edits)
            assert [r.json["data"][0]["seed"] for r in replies] == [*range(8)]
            alone, *batches = map(sorted, server.child.batches)  # threads decide on the order
            assert alone == [0] and [1, 2] in batches
            assert sorted(map(len, batches)) == [1, 2, 4]

    run(test())


def test_a_batch_can_be_smaller_than_the_graphs() -> None:
    async def test() -> None:
        async with served(waits=True, largest=2) as server:
            first = await blocked(server)
            edits = seeded(server, 1, 2, 3)
            await until(lambda: waiting(server) == 3)
            server.child.gate.set()
            await asyncio.gather(first, *edits)
            assert [len(batch) for batch in server.child.batches] == [1, 2, 1]

    run(test())


def test_several_results_have_successive_seeds_in_order() -> None:
    async def test() -> None:
        async with served() as server:
            reply = await server.edit(("n", "4"))
            seeds = [one["seed"] for one in reply.json["data"]]
            assert seeds == [*range(seeds[0], seeds[0] + 4)]
            other = await server.edit()
            assert other.json["data"][0]["seed"] not in seeds

    run(test())


def test_a_batch_whose_process_dies_runs_again_alone_with_the_same_seeds() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            first = await blocked(server)
            edits = seeded(server, 1, 2, 3)
            await until(lambda: waiting(server) == 3)
            deaths = [ChildDiedError()]
            server.child.fail = lambda orders: deaths.pop() if len(orders) > 1 and deaths else None
            server.child.gate.set()
            replies = await asyncio.gather(first, *edits)
            assert [r.status for r in replies] == [200] * 4
            _, together, *alone = server.child.batches
            assert sorted(together) == [1, 2, 3] and alone == [[seed] for seed in together]

    run(test())


def test_only_the_picture_that_kills_the_process_fails() -> None:
    async def test(error: Exception, replaced: int) -> None:
        async with served(waits=True) as server:
            first = await blocked(server)
            edits = seeded(server, 1, 2, 3)
            await until(lambda: waiting(server) == 3)
            server.child.fail = lambda orders: error if any(o.seed == 2 for o in orders) else None
            server.child.gate.set()
            replies = await asyncio.gather(first, *edits)
            assert [r.status for r in replies] == [200, 200, 500, 200]
            assert replies[2].headers["x-should-retry"] == "false"
            assert "secret" not in replies[2].body.decode()
            assert server.application.budget.pictures == 0
            # What fails is judged in another process, and once more is enough.
            assert server.child.replaced == ["failed"] * replaced
            assert sorted(server.child.batches[1]) == [1, 2, 3]
            assert [2] in server.child.batches[2:]

    run(test(ChildDiedError(), 0))
    run(test(BatchFailedError("secret"), 1))
    run(test(BatchFailedError("secret", own=True), 0))


def test_what_shared_a_batch_with_an_edit_that_has_no_picture_may_still_lose_its_process() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            first = await blocked(server)
            edits, dying = seeded(server, 1, 2, 3), {1, 3}
            await until(lambda: waiting(server) == 3)

            def fail(orders: list[Order]) -> Exception | None:
                if any(order.seed == 2 for order in orders):
                    return BatchFailedError("not finite", own=True)
                if (seed := orders[0].seed) in dying:  # each once
                    dying.remove(seed)
                    return ChildDiedError()
                return None

            server.child.fail = fail
            server.child.gate.set()
            replies = await asyncio.gather(first, *edits)
            assert [r.status for r in replies] == [200, 200, 500, 200]
            assert server.child.batches.count([2]) == 1  # it would fail again

    run(test())


def test_a_suspect_whose_client_leaves_does_not_end_the_process() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            child, left = server.child, asyncio.Event()
            errors = [BatchFailedError("cancelled"), ChildDiedError()]
            child.fail = lambda orders: errors.pop()
            leaving = asyncio.create_task(server.edit(left=left))
            await until(lambda: child.batches)
            gate, child.gate = child.gate, asyncio.Event()
            gate.set()
            await until(lambda: len(child.batches) == 2)
            left.set()
            await leaving
            await until(lambda: not errors)
            assert (child.cancelled, child.replaced) == (1, [])

    run(test())


def test_no_preview_comes_twice_when_an_edit_runs_again() -> None:
    async def test() -> None:
        async with served() as server:
            deaths = [ChildDiedError()]
            server.child.fail = lambda orders: deaths.pop() if deaths else None
            reply = await server.edit(*PREVIEWS)
            kinds = [(e["type"], e.get("partial_image_index")) for e in reply.events]
            partials = [("image_edit.partial_image", index) for index in range(3)]
            assert kinds == [*partials, ("image_edit.completed", None)]
            assert len(server.child.batches) == 2

    run(test())


def test_a_stream_that_fails_ends_with_an_error_and_one_without_events_has_a_status() -> None:
    async def test() -> None:
        async with served() as server:
            server.child.fail = lambda orders: ChildDiedError()
            reply = await server.edit(*PREVIEWS)
            assert reply.status == 200 and reply.events[-1]["error"]["code"] == "edit_failed"
            assert (await server.edit(("stream", "true"))).status == 500

    run(test())


def test_past_its_deadline_an_edit_is_a_503_and_is_cancelled() -> None:
    async def test() -> None:
        async with served(waits=True, limits=Limits(deadline=0.05)) as server:
            reply = await server.edit()
            assert reply.status == 503 and reply.json["error"]["code"] == "deadline"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            assert server.child.cancelled == 1

    run(test())


def test_a_client_that_leaves_is_cancelled_while_waiting_and_while_running() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            left = asyncio.Event(), asyncio.Event()
            running = asyncio.create_task(server.edit(left=left[0]))
            await until(lambda: server.child.batches)
            also = asyncio.create_task(server.edit(left=left[1]))
            await until(lambda: waiting(server) == 1)
            left[1].set()
            assert (await also).status == 0
            assert server.child.cancelled == 0 and waiting(server) == 0
            left[0].set()
            assert (await running).status == 0
            assert server.child.cancelled == 1
            numbers = (await server.ask(path="/metrics")).body.decode()
            assert 'varedit_cancelled_total{when="waiting"} 1.0' in numbers
            assert 'varedit_cancelled_total{when="running"} 1.0' in numbers

    run(test())


def test_one_of_a_batch_that_leaves_does_not_end_the_others() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            first, left = await blocked(server), asyncio.Event()
            edits = seeded(server, 1, 2, 3)
            leaving = asyncio.create_task(server.edit(("seed", "9"), left=left))
            await until(lambda: waiting(server) == 4)
            gate, server.child.gate = server.child.gate, asyncio.Event()
            gate.set()
            await until(lambda: len(server.child.batches) == 2)
            left.set()
            assert (await leaving).status == 0
            assert server.child.cancelled == 0
            server.child.gate.set()
            replies = await asyncio.gather(first, *edits)
            assert [r.json["data"][0]["seed"] for r in replies] == [0, 1, 2, 3]

    run(test())


def test_a_stream_whose_reader_leaves_between_previews_is_cancelled() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            left = asyncio.Event()
            streaming = asyncio.create_task(server.edit(*PREVIEWS, left=left))
            await until(lambda: server.child.batches)
            left.set()
            reply = await streaming
            assert reply.status in (0, 200) and server.child.cancelled == 1
            assert server.application.budget.pictures == 0

    run(test())


def test_a_full_queue_is_a_503_and_has_room_again() -> None:
    async def test() -> None:
        async with served(waits=True, limits=Limits(max_queue=3)) as server:
            edits = [await blocked(server), *seeded(server, 1)]
            await until(lambda: waiting(server) == 1)
            full = await server.edit(("n", "2"))
            assert full.status == 503 and full.json["error"]["code"] == "full"
            assert int(full.headers["retry-after"]) >= 1
            edits += seeded(server, 2)
            await until(lambda: server.application.budget.pictures == 3)
            assert (await server.edit()).status == 503
            server.child.gate.set()
            assert [r.status for r in await asyncio.gather(*edits)] == [200] * 3
            assert (await server.edit()).status == 200
            assert (server.application.budget.pictures, server.application.budget.bytes) == (0, 0)

    run(test())


def test_room_in_bytes_is_bounded_before_a_body_is_read() -> None:
    async def test() -> None:
        limits = Limits(max_body=10_000, max_queue_bytes=15_000)
        async with served(limits=limits) as server:
            kind, body = form([("image", png()), ("prompt", "add a hat")])
            del kind["content-length"]  # it may then have as many bytes as a body may have
            arriving = asyncio.create_task(server.ask("POST", headers=kind, body=[0.05, body]))
            await until(lambda: server.application.budget.bytes)
            reply = await server.ask("POST", headers=kind, body=[body])
            assert reply.status == 503 and reply.json["error"]["code"] == "full"
            # A prepared edit of nano has 49 kB, for which there never is room.
            assert (await arriving).status == 413
            assert server.application.budget.bytes == 0

    run(test())


def test_a_stream_in_which_the_server_fails_ends_with_an_error() -> None:
    class Broken(Everything):
        def result(self, image: Image.Image) -> None:
            if image.getpixel((0, 0)) == (1, 0, 0):
                raise RuntimeError("secret")

    async def test() -> None:
        async with served(moderation=Broken()) as server:
            *partials, error = (await server.edit(*PREVIEWS)).events
            assert [event["partial_image_index"] for event in partials] == [0]
            assert error["error"]["code"] == "server_error" and "secret" not in str(error)

    run(test())


class Judge:
    def prompt(self, text: str) -> str | None:
        return "no hats" if "hat" in text else None

    def result(self, image: Image.Image) -> str | None:
        return "too red" if image.getpixel((0, 0)) == (2, 0, 0) else None


@pytest.mark.parametrize("stream", ["true", "false"])
def test_an_answer_holds_its_bytes_and_no_place_until_it_is_read(stream: str) -> None:
    async def test() -> None:
        async with served() as server:
            kind, body = form([("image", png()), ("prompt", "a hat"), ("stream", stream)])
            budget, reads = server.application.budget, asyncio.Event()
            asking = asyncio.create_task(server.ask("POST", headers=kind, body=[body], reads=reads))
            await until(lambda: server.child.batches and not budget.pictures)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not asking.done() and budget.bytes
            reads.set()
            reply = await asking
            assert reply.status == 200 and reply.body and budget.bytes == 0

    run(test())


def test_an_answer_that_is_read_slowly_holds_its_source_and_mask() -> None:
    part = io.BytesIO()
    ImageOps.expand(Image.new("L", (300, 300), 255), 150).save(part, "PNG")

    async def test() -> None:
        async with served() as server:
            fields = [("image", png(600)), ("mask", part.getvalue()), ("prompt", "a hat")]
            kind, body = form([*fields, ("output_format", "jpeg")])
            budget, reads = server.application.budget, asyncio.Event()
            asking = asyncio.create_task(server.ask("POST", headers=kind, body=[body], reads=reads))
            await until(lambda: server.child.batches and not budget.pictures)
            assert not asking.done() and budget.bytes > 600 * 600 * (4 + 1)  # source, mask
            reads.set()
            assert (await asking).status == 200 and budget.bytes == 0

    run(test())


def test_results_are_counted_before_they_are_made() -> None:
    """They have 4 bytes a pixel, which may be far more than the edit itself has."""

    async def test() -> None:
        async with served(waits=True, limits=Limits(max_queue_bytes=5_000_000)) as server:
            large = ("image", png(600))
            first = asyncio.create_task(server.edit(large, ("n", "2")))
            await until(lambda: server.child.batches)
            full = await server.edit(large, ("n", "2"))
            assert full.status == 503 and full.json["error"]["code"] == "full"
            assert (await server.edit(large, ("n", "4"))).status == 413  # it is no use to wait
            server.child.gate.set()
            assert (await first).status == 200
            assert server.application.budget.bytes == 0

    run(test())


def test_memory_counts_what_a_result_takes_from_its_source() -> None:
    async def test() -> None:
        async with served(waits=True) as server:
            edit = asyncio.create_task(server.edit(("image", png(600, "RGBA"))))
            await until(lambda: server.child.batches)
            assert server.application.budget.bytes > 600 * 600 * (4 + 1)  # a result, its alpha
            server.child.gate.set()
            assert (await edit).status == 200

    run(test())


def test_moderation_judges_texts_previews_and_results() -> None:
    async def test() -> None:
        async with served(moderation=Judge()) as server:
            reply = await server.edit()
            assert reply.blamed == (400, "prompt") and "no hats" in reply.body.decode()
            assert reply.json["error"]["code"] == "moderation_blocked"
            flower = ("prompt", "add a flower")
            assert (await server.edit(flower, ("negative_prompt", "hat"))).blamed[0] == 400
            assert (await server.edit(flower, ("seed", "1"))).status == 200
            assert (await server.edit(flower, ("seed", "2"))).blamed == (400, None)
            events = (await server.edit(flower, *PREVIEWS)).events
            assert [event.get("partial_image_index") for event in events] == [0, 1, None]
            assert events[-1]["error"]["code"] == "moderation_blocked"
        async with served(moderation=Judge(), waits=True) as server:
            events = (await server.edit(flower, *PREVIEWS)).events
            assert events[-1]["error"]["code"] == "moderation_blocked"
            assert server.child.cancelled == 1
            numbers = (await server.ask(path="/metrics")).body.decode()  # nobody has left
            assert not re.search(r"varedit_cancelled_total{.*} [1-9]", numbers)

    run(test())


def test_moderation_must_be_importable() -> None:
    for name in ("nothing", "nowhere:judge", "math:pi", f"{__name__}:nothing"):
        with pytest.raises(ConfigError, match=name):
            find_moderation(name)
    assert find_moderation(f"{__name__}:Judge") is Judge


# Several processes


def test_several_processes_share_what_waits() -> None:
    async def test() -> None:
        async with served(waits=True, children=2) as server:
            queue, (one, two) = server.application.queue, server.children
            first, second = [await blocked(server)], seeded(server, 1)
            await until(lambda: two.batches)
            edits = first + second + seeded(server, 2, 3, 4, 5, 6)
            await until(lambda: waiting(server) == 5)
            assert queue.retry_after() == 7 * 0.5 / 2
            one.gate.set()  # what waits is its alone, as the other has not done
            replies = await asyncio.gather(first[0], *edits[2:])
            two.gate.set()
            assert [r.status for r in [*replies, await second[0]]] == [200] * 7
            assert sorted(map(len, one.batches)) == [1, 1, 4] and two.batches == [[1]]

    run(test())


def test_idle_processes_divide_a_batch() -> None:
    async def test() -> None:
        async with served(waits=True, children=2) as server:
            for child in server.children:
                child.ready = False
            edits = seeded(server, 1, 2, 3)
            await until(lambda: waiting(server) == 3)
            for child in server.children:
                child.ready = True
            server.application.queue.on_ready(facts(0.5))
            await until(lambda: all(child.batches for child in server.children))
            for child in server.children:
                child.gate.set()
            await asyncio.gather(*edits)
            assert sorted(len(child.batches[0]) for child in server.children) == [1, 2]

    run(test())


def test_one_of_several_that_dies_loses_nothing_and_suspects_run_alone() -> None:
    async def test() -> None:
        async with served(waits=True, children=2) as server:
            one, two = server.children
            edits = [await blocked(server), *seeded(server, 1)]
            await until(lambda: two.batches)
            edits += seeded(server, 2, 3, 4)
            await until(lambda: waiting(server) == 3)
            one.ready = False
            one.fail = lambda orders: ChildDiedError()
            one.gate.set()
            await until(lambda: waiting(server) == 4)
            numbers = (await server.ask(path="/metrics")).body.decode()
            assert "varedit_workers_ready 1.0" in numbers
            assert (await server.ask(path="/readyz")).status == 200
            two.gate.set()
            assert [r.status for r in await asyncio.gather(*edits)] == [200] * 5
            assert one.batches == [[0]] and two.batches[:2] == [[1], [0]]  # the suspect, alone
            assert sorted(two.batches[2]) == [2, 3, 4]
            two.ready = False
            assert (await server.ask(path="/readyz")).json["error"]["code"] == "restarting"

    run(test())


def test_one_that_has_nothing_to_do_takes_what_another_has_lost_at_once() -> None:
    """Its process may need minutes to load again."""

    async def test() -> None:
        async with served(waits=True, children=2) as server:
            (one, two), first = server.children, await blocked(server)
            one.ready, one.fail = False, lambda orders: ChildDiedError()
            two.gate.set()
            one.gate.set()
            await until(lambda: two.batches)
            assert (await first).status == 200 and two.batches == [[0]]

    run(test())


def test_of_several_only_the_one_whose_client_has_left_is_cancelled() -> None:
    async def test() -> None:
        async with served(waits=True, children=2) as server:
            one, two = server.children
            first, left = await blocked(server), asyncio.Event()
            leaving = asyncio.create_task(server.edit(("seed", "1"), left=left))
            await until(lambda: two.batches)
            left.set()
            await leaving
            assert (one.cancelled, two.cancelled) == (0, 1)
            one.gate.set()
            assert (await first).status == 200

    run(test())


def test_draining_and_loading_admit_nothing() -> None:
    async def test() -> None:
        async with served() as server:
            server.child.ready = False
            reply = await server.ask(path="/readyz")
            assert (reply.status, reply.json["error"]["code"]) == (503, "restarting")
            server.application.draining = True
            for reply in (await server.ask(path="/readyz"), await server.edit()):
                assert (reply.status, reply.json["error"]["code"]) == (503, "draining")
            server.application.draining, server.application.queue.facts = False, None
            for reply in (await server.ask(path="/readyz"), await server.edit()):
                assert (reply.status, reply.json["error"]["code"]) == (503, "loading")
            assert (await server.ask(path="/livez")).status == 200

    run(test())


def test_edits_that_take_longer_than_the_deadline_are_warned_of() -> None:
    async def test(lines: list[str]) -> None:
        async with served(waits=True, limits=Limits(deadline=60.0)) as server:
            queue = server.application.queue
            queue.on_ready(facts(59.0))
            assert not lines
            queue.on_ready(facts(61.0))
            (told,) = lines
            assert told == "an edit takes 61 s and --deadline is 60 s: no request will be answered"
            jobs = seeded(server, 1)
            await until(lambda: bool(server.child.batches))
            assert queue.retry_after() == 61
            server.child.gate.set()
            await asyncio.gather(*jobs)

    with logged() as lines:
        run(test(lines))

"""What a server counts of its requests, and what it never tells of them."""

import asyncio
import io
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from random import Random

from PIL import Image
from serving import EDITS, Reply, Server, form, logged, png, served, until

from varedit_serve.editing.child import BatchFailedError, ChildDiedError
from varedit_serve.keys import read_keys
from varedit_serve.limits import Limits

KEY, CANARY = "sk-0123456789abcdef", "canary-7f3a"
ME = {"authorization": f"Bearer {KEY}"}


def picture() -> bytes:
    """Return a picture that has the canary in its metadata."""
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = CANARY
    Image.new("RGB", (24, 24), "red").save(content, "JPEG", exif=exif, comment=CANARY)
    return content.getvalue()


async def leaves(server: Server, random: Random) -> Reply:
    """Leave while the request arrives, waits or runs."""
    left = asyncio.Event()
    kind, body = form([("image", png()), ("prompt", CANARY)])
    if random.random() < 0.5:
        left.set()
        return await server.ask("POST", EDITS, {**kind, **ME}, [body[:100]], left)
    asyncio.get_running_loop().call_later(random.random() / 50, left.set)
    return await server.ask("POST", EDITS, {**kind, **ME}, [body], left)


async def asks_json(server: Server, random: Random) -> Reply:
    data = "data:image/png;base64," + b64encode(png()).decode()
    asked = {"image": data, "prompt": CANARY, random.choice(["seed", "n", "promt"]): 1}
    kind = {"content-type": "application/json", **ME}
    return await server.ask("POST", EDITS, kind, [json.dumps(asked).encode()])


KINDS: list[Callable[[Server, Random], Awaitable[Reply]]] = [
    leaves,
    asks_json,
    lambda server, random: server.edit(("prompt", CANARY), headers=ME),
    lambda server, random: server.edit(("n", "3"), ("negative_prompt", CANARY), headers=ME),
    lambda server, random: server.edit(("stream", "true"), ("partial_images", "2"), headers=ME),
    lambda server, random: server.edit(("image", picture()[: random.randint(1, 800)]), headers=ME),
    lambda server, random: server.edit(("prompt", CANARY * random.randint(50, 5000)), headers=ME),
    lambda server, random: server.edit(("prompt", CANARY), ("mask", picture()), headers=ME),
    lambda server, random: server.edit(headers={"authorization": f"Bearer {CANARY}-{KEY}"}),
    lambda server, random: server.edit(("user", CANARY), ("size", "1x1"), headers=ME),
    lambda server, random: server.ask("POST", EDITS, {**ME, "content-length": str(10**9)}),
    lambda server, random: server.ask("POST", EDITS, {**ME, "content-type": CANARY}, [b"x"]),
]


def test_fuzz_numbers_add_up_and_nothing_private_is_told(
    cases: Callable[[int], Iterator[Random]],
) -> None:
    async def test(lines: list[str]) -> None:
        limits = Limits(max_queue=4, deadline=5.0)
        async with served(keys=read_keys(None, f"me {KEY}"), limits=limits) as server:
            failures = [ChildDiedError(), BatchFailedError("no memory"), None, None]
            chance = Random(0)
            server.child.fail = lambda orders: chance.choice(failures)
            places = asyncio.Semaphore(3)

            async def asked(random: Random) -> Reply:
                async with places:
                    reply = await random.choice(KINDS)(server, random)
                    if reply.status == 503:
                        await until(lambda: server.application.budget.pictures < 2)
                    return reply

            replies = await asyncio.gather(*map(asked, cases(150)))
            await until(lambda: not server.application.budget.pictures)
            numbers = (await server.ask(path="/metrics", headers=ME)).body.decode()
        check_numbers(numbers, replies, lines)
        refusals = [reply.body.decode() for reply in replies if reply.status >= 400]
        headers = [str(reply.headers) for reply in replies]
        for said in (*refusals, *headers, *lines):
            assert not any(secret in said for secret in (CANARY, KEY, "/root", ".py", "Traceback"))

    with logged() as lines:
        asyncio.run(test(lines))


def check_numbers(numbers: str, replies: list[Reply], lines: list[str]) -> None:
    seen = Counter(str(reply.status or "left") for reply in replies)
    assert set(seen) >= {"200", "400", "401", "413", "415", "500", "503", "left"}, seen
    told = re.findall(
        r'varedit_requests_total{path="/v1/images/edits",status="(.+)"} (.+)', numbers
    )
    assert {status: int(float(count)) for status, count in told if float(count)} == seen
    logs = Counter(found[1] for found in map(re.compile(r"status=(\w+)").search, lines) if found)
    assert logs == seen
    cancelled = re.findall(r"varedit_cancelled_total{.*} (.+)", numbers)
    assert sum(map(float, cancelled)) >= seen["left"]
    assert f"varedit_edit_request_seconds_count {float(seen['200'])}" in numbers

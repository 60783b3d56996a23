"""The fields of an edit: what is read, what is refused, and that the field at fault is named."""

import asyncio
import io
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from PIL import Image
from serving import EDITS, Fields, Reply, form, png, preparer, served

from varedit_serve.errors import ApiError
from varedit_serve.fields import LARGEST_SEED, fields_of, read_fields
from varedit_serve.limits import Limits

SCALES = len(preparer().variant.grids)
DATA = "data:image/png;base64," + b64encode(png()).decode()


def edit(*fields: tuple[str, str | bytes], accept: str = "*/*") -> Reply:
    async def asked() -> Reply:
        async with served() as server:
            return await server.edit(*fields, headers={"accept": accept})

    return asyncio.run(asked())


def edit_json(content: Any, kind: str = "application/json") -> Reply:
    async def asked() -> Reply:
        async with served() as server:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            return await server.ask("POST", headers={"content-type": kind}, body=[body])

    return asyncio.run(asked())


def thin(length: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (length, 1)).save(content, "PNG")
    return content.getvalue()


WRONG: list[tuple[Fields, str]] = [
    ([("promt", "add a hat")], "promt"),
    ([("input_fidelity", "low")], "input_fidelity"),
    ([("prompt", "a"), ("prompt", "b")], "prompt"),
    ([("prompt", "")], "prompt"),
    ([("prompt", "a " * 40_000)], "prompt"),
    ([("prompt[]", "a")], "prompt"),
    ([("negative_prompt", "blue " * 200)], "negative_prompt"),
    ([("image", b"no picture")], "image"),
    ([("image", "text")], "image"),
    ([("image", png(9000, "1"))], "image"),  # 81 million pixels in 10 kB
    ([("image", thin(60_000))], "image"),
    ([("image[]", png()), ("image[]", png())], "image"),
    ([("image", png()), ("image[]", png())], "image"),
    ([("mask", png(25, "L"))], "mask"),
    ([("mask", b"no picture")], "mask"),
    ([("n", "0")], "n"),
    ([("n", "5")], "n"),
    ([("n", "1.5")], "n"),
    ([("n", "1" * 5000)], "n"),
    ([("n", "")], "n"),
    ([("n", "\u0661")], "n"),  # a digit, but not ours
    ([("n", b"1")], "n"),
    ([("size", "512x512")], "size"),
    ([("quality", "hd")], "quality"),
    ([("background", "transparent")], "background"),
    ([("output_format", "gif")], "output_format"),
    ([("output_compression", "50")], "output_compression"),
    ([("response_format", "url")], "response_format"),
    ([("stream", "yes")], "stream"),
    ([("stream", "true"), ("n", "2")], "n"),
    ([("partial_images", "1")], "partial_images"),
    ([("stream", "true"), ("partial_images", "4")], "partial_images"),
    ([("seed", "-1")], "seed"),
    ([("seed", str(LARGEST_SEED + 1))], "seed"),
    ([("seed", str(LARGEST_SEED)), ("n", "2")], "seed"),
    ([("guidance_scale", "nan")], "guidance_scale"),
    ([("guidance_scale", "1e99")], "guidance_scale"),
    ([("guidance_scale[]", "1"), ("guidance_scale[]", "2")], "guidance_scale"),
    ([("guidance_scale", "1"), ("guidance_scale", "2")], "guidance_scale"),
    ([("temperature", "0")], "temperature"),
    # Together they pass the largest number, and the edit would fail with all that share its batch.
    ([("temperature", "1e-20"), ("guidance_scale", "1")], "temperature"),
    ([("guidance_scale", "1e20")], "guidance_scale"),
    ([("temperature", "1,1")], "temperature"),
    ([("temperature[]", "hot")], "temperature"),
]


@pytest.mark.parametrize(("fields", "blamed"), WRONG, ids=lambda of: str(of)[:40])
def test_a_field_that_cannot_be_used_is_a_400_that_names_it(fields: Fields, blamed: str) -> None:
    reply = edit(*fields)
    assert reply.blamed == (400, blamed)
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_a_misspelt_field_is_told_the_right_one() -> None:
    assert "did you mean prompt?" in edit(("promt", "x")).json["error"]["message"]


def test_a_field_in_the_address_is_a_400_that_names_it() -> None:
    async def asked() -> Reply:
        async with served() as server:
            kind, body = form([("image", png()), ("prompt", "add a hat")])
            return await server.ask("POST", f"{EDITS}?seed=7", kind, [body])

    assert asyncio.run(asked()).blamed == (400, "seed")


def test_errors_say_what_to_give() -> None:
    several = [("image[]", png()), ("image[]", png())]
    for fields, told in (
        (several, "image cannot be used: there are 2 pictures; give one"),
        ([("quality", "hd")], "quality is 'hd'; give auto, high, medium or low"),
        ([("response_format", "url")], "response_format is 'url'; give b64_json"),
        (
            [("background", "transparent")],
            "the picture is opaque, and so is its result: give background=auto or opaque",
        ),
    ):
        assert edit(*fields).json["error"]["message"] == told
    reply = edit_json({"image": DATA, "prompt": 5})
    assert reply.json["error"]["message"].startswith("prompt is 5; give a text of at most")
    reply = edit_json({"image": DATA.replace("image/png", ""), "prompt": "add a hat"})
    assert reply.json["error"]["message"].startswith("image cannot be used: give a data: URL")


def test_what_programs_for_openai_send_is_taken() -> None:
    """Their fields mean the same here, or the answer tells what was done."""
    reply = edit(("quality", "medium"), ("input_fidelity", "high"), ("image[]", png()))
    assert reply.status == 200 and reply.json["quality"] == "high"
    assert edit(("output_format", "jpeg"), ("output_compression", "0")).status == 200


def test_no_answer_repeats_an_instruction() -> None:
    for name in ("prompt", "negative_prompt"):
        assert b"secret" not in edit((name, "secret " * 5000)).body
        assert b"secret" not in edit((name, "secret " * 500)).body
        assert b"secret" not in edit_json({"image": DATA, name: ["secret"]}).body


def test_no_field_is_ignored() -> None:
    """All of them together are used."""
    scales = [("temperature[]", "0.5")] * SCALES
    fields: Fields = [
        *(("model", "nano"), ("user", "somebody"), ("n", "2"), ("size", "24x24"), ("seed", "5")),
        *(("quality", "low"), ("background", "opaque"), ("response_format", "b64_json")),
        *(("output_format", "jpeg"), ("output_compression", "80"), ("stream", "false")),
        *(("partial_images", "0"), ("negative_prompt", "blue"), ("guidance_scale", "2.5")),
        *(("mask", png(24, "L")), *scales),
    ]
    reply = edit(*fields)
    assert reply.status == 200, reply.body
    assert [one["seed"] for one in reply.json["data"]] == [5, 6]
    told = {name: reply.json[name] for name in ("size", "quality", "background", "output_format")}
    assert list(told.values()) == ["24x24", "low", "opaque", "jpeg"]
    usage = reply.json["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_more_results_than_places_are_never_asked_to_come_again() -> None:
    async def test() -> None:
        async with served(limits=Limits(max_queue=1)) as server:
            assert (await server.edit(("n", "2"))).blamed == (400, "n")

    asyncio.run(test())


def test_another_model_is_a_404() -> None:
    assert edit(("model", "gpt-image-1")).blamed == (404, "model")


@pytest.mark.parametrize("image", [DATA, [DATA], {"image_url": DATA}, [{"image_url": DATA}]])
@pytest.mark.parametrize("name", ["image", "images"])
def test_json_takes_data_urls(name: str, image: Any) -> None:
    more = {"seed": 3, "mask": None, "temperature": [1] * SCALES}
    reply = edit_json({name: image, "prompt": "add a hat", **more})
    assert reply.status == 200, reply.body
    assert reply.json["data"][0]["seed"] == 3


@pytest.mark.parametrize(
    ("change", "blamed"),
    [
        ({"image": "https://example.org/a.png"}, "image"),
        ({"image": {"image_url": "file:///etc/passwd"}}, "image"),
        ({"image": {"file_id": "file-1"}}, "image"),
        ({"image": "data:image/png;base64,????"}, "image"),
        ({"image": None}, "image"),
        ({"images": [DATA, DATA], "image": None}, "image"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"stream": "true"}, "stream"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"temperature": []}, "temperature"),
        ({"temperature": [[1]]}, "temperature"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"image[]": DATA}, "image[]"),
        ({"\ud800": 1}, r"\ud800"),
    ],
)
def test_json_is_as_strict(change: dict[str, Any], blamed: str) -> None:
    assert edit_json({"image": DATA, "prompt": "add a hat", **change}).blamed == (400, blamed)


def test_base64_is_read_in_pieces_as_if_it_were_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varedit_serve.fields._PIECE", 8)
    assert edit_json({"image": DATA, "prompt": "add a hat"}).status == 200
    for wrong in ("data:image/png;base64,AAAAAA==AAAA", DATA[:-1], f"{DATA}A", f"{DATA}====="):
        assert edit_json({"image": wrong, "prompt": "add a hat"}).blamed == (400, "image")


def test_answers_are_made_and_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = edit(("seed", "3")).json["data"][0]["b64_json"]
    for module in ("answering.answers", "edits"):
        monkeypatch.setattr(f"varedit_serve.{module}._PIECE", 9)
    assert edit(("seed", "3")).json["data"][0]["b64_json"] == whole
    assert edit(("seed", "3"), ("stream", "true")).events[-1]["b64_json"] == whole
    assert edit(("seed", "3"), accept="image/png").body == b64decode(whole)


NO_JSON = [b"", b"[]", b"{", b"[" * 10**6, b"\xff", b'{"n": NaN}', b'{"n":' + b"1" * 501 + b"}"]
ESCAPES = b'"' + rb"\/" * 1_000_001 + b'"'
MANY = b'{"a":[' + b"1," * 20_000 + b"1]}"


@pytest.mark.parametrize(
    "content", [*NO_JSON, MANY, ESCAPES], ids=lambda of: of[:8].decode("latin-1")
)
def test_what_is_no_json_is_a_400(content: bytes) -> None:
    assert edit_json(content).blamed == (400, None)


def test_nested_json_is_read_or_refused_however_deep() -> None:
    for deep in range(100, 1100, 50):
        for start, end in ((b"[", b"]"), (b'{"a":', b"}")):
            reply = edit_json(b'{"image":' + start * deep + b"1" + end * deep + b"}")
            assert reply.status == 400


def test_a_repeated_name_in_json_is_a_400() -> None:
    assert edit_json(b'{"prompt": "a", "prompt": "b"}').blamed == (400, "prompt")
    twice = b'{"image": {"image_url": "", "image_url": ""}}'
    assert edit_json(twice).blamed == (400, "image")


def test_accept_asks_for_the_pictures_bytes() -> None:
    starts = {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8", "image/webp": b"RIFF"}
    for kind, start in starts.items():
        reply = edit(("seed", "9"), accept=f"{kind}, */*")
        assert reply.status == 200 and reply.body.startswith(start)
        assert reply.headers["content-type"] == kind
        assert reply.headers["x-varedit-seed"] == "9"
    assert edit(accept="IMAGE/PNG; q=1").body.startswith(b"\x89PNG")
    assert edit(accept="image/png;q=0, image/jpeg;q=0.5").body.startswith(b"\xff\xd8")
    assert edit(("n", "2"), accept="image/png").blamed == (400, "n")
    assert edit(("stream", "true"), accept="image/png").blamed == (400, "stream")
    assert edit(("output_format", "webp"), accept="image/png").blamed == (400, "output_format")


def test_a_transparent_picture_has_a_transparent_result_if_wanted() -> None:
    clear = ("image", png(24, "RGBA"))
    assert edit(clear, ("background", "transparent")).status == 200
    wrong = edit(clear, ("background", "transparent"), ("output_format", "jpeg"))
    assert wrong.blamed == (400, "background")


def test_the_description_has_every_field() -> None:
    async def asked() -> Any:
        async with served() as server:
            return (await server.ask(path="/openapi.json")).json

    paths = asyncio.run(asked())["paths"]
    assert paths["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"
    edit = paths["/v1/images/edits"]["post"]
    for kind in ("multipart/form-data", "application/json"):
        schema = edit["requestBody"]["content"][kind]["schema"]
        names = list(fields_of(Limits(), SCALES))
        assert [name for name in schema["properties"] if name in names] == names
        # In a form, a list has a name of its own; in JSON, OpenAI's programs send several images.
        lists = {"image[]", "guidance_scale[]", "temperature[]"} if "form" in kind else {"images"}
        assert schema["properties"].keys() - names == lists
        assert schema["required"] == ["prompt"] and len(schema["oneOf"]) == 2
        for name, least, most in (("seed", 0, LARGEST_SEED), ("n", 1, 4), ("partial_images", 0, 3)):
            field = schema["properties"][name]
            assert (field["minimum"], field["maximum"]) == (least, most)
    assert {"400", "401", "404", "408", "413", "415", "429", "500", "503"} < edit[
        "responses"
    ].keys()


def test_fuzz_fields(cases: Callable[[int], Iterator[Random]]) -> None:
    """Whatever is sent, a field is read or named."""
    table = fields_of(Limits(), SCALES)
    texts: list[Any] = ["", "1", "-1", "1e5", "true", "\0", "9" * 30, "é", "auto", "png", "²", DATA]
    values = [None, True, 2**70, 1.5, float("inf"), [], [[]], {}, {"image_url": 3}, ["1"]]
    for random in cases(2000):
        is_form = random.random() < 0.5
        odd = [*texts, b"x"] if is_form else [*texts, *values]
        names = random.choices([*table, "images", "x", "", "[]"], k=random.randint(0, 4))
        given = [(f"{n}{random.choice(['', '', '[]'])}", random.choice(odd)) for n in names]
        whole = [("image", b"x" if is_form else DATA), ("prompt", "p"), *given]
        try:
            read = read_fields(table, whole, is_form)
        except ApiError as error:
            assert error.status == 400 and error.param is not None
        else:
            assert read.keys() == table.keys()

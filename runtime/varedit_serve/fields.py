"""The table of all fields of an edit. It drives parsing, checks, `/openapi.json` and the docs."""

import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from varedit_runtime.errors import shown
from varedit_serve.errors import ApiError, wrong
from varedit_serve.limits import Limits

LARGEST_SEED = 2**53 - 1  # the largest integer that JavaScript's numbers hold
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MOST_PARTIALS = 3
_PIECE = 2**20  # characters of base64, a multiple of 4
PICTURE = {"type": "string", "format": "binary"}  # the schema of a form's file

_PRIVATE = ("image", "mask", "prompt", "negative_prompt", "user")  # no answer has a part of them
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?")
_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


@dataclass(frozen=True)
class Field:
    """A field of a request.

    read: turns what a form (text or a file's bytes) or JSON holds into a value, or raises
    ValueError, whose text says what to give. schema: the field's JSON schema. listed: whether a
    form may repeat it, as `name[]`. other: another name that JSON knows it by.
    """

    name: str
    read: Callable[[Any, bool], Any]
    schema: dict[str, Any]
    help: str
    default: Any = None
    required: bool = False
    listed: bool = False
    other: str | None = None


def _text(longest: int) -> dict[str, Any]:
    def read(value: Any, as_text: bool) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"give a text of at most {longest} characters")
        return value

    return {"read": read, "schema": {"type": "string", "maxLength": longest}}


def _integer(least: int, most: int) -> dict[str, Any]:
    def read(value: Any, as_text: bool) -> int:
        if as_text and isinstance(value, str) and _INTEGER.fullmatch(value):
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"give an integer from {least} to {most}")
        return value

    return {"read": read, "schema": {"type": "integer", "minimum": least, "maximum": most}}


def _choice(*choices: str) -> dict[str, Any]:
    listed = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))

    def read(value: Any, as_text: bool) -> str:
        if value not in choices:
            raise ValueError(f"give {listed}")
        return value

    return {"read": read, "schema": {"type": "string", "enum": list(choices)}}


def _flag() -> dict[str, Any]:
    def read(value: Any, as_text: bool) -> bool:
        if as_text:
            value = {"true": True, "false": False}.get(value)
        if not isinstance(value, bool):
            raise ValueError("give true or false")
        return value

    return {"read": read, "schema": {"type": "boolean"}}


def _numbers(least: float, most: float) -> dict[str, Any]:
    """Read a number, or a list with one for each scale.

    The bounds keep the model's arithmetic finite: an edit that fails is a fault of its whole batch.
    """
    wanted = f"give a number from {least:g} to {most:g}, or one for each scale"

    def number(value: Any, as_text: bool) -> float:
        if as_text and isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(wanted)
        if not least <= value <= most:
            raise ValueError(wanted)
        return float(value)

    def read(value: Any, as_text: bool) -> float | tuple[float, ...]:
        if isinstance(value, list):
            return tuple(number(one, as_text) for one in value)
        return number(value, as_text)

    one = {"type": "number", "minimum": least, "maximum": most}
    schema = {"oneOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": 99}]}
    return {"read": read, "schema": schema, "listed": True}


def _decoded(text: str, start: int) -> bytes:
    """Decode base64, piece by piece: meanwhile other threads can run. Raises ValueError."""
    if text.find("=", start, len(text) - 2) >= 0:
        raise ValueError("padding that is not at the end")
    starts = range(start, len(text), _PIECE)
    return b"".join(b64decode(text[one : one + _PIECE], validate=True) for one in starts)


def _picture() -> dict[str, Any]:
    """Read a form's file; in JSON a `data:` URL, alone or as an object's `image_url`."""

    def read(value: Any, as_text: bool) -> bytes:
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"there are {len(value)} pictures; give one")
            (value,) = value
        if isinstance(value, dict) and value.keys() == {"image_url"}:
            value = value["image_url"]
        if as_text:
            if not isinstance(value, bytes):
                raise ValueError("give a file, with a file name")
            return value
        if not isinstance(value, str) or (prefix := _DATA.match(value)) is None:
            raise ValueError("give a data: URL in base64; other URLs are never fetched")
        try:
            return _decoded(value, prefix.end())
        except ValueError as error:
            raise ValueError("give valid base64") from error

    return {"read": read, "schema": PICTURE}


def fields_of(limits: Limits, scales: int) -> dict[str, Field]:
    """Return the table, by name. scales: of the model's variant."""
    several = f"A number, or one for each of {scales} scales, coarse to fine."
    size = {"type": "string", "pattern": r"^(auto|\d{1,5}x\d{1,5})$"}
    of = [
        Field("image", **_picture(), required=True, listed=True, other="images",
              help="The picture, one file of PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF, or of HEIC "
              "where the server has the extra heif."),
        Field("prompt", **_text(32_000), required=True, help="What to change."),
        Field("mask", **_picture(),
              help="A picture of the same size; only what is transparent, or white, may change."),
        Field("negative_prompt", **_text(32_000), help="What the result should not be."),
        Field("seed", **_integer(0, LARGEST_SEED),
              help="The same request with it gives the same result; result i has seed + i."),
        Field("guidance_scale", **_numbers(-1000, 1000),
              help=f"How closely to follow the prompt. {several}"),
        Field("temperature", **_numbers(0.001, 1000),
              help=f"How varied to draw. {several}"),
        Field("n", **_integer(1, min(limits.max_n, limits.max_queue)), default=1,
              help="How many results."),
        Field("size", read=_text(20)["read"], schema=size, default="auto",
              help="auto, or the size of the picture, as every result has it."),
        Field("quality", **_choice("auto", "high", "medium", "low"), default="auto",
              help="low is faster: no guidance at the last two scales; all others are high."),
        Field("input_fidelity", **_choice("high"),
              help="Every edit sees the whole picture."),
        Field("background", **_choice("auto", "opaque", "transparent"), default="auto",
              help="opaque puts the result on white; transparent needs a transparent picture."),
        Field("output_format", **_choice(*MEDIA_TYPES), help="png unless Accept names another."),
        Field("output_compression", **_integer(0, 100),
              help="Quality of a jpeg or webp; by default 95."),
        Field("response_format", **_choice("b64_json"), default="b64_json",
              help="Results come as base64; for bytes, send Accept: image/png."),
        Field("stream", **_flag(), default=False, help="Send events, for one result."),
        Field("partial_images", **_integer(0, MOST_PARTIALS), default=0,
              help="Previews in a stream."),
        Field("model", **_text(256), help="The name that /v1/models tells."),
        Field("user", **_text(512), help="Your name for a person; not used, kept or logged."),
    ]  # fmt: skip
    return {field.name: field for field in of}


def read_fields(
    fields: dict[str, Field], given: Iterable[tuple[str, Any]], as_text: bool
) -> dict[str, Any]:
    """Return the value of every field, its default where it was not given.

    given: names and values in the order they came. as_text: from a form, where numbers are text.
    Raises ApiError 400 that names the field.
    """
    found: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    for sent, value in given:
        field, name = _field(fields, sent, as_text)
        many = as_text and sent.endswith("[]")
        if many and not field.listed:
            raise wrong(name, f"{name} is no list: write {name} without []")
        if value is None:  # JSON's null says that a field is not given
            continue
        if many:
            lists.setdefault(name, []).append(value)
        elif name in found:
            raise wrong(name, f"{name} is given twice", "repeated_field")
        else:
            found[name] = value
    for name in found.keys() & lists.keys():
        raise wrong(name, f"{name} is given twice, also as {name}[]", "repeated_field")
    found |= lists
    for name, field in fields.items():
        if field.required and name not in found:
            raise wrong(name, f"{name} is missing", "missing_field")
    return {
        name: _value(field, found[name], as_text) if name in found else field.default
        for name, field in fields.items()
    }


def _field(fields: dict[str, Field], sent: str, as_text: bool) -> tuple[Field, str]:
    name = sent.removesuffix("[]") if as_text else sent
    if not as_text:
        name = next((n for n, field in fields.items() if field.other == sent), sent)
    if name not in fields:
        near = get_close_matches(name[:64], fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}"
        raise ApiError(
            400, f"there is no field {shown(name)}; {hint}", param=name[:64], code="unknown_field"
        )
    return fields[name], name


def _value(field: Field, value: Any, as_text: bool) -> Any:
    try:
        return field.read(value, as_text)
    except ValueError as error:
        private = isinstance(value, bytes | list | dict) or (
            isinstance(value, str) and field.name in _PRIVATE
        )
        told = "cannot be used: " if private else f"is {shown(value)}; "
        raise wrong(field.name, f"{field.name} {told}{error}") from error


def check_together(values: dict[str, Any]) -> None:
    """Raise ApiError 400 on fields that do not go together: none is silently ignored."""
    stream, written_as = values["stream"], values["output_format"]
    if values["partial_images"] and not stream:
        raise wrong("partial_images", "partial_images is for streams: give stream=true too")
    if stream and values["n"] > 1:
        raise wrong("n", "a stream has one result: leave out n, or stream")
    if values["output_compression"] is not None and written_as == "png":
        raise wrong("output_compression", "output_compression is for jpeg and webp, not png")
    if values["background"] == "transparent" and written_as == "jpeg":
        raise wrong("background", "a jpeg cannot be transparent: give output_format=png or webp")
    if values["seed"] is not None and values["seed"] + values["n"] - 1 > LARGEST_SEED:
        raise wrong("seed", f"result i has seed + i, which must be at most {LARGEST_SEED}")


def choose_format(values: dict[str, Any], accept: Sequence[str]) -> bool:
    """Fill in `output_format`; return whether the answer is the picture's bytes and no JSON.

    accept: media types of the header Accept, in its order. Raises ApiError 400 if they contradict.
    """
    wanted = next(
        (name for name, kind in MEDIA_TYPES.items() if accept and kind == accept[0]), None
    )
    if wanted is not None:
        if values["stream"] or values["n"] > 1:
            raise wrong("stream" if values["stream"] else "n", "Accept asks for one picture alone")
        if values["output_format"] not in (None, wanted):
            raise wrong("output_format", f"Accept asks for another format, {wanted}")
    values["output_format"] = values["output_format"] or wanted or "png"
    return wanted is not None

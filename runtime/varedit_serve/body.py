"""Read a request's body, a form or JSON, within limits of bytes, fields and time."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from varedit_serve.errors import ApiError, wrong
from varedit_serve.limits import Limits

MULTIPART, JSON = "multipart/form-data", "application/json"

# Of JSON, which is parsed at once, while nothing else is answered: these keep it below 20 ms.
_MOST_COMMAS = 10_000
_MOST_ESCAPES = 1_000_000  # PHP has one for each slash of base64
_MOST_DIGITS = 500  # of an integer
_FIELD_BYTES = 2**17  # of a field that is no file; 32,000 characters have at most 128,000

# It warns of what strangers send, with parts of it.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class GoneError(Exception):
    """The client has closed the connection: there is nobody to answer."""


class _Form(MultiPartParser):
    spool_max_size = 2**62  # never on disk: the body is bounded

    def on_part_end(self) -> None:
        """Refuse text that starlette would read as Latin-1."""
        part = self._current_part
        try:
            if part.file is None:
                part.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MultiPartException("a field is not text in UTF-8") from error
        super().on_part_end()


def content_length(request: Request, limits: Limits) -> int:
    """Return the most bytes that a body may have: what it says itself, or the limit.

    Raises ApiError 413 if that is too much; 400 if a request says its length in two ways, of which
    a proxy may have believed the other one.
    """
    if {"content-length", "transfer-encoding"} <= set(request.headers):
        told = "give Content-Length or Transfer-Encoding, not both"
        raise ApiError(400, told, code="bad_length")
    told = request.headers.get("content-length", "")
    size = int(told) if told.isascii() and told.isdigit() else limits.max_body
    if size > limits.max_body:
        raise _too_large(limits)
    return size


async def read_body(request: Request, limits: Limits) -> list[tuple[str, Any]] | bytes:
    """Return the names and values of a form's fields in order, or JSON for `parse_json`.

    A form's values are text, or bytes of files. Raises ApiError: 400 if it is malformed or has
    too many fields, 408 if it does not arrive in time, 413 if it is too large, 415 if it is of
    another kind or compressed; GoneError.
    """
    name, options = parse_options_header(request.headers.get("content-type"))
    kind = name.decode("latin-1")
    if kind not in (MULTIPART, JSON):
        raise ApiError(415, f"send {MULTIPART} or {JSON}", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send it without a Content-Encoding", code="unsupported_media_type")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # Python knows some that take minutes
        raise ApiError(400, "send text in UTF-8, and no other charset", code="bad_charset")
    try:
        async with asyncio.timeout(limits.upload_seconds):
            stream = _bounded(request, limits)
            if kind == MULTIPART:
                return await _form(request, stream, limits)
            return b"".join([chunk async for chunk in stream])
    except TimeoutError as error:
        told = f"the request did not arrive within {limits.upload_seconds:g} s"
        raise ApiError(408, told, code="timeout") from error
    except ClientDisconnect as error:
        raise GoneError from error


async def _bounded(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.max_body:
            raise _too_large(limits)
        yield chunk


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, f"a request may have at most {limits.max_body} bytes", code="request_too_large"
    )


async def _form(
    request: Request, stream: AsyncGenerator[bytes, None], limits: Limits
) -> list[tuple[str, Any]]:
    most = limits.max_fields
    parser = _Form(
        request.headers, stream, max_files=most, max_fields=most, max_part_size=_FIELD_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form is malformed: {error.message}", code="bad_form") from error
    try:
        items = form.multi_items()
        if len(items) > most:
            raise ApiError(400, f"a form may have at most {most} fields", code="bad_form")
        return [
            (name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in items
        ]
    finally:
        await form.close()


def parse_json(content: bytes, limits: Limits) -> list[tuple[str, Any]]:
    """Return the names and values of an object, in order. Raises ApiError 400."""
    if content.count(b",") > _MOST_COMMAS:
        raise ApiError(400, f"the JSON has over {_MOST_COMMAS} commas", code="bad_json")
    if content.count(b"\\") > _MOST_ESCAPES:
        raise ApiError(400, f"the JSON has over {_MOST_ESCAPES} backslashes", code="bad_json")
    try:
        whole = json.loads(
            content, object_pairs_hook=_Pairs, parse_constant=_no_constant, parse_int=_integer
        )
        if not isinstance(whole, _Pairs) or len(whole) > limits.max_fields:
            told = f"the JSON must be an object of at most {limits.max_fields} fields"
            raise ApiError(400, told, code="bad_json")
        return [(name, _plain(name, value)) for name, value in whole]
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON", code="bad_json") from error


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, whose names may be repeated."""


def _plain(field: str, value: Any) -> Any:
    """Turn objects, and those in lists, into dictionaries. Raises ApiError on repeated names."""
    if isinstance(value, _Pairs):
        if len(dict(value)) < len(value):
            raise wrong(field, f"an object in {field} names a value twice", "repeated_field")
        return dict(value)
    return [_plain(field, one) for one in value] if isinstance(value, list) else value


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("too many digits")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")

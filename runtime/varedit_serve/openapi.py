"""The description of the API that `/openapi.json` serves, made from the table of fields."""

from typing import Any

from varedit_serve.body import JSON, MULTIPART
from varedit_serve.errors import LONGEST_WAIT
from varedit_serve.fields import MEDIA_TYPES, PICTURE, Field


def _made(required: str, /, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object. required: its properties that are always there."""
    return {"type": "object", "required": required.split(), "properties": properties}


_COUNT, _TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = _made(
    "error",
    error=_made(
        "message type param code",
        message=_TEXT,
        type=_TEXT,
        param=_TEXT_OR_NULL,
        code=_TEXT_OR_NULL,
    ),
)
_USAGE = _made(
    "input_tokens input_tokens_details output_tokens total_tokens",
    input_tokens=_COUNT,
    input_tokens_details=_made("", image_tokens=_COUNT, text_tokens=_COUNT),
    output_tokens=_COUNT,
    total_tokens=_COUNT,
)
_RESULT = _made("b64_json seed", b64_json=_TEXT, seed=_COUNT)
_RESULTS = _made(
    "created data usage",
    created=_COUNT,
    background={"enum": ["opaque", "transparent"]},
    output_format={"enum": list(MEDIA_TYPES)},
    quality={"enum": ["high", "low"]},
    size=_TEXT,
    data={"type": "array", "items": _RESULT},
    usage=_USAGE,
    warnings={"type": "array", "items": _TEXT},
)
_ONE = {"minItems": 1, "maxItems": 1}
_ONE_FILE = {"type": "array", "items": PICTURE, **_ONE}
_URL = {"type": "string", "format": "uri", "pattern": "^data:"}
_URL_OBJECT = {**_made("image_url", image_url=_URL), "additionalProperties": False}
_STATUSES = {
    400: "A field is unknown, misspelt, repeated, not supported or has a wrong value.",
    401: "No valid API key.",
    403: "The request comes from a page of another site.",
    404: "There is no such model.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The request is neither a form nor JSON.",
    429: "The key has used up its rate.",
    500: "The edit, or the server, failed.",
    503: "The queue is full, the deadline has passed, or the server is loading or draining.",
}


def openapi(fields: dict[str, Field], version: str) -> dict[str, Any]:
    """Return the document. fields: the table of an edit."""
    edit = {
        "summary": "Edit a picture",
        "operationId": "editImage",
        "security": [{}, {"key": []}],
        "requestBody": {
            "required": True,
            "content": {
                MULTIPART: {"schema": _object(fields, as_text=True)},
                JSON: {"schema": _object(fields, as_text=False)},
            },
        },
        "responses": {"200": _pictures(), **{str(code): _error(code) for code in _STATUSES}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "varedit-serve", "version": version},
        "paths": {
            "/v1/images/edits": {"post": edit},
            "/v1/models": {"get": _get("List the model", JSON)},
            "/v1/models/{model}": {"get": _get("The model", JSON, "model")},
            "/livez": {"get": _get("Whether the server answers", JSON)},
            "/readyz": {"get": _get("Whether edits are admitted", JSON)},
            "/metrics": {"get": _get("Numbers for Prometheus", "text/plain")},
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _object(fields: dict[str, Field], as_text: bool) -> dict[str, Any]:
    properties = {}
    for name, field in fields.items():
        told = properties[name] = _property(field, as_text)
        if as_text and field.listed:  # a form names a list otherwise
            one, several = told.pop("oneOf", (PICTURE, _ONE_FILE))
            properties[f"{name}[]"] = {**told, **several}
            told |= one
        elif field.other and not as_text:
            properties[field.other] = told
    names = ("image", "image[]" if as_text else "images")
    return {
        "type": "object",
        "required": [name for name, field in fields.items() if field.required and name != "image"],
        "oneOf": [{"required": [name]} for name in names],
        "properties": properties,
        "additionalProperties": False,
    }


def _property(field: Field, as_text: bool) -> dict[str, Any]:
    told = {**field.schema, "description": field.help}
    if field.default is not None:
        told["default"] = field.default
    if not as_text and field.schema == PICTURE:
        told = {"description": field.help, "oneOf": [_URL, _URL_OBJECT]}
        if field.listed:  # OpenAI's programs send a list
            told["oneOf"] += [{"type": "array", "items": one, **_ONE} for one in told["oneOf"]]
    return told


def _pictures() -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "description": "The results",
        "content": {
            JSON: {"schema": _RESULTS},
            "text/event-stream": {"schema": {"type": "string"}},
            **dict.fromkeys(MEDIA_TYPES.values(), binary),
        },
    }


def _error(code: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "description": _STATUSES[code],
        "content": {JSON: {"schema": _ERROR}},
    }
    if code in (429, 503):
        seconds = {"type": "integer", "minimum": 1, "maximum": LONGEST_WAIT}
        told["headers"] = {"retry-after": {"schema": seconds}}
    return told


def _get(summary: str, kind: str, *names: str) -> dict[str, Any]:
    """Describe a path without a body. names: its variable parts."""
    told = {"in": "path", "required": True, "schema": _TEXT}
    return {
        "summary": summary,
        "parameters": [{"name": name, **told} for name in names],
        "responses": {
            "200": {"description": summary, "content": {kind: {}}},
            "default": {"description": "An error", "content": {JSON: {"schema": _ERROR}}},
        },
    }

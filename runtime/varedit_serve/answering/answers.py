"""What clients get: results as JSON or bytes, and the events of a stream."""

import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.editing.finish import Finish
from varedit_runtime.editing.results import EditResult
from varedit_runtime.grids import Grid
from varedit_runtime.pictures import encode_picture
from varedit_serve.answering.moderation import Moderation, heed
from varedit_serve.errors import ApiError
from varedit_serve.fields import MEDIA_TYPES

Sign = Callable[[bytes, str], bytes]

_PIECE = 3 * 2**18  # bytes, a multiple of 3
_PNG_COMPRESSION = 3  # 12 % more bytes than 6, in a third of the time


@dataclass(frozen=True)
class Answer:
    """How a request's pictures are answered; its methods take time, and are for a thread.

    finish: what a picture that the model drew takes from its source. finest: the last scale's grid.
    written_as: png, jpeg or webp. usage: as OpenAI counts tokens. moderation: judges each picture;
    ApiError is raised for those that it refuses. sign: returns a file of a media type with a
    statement of where it comes from.
    """

    finish: Finish
    finest: Grid
    written_as: str
    compression: int | None
    background: str
    quality: str
    usage: dict[str, Any]
    moderation: Moderation
    sign: Sign

    @property
    def memory(self) -> int:
        """The bytes of what is kept of the source."""
        kept = filter(None, (self.finish.source, self.finish.mask))
        # Pillow has 4 bytes for a pixel of RGB too.
        return sum(image.width * image.height * (1 if image.mode == "L" else 4) for image in kept)

    def results(self, results: Sequence[EditResult]) -> bytes:
        """Return the JSON of all results."""
        images = [self._shown(result.image) for result in results]
        told: dict[str, Any] = {"created": _now(), **self._told(images[0]), "usage": self.usage}
        told["data"] = [
            {"b64_json": self._base64(image), "seed": result.seed}
            for image, result in zip(images, results, strict=True)
        ]
        if results[0].warnings:
            told["warnings"] = results[0].warnings
        return msgspec.json.encode(told)

    def picture(self, result: EditResult) -> tuple[bytes, dict[str, str]]:
        """Return one result's bytes, and the answer's headers."""
        headers = {"content-type": MEDIA_TYPES[self.written_as], "x-varedit-seed": str(result.seed)}
        return self._encoded(self._shown(result.image)), headers

    def partial(self, image: Image.Image, index: int) -> bytes:
        """Return the event of a preview."""
        return _event("image_edit.partial_image", self._event(image), partial_image_index=index)

    def completed(self, result: EditResult) -> bytes:
        """Return the event of the result."""
        told = {"usage": self.usage, "seed": result.seed}
        if result.warnings:
            told["warnings"] = result.warnings
        return _event("image_edit.completed", self._event(result.image), **told)

    def _event(self, image: Image.Image) -> dict[str, Any]:
        shown = self._shown(image)
        return {"b64_json": self._base64(shown), "created_at": _now(), **self._told(shown)}

    def _told(self, image: Image.Image) -> dict[str, str]:
        return {
            "size": f"{image.width}x{image.height}",
            "quality": self.quality,
            "background": "transparent" if image.mode == "RGBA" else "opaque",
            "output_format": self.written_as,
        }

    def _shown(self, image: Image.Image) -> Image.Image:
        image = self.finish.finished(np.asarray(image), self.finest)
        heed(self.moderation.result(image))
        opaque = self.background == "opaque" or self.written_as == "jpeg"
        return on_white(image) if opaque else image

    def _base64(self, image: Image.Image) -> msgspec.Raw:
        """Return base64 as JSON, made piece by piece: meanwhile other threads can run."""
        content = self._encoded(image)
        pieces = (content[i : i + _PIECE] for i in range(0, len(content), _PIECE))
        return msgspec.Raw(b'"%s"' % b"".join(map(b64encode, pieces)))

    def _encoded(self, image: Image.Image) -> bytes:
        quality = 95 if self.compression is None else max(1, self.compression)  # 0 is JPEG's 1
        kind = self.written_as.upper()
        content = encode_picture(image, kind, quality=quality, compression=_PNG_COMPRESSION)
        return self.sign(content, MEDIA_TYPES[self.written_as])


def unsigned(content: bytes, media_type: str) -> bytes:
    """Return a picture's file as it is."""
    return content


def error_event(error: ApiError) -> bytes:
    """Return the event that ends a stream without a result."""
    return _event("error", error.body)


def _event(kind: str, told: dict[str, Any], **more: Any) -> bytes:
    data = msgspec.json.encode({"type": kind, **told, **more})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _now() -> int:
    return int(time.time())

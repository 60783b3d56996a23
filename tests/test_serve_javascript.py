"""OpenAI's JavaScript client against a whole server."""

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from server_process import PERSON, running

from varedit_runtime import Editor

FOLDER = Path(__file__).parent / "javascript"


def node_is_new() -> bool:
    """Return whether there is a Node.js that OpenAI's client takes."""
    asked = ["node", "--eval", "process.exitCode = +(parseInt(process.versions.node) < 20)"]
    return shutil.which("node") is not None and not subprocess.run(asked, timeout=60).returncode


pytestmark = [
    pytest.mark.skipif(not node_is_new(), reason="Node.js 20 or newer is not installed"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules" / "openai").is_dir(),
        reason="OpenAI's client is not installed: run npm ci in tests/javascript",
    ),
]


def test_the_javascript_client_edits_streams_lists_and_meets_errors(
    nano: Editor, tmp_path: Path
) -> None:
    own, slow, keys = "sk-own-0123456789", "sk-slow-0123456789", tmp_path / "keys"
    keys.write_text(f"own {own}\nslow {slow} 1\n")
    with running("--keys", str(keys), key=own) as server:
        asked = ["node", FOLDER / "client.js", str(server.client.base_url), PERSON, own, slow]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["models"], told["retrieved"], told["listed"]) == (["nano"], "nano", 1)
    kinds = [(kind, index) for kind, index, _ in told["events"]]
    partial = "image_edit.partial_image"
    assert kinds == [(partial, 0), (partial, 1), ("image_edit.completed", None)]
    edited = nano.edit(PERSON, "add a hat", seed=3)
    assert pixels(told["events"][-1][2]) == edited.image.tobytes()
    several = nano.edit(PERSON, "add a hat", seed=3, temperature=[0.5] * 7, num_images_per_prompt=2)
    assert [one["seed"] for one in told["two"]] == [3, 4]
    assert [pixels(one["b64_json"]) for one in told["two"]] == [
        one.image.tobytes() for one in several
    ]
    errors = {
        name: (error["kind"], error["status"], error["code"], error["param"])
        for name, error in told["errors"].items()
    }
    assert errors == {
        "400": ("BadRequestError", 400, "invalid_value", "size"),
        "unknown": ("BadRequestError", 400, "unknown_field", "promt"),
        "401": ("AuthenticationError", 401, "invalid_api_key", None),
        "404": ("NotFoundError", 404, "model_not_found", "model"),
        "413": ("APIError", 413, "request_too_large", None),
        "429": ("RateLimitError", 429, "rate_limit_exceeded", None),
    }
    assert all(error["requestID"].startswith("req_") for error in told["errors"].values())


def pixels(b64_json: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).tobytes()

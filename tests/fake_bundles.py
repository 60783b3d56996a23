"""Bundles whose manifest is real, and whose graphs and weights are a few random bytes."""

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from varedit_engines.publish import Staging
from varedit_runtime.bundle import digest_line
from varedit_runtime.manifest import (
    DIGEST,
    MANIFEST,
    FileEntry,
    GraphSpec,
    Manifest,
    Model,
    ParityLine,
    TensorSpec,
    Variant,
    canonical_json,
)

STAGES = (
    *("text_encoder", "image_encoder", "condition", "references", "scale", "image_decoder"),
    *("prefill", "scale_00", "scale_01", "scale_02"),
    *("prefill_unguided", "scale_00_unguided", "scale_01_unguided", "scale_02_unguided"),
)
COMPONENTS = ("tokenizer", "transformer")
FILES = (
    *("tokenizer.json", *(f"graphs/64.{stage}.onnx" for stage in STAGES)),
    *(f"graphs/weights/{component}.safetensors" for component in COMPONENTS),
)


def content(name: str, seed: int = 0) -> bytes:
    """Return the content of a bundle's file; every seed makes another bundle."""
    numbers = random.Random(f"{seed} {name}")
    return numbers.randbytes(numbers.randrange(200, 400))


def manifest(files: dict[str, FileEntry], seed: int = 0) -> Manifest:
    keys = TensorSpec("past_key.0", "float32", ("past", 2, 4, 16))
    bits = TensorSpec("bits", "bool", (1, 2, 2, 16))
    graphs = {s: GraphSpec(f"graphs/64.{s}.onnx", (keys,), (bits,)) for s in STAGES}
    return Manifest(
        name="fake",
        model=Model(
            size="tiny",
            bits=4,
            downsampling=8,
            patch=2,
            token_channels=16,
            depth=2,
            width=64,
            heads=4,
            text_channels=128,
            conditioning="sar",
            rotary="released",
            weights=f"random, seed {seed}",
            norm_groups=None,
            text_distance=128,
            text_epsilon=1e-6,
        ),
        precision="fp32",
        fp32_exceptions=(),
        guidance_scale=3,
        temperature=0.5,
        variants=(Variant("64", 64, "1:1", ((1, 1), (2, 2), (4, 4)), (64, 64), 1, 2, 24, graphs),),
        files=files,
        tools={"onnx": "1.18"},
        parity=(ParityLine("scale_00", "largest logit error", 1e-6, 1e-3),),
    )


def write_files(staging: Staging, seed: int = 0, changed: Sequence[str] = FILES) -> None:
    """Write a bundle; only the files in changed depend on the seed."""
    for name in FILES:
        staging.file(name).write_bytes(content(name, seed if name in changed else 0))
        staging.record(name)


def publish(target: Path, seed: int = 0, changed: Sequence[str] = FILES) -> Path:
    with Staging(target) as staging:
        write_files(staging, seed, changed)
        staging.publish(manifest(staging.files, seed))
    return target


def valid_manifest() -> dict[str, Any]:
    """Return the manifest as plain JSON values, to be damaged."""
    return msgspec.json.decode(_valid_manifest())


@cache
def _valid_manifest() -> bytes:
    contents = {name: content(name) for name in FILES}
    files = {n: FileEntry(hashlib.sha256(c).hexdigest(), len(c)) for n, c in contents.items()}
    return canonical_json(manifest(files))


def rewrite_manifest(folder: Path, data: bytes) -> None:
    """Replace a bundle's manifest by one that agrees with the digest beside it."""
    (folder / MANIFEST).write_bytes(data)
    (folder / DIGEST).write_bytes(digest_line(hashlib.sha256(data).hexdigest()))


def publish_random(target: Path) -> Path:
    """Publish a bundle whose manifest says that its weights are random."""
    return _republished(target, lambda manifest: manifest["model"].update(random=True))


def publish_textless(target: Path) -> Path:
    """Publish a bundle that starts at text features."""

    def drop(manifest: dict[str, Any]) -> None:
        del manifest["files"]["tokenizer.json"]
        (target / "tokenizer.json").unlink()
        del manifest["variants"][0]["graphs"]["text_encoder"]

    return _republished(target, drop)


def _republished(target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    publish(target)
    manifest = msgspec.json.decode((target / MANIFEST).read_bytes())
    change(manifest)
    rewrite_manifest(target, msgspec.json.encode(manifest))
    return target

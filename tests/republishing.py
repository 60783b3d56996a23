"""Bundles that are published in another's place, and that differ from it in their weights alone."""

import shutil
from pathlib import Path

import numpy as np
from msgspec import structs

from varedit_engines.publish import Staging
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import weights_file


def republish(source: Path, target: Path) -> str:
    """Publish a copy of a bundle in the place of another; return its digest."""
    manifest = Bundle.open(source).manifest
    with Staging(target) as staging:
        for name in manifest.files:
            shutil.copyfile(source / name, staging.file(name))
            staging.record(name)
        return staging.publish(manifest)


def publish_weights(source: Path, target: Path, factor: float = 1.01) -> Path:
    """Publish a bundle whose fp32 weights are another's, times a factor."""
    manifest = Bundle.open(source).manifest
    with Staging(target) as staging:
        for name in manifest.files:
            data = bytearray((source / name).read_bytes())
            if name in map(weights_file, ("transformer", "tokenizer", "text_encoder")):
                header = 8 + int.from_bytes(data[:8], "little")
                np.frombuffer(data, np.float32, offset=header)[:] *= factor
            staging.file(name).write_bytes(data)
            staging.record(name)
        staging.publish(structs.replace(manifest, files=staging.files))
    return target

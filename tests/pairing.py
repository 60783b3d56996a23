"""Small data sets of pairs, in files of all kinds."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from evaluating import drawn
from PIL import Image
from pyarrow import parquet

from varedit_export.pairs.pair import Pair


def pictures(folder: Path, *names: str) -> Path:
    """Draw a picture under each name; number n has drawn(n)."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        drawn(number).save(folder / name)
    return folder


def write_list(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(texts), "utf-8")
    return path


def number(picture: Image.Image) -> int:
    """Return which drawn picture it is."""
    return next(n for n in range(20) if np.array_equal(np.asarray(drawn(n)), np.asarray(picture)))


def shows(pair: Pair) -> tuple[str, int, int]:
    return pair.instruction, number(pair.source()), number(pair.target())


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo], form: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=form) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard(start: int = 0, count: int = 2) -> dict[str, bytes]:
    """Return the members of a shard: pair n is drawn(n) -> drawn(n + 1)."""
    members = {}
    for n in range(start, start + count):
        members[f"{n:04}.source.png"] = png(drawn(n))
        members[f"{n:04}.target.png"] = png(drawn(n + 1))
        members[f"{n:04}.txt"] = f"change {n}\n".encode()
    return members


def as_image(picture: Image.Image | None) -> dict[str, Any] | None:
    """Return a picture as the hub's data sets have it."""
    return None if picture is None else {"bytes": png(picture), "path": "x.png"}


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path

"""The cache of pairs' tokens: made once, whole or not at all, by several processes."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairing import pictures, write_list

from varedit_export.errors import DatasetError
from varedit_export.pairs.pair import Pair
from varedit_export.pairs.read import read_pairs
from varedit_export.training import token_cache
from varedit_export.training.token_cache import TokenCache
from varedit_runtime.errors import ConfigError


class Encoder:
    """Makes tokens of the first pixels of a pair, and counts."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.made = scale, list[str]()

    def __call__(self, pair: Pair) -> Mapping[str, np.ndarray]:
        self.made.append(pair.instruction)
        source = np.asarray(pair.source(), np.float32)[:2] / 3 * self.scale
        return {"source": source, "text": np.full((2, 3), len(pair.instruction))}


def data(folder: Path, count: int = 5) -> Sequence[Pair]:
    pictures(folder, *(f"{n}.png" for n in range(count + 1)))
    rows = [
        {"source": f"{n}.png", "target": f"{n + 1}.png", "instruction": f"{n}"}
        for n in range(count)
    ]
    return read_pairs([write_list(folder / "pairs.jsonl", rows)])


def cache(folder: Path, encode: Any, *made_by: object) -> TokenCache:
    return TokenCache(folder / "tokens", made_by, encode)


def test_tokens_are_made_once(tmp_path: Path) -> None:
    pairs, encoder = data(tmp_path), Encoder()
    cache(tmp_path, encoder).fill(pairs[:3])
    again = cache(tmp_path, encoder)
    again.fill(pairs)
    assert encoder.made == ["0", "1", "2", "3", "4"]
    found = again[pairs[4]]
    assert found["source"].dtype == np.float32 and found["source"].shape == (2, 16, 3)
    wanted = np.asarray(pairs[4].source(), np.float32)[:2] / 3
    assert np.array_equal(found["source"], wanted.astype(np.float16).astype(np.float32))
    assert len(encoder.made) == 5
    shutil.rmtree(tmp_path / "tokens")
    one = again[pairs[4]]  # made now, and the same as those that are kept
    assert np.array_equal(one["source"], found["source"]) and len(encoder.made) == 6


def test_other_weights_pictures_and_words_have_other_tokens(tmp_path: Path) -> None:
    pairs = data(tmp_path, 2)
    encoder = Encoder()
    cache(tmp_path, encoder, "a", 128).fill(pairs)
    for made_by in (("b", 128), ("a", 256)):
        cache(tmp_path, encoder, *made_by).fill(pairs)
    assert encoder.made == ["0", "1"] * 3
    rows = [
        {"source": "0.png", "target": "1.png", "instruction": "0"},
        {"source": "1.png", "target": "2.png", "instruction": "other"},
    ]
    more = read_pairs([write_list(tmp_path / "more.jsonl", rows)])
    cache(tmp_path, encoder, "a", 128).fill(more)
    assert encoder.made[6:] == ["other"]
    pictures(tmp_path, "0.png", "0.png")  # the second drawn picture
    os.utime(tmp_path / "0.png", ns=(1, 1))
    cache(tmp_path, encoder, "a", 128).fill(data_again := read_pairs([tmp_path / "more.jsonl"]))
    assert encoder.made[7:] == ["0"] and data_again[1].key == more[1].key


def test_processes_share_the_work(tmp_path: Path) -> None:
    pairs, encoders = data(tmp_path), [Encoder() for _ in range(3)]
    told = list[tuple[int, int]]()
    for rank, encoder in enumerate(encoders):
        cache(tmp_path, encoder).fill(pairs, lambda *done: told.append(done), rank, 3)
    assert [encoder.made for encoder in encoders] == [["0", "3"], ["1", "4"], ["2"]]
    assert told == [(0, 2), (1, 2), (0, 2), (1, 2), (0, 1)]


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other"])
def test_a_damaged_file_is_made_anew(damage: str, tmp_path: Path) -> None:
    pairs, encoder = data(tmp_path, 1), Encoder()
    one = cache(tmp_path, encoder)
    wanted = one[pairs[0]]
    [file] = (tmp_path / "tokens").rglob("*.npz")
    whole = file.read_bytes()
    place = whole.index(b"\0" * 4, 200)
    damaged = {
        "cut": whole[:-50],
        "empty": b"",
        "changed": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        "other": b"text" * place,
    }[damage]
    file.write_bytes(damaged)
    assert np.array_equal(one[pairs[0]]["source"], wanted["source"])
    assert file.read_bytes() == whole and len(encoder.made) == 2


def test_what_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = data(tmp_path, 1)
    for bad in (1e6, np.nan):
        with pytest.raises(DatasetError, match=r"pairs\.jsonl, line 1: its tokens are not finite"):
            cache(tmp_path, Encoder(bad)).fill(pairs)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(ConfigError, match=r"cannot be written: .*No space left"):
            cache(tmp_path, Encoder()).fill(pairs)
    assert not [path for path in (tmp_path / "tokens").rglob("*") if path.is_file()]


def test_a_disk_without_room_is_told_at_the_first_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, encoder = data(tmp_path), Encoder()
    monkeypatch.setattr(token_cache, "free_space", lambda folder: 1000)
    with pytest.raises(ConfigError, match=r"tokens take .* more, and 1\.0 kB are free in "):
        cache(tmp_path, encoder).fill(pairs)
    assert len(encoder.made) == 1

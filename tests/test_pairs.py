"""Pairs to fine-tune on: what is read, and what is refused with the row's name."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from evaluating import drawn
from pairing import pictures, shows, write_list
from picture_files import png
from PIL import Image

from varedit_export.errors import DatasetError
from varedit_export.pairs.lists import LARGEST_LINE
from varedit_export.pairs.read import read_pairs
from varedit_export.training.fine_tune import Order

ROW = {"source": "a.png", "target": "b.png", "instruction": "add a hat"}


def test_ones_own_list_is_read(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    drawn(3, mode="RGBA").save(tmp_path / "in/alpha.png")
    marked = np.zeros((16, 16), np.uint8)
    marked[:8] = 255
    Image.fromarray(marked).save(tmp_path / "in/mask.png")
    more = {"target": "alpha.png", "mask": "mask.png", "weight": 0.5, "instruction": "加一顶帽子"}
    dropped = {**ROW, "kept": False, "why": "blurred"}
    rows = [ROW, "  ", {**ROW, **more}, dropped, {**ROW, "kept": True}]
    pairs = read_pairs([write_list(tmp_path / "in/some.jsonl", rows)])
    assert [Path(pair.id).name for pair in pairs] == [f"some.jsonl, line {n}" for n in (1, 3, 5)]
    assert shows(pairs[0]) == ("add a hat", 0, 1)
    assert pairs[0].mask() is None and pairs[0].weight == 1
    assert (pairs[1].instruction, pairs[1].weight) == ("加一顶帽子", 0.5)
    assert pairs[1].target().mode == "RGBA"
    mask = pairs[1].mask()
    assert mask is not None and mask[:8].all() and not mask[8:].any()
    assert pairs[-1].key == pairs[0].key != pairs[1].key  # a row that is there twice is one pair
    with pytest.raises(IndexError):
        pairs[3]


def test_pairs_of_two_folders_are_two_pairs(tmp_path: Path) -> None:
    """Also if their files have the same names, sizes and times."""
    keys = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        pictures(folder, "a.png", "b.png")
        for name in ("a.png", "b.png"):
            os.utime(folder / name, ns=(1, 1))
        keys.add(read_pairs([write_list(folder / "pairs.jsonl", [ROW])])[0].key)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    keys.add(read_pairs([tmp_path / "link/pairs.jsonl"])[0].key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "the data has no pairs"),
        ([{**ROW, "kept": False}], "the data has no pairs"),
        (["{"], "line 1: it must be one whole JSON object"),
        (["[1]"], "line 1: Expected `object`"),
        ([ROW, {"source": "a.png", "target": "b.png"}], "line 2: .*instruction"),
        ([{**ROW, "wieght": 1}], "line 1: .*wieght"),
        ([{**ROW, "weight": 0}], "line 1: .*weight"),
        ([{**ROW, "weight": "much"}], "line 1: .*weight"),
        ([{**ROW, "weight": 1e300}], "line 1: .*weight"),
        ([{**ROW, "instruction": " \n"}], "line 1: the instruction is empty"),
        ([{**ROW, "source": "/etc/passwd"}], "line 1: .* is not in the data set's folder"),
        ([{**ROW, "target": "in/../../a.png"}], "line 1: .* is not in the data set's folder"),
        ([{**ROW, "mask": ""}], "line 1: .* is not in the data set's folder"),
        ([{**ROW, "source": "a\0b"}], "line 1: .* is not in the data set's folder"),
        (["[" * 100_000], "line 1"),
        ([ROW, '{"source": "' + "a" * LARGEST_LINE], "line 2: it has over 1.0 MB"),
    ],
)
def test_a_bad_row_is_refused_when_a_list_is_read(
    rows: list[Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=told):
        read_pairs([write_list(tmp_path / "pairs.jsonl", rows)])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"target": "none.png"}, "pairs.jsonl, line 1: there is no file 'none.png'"),
        ({"source": "link.png"}, "line 1: 'link.png' is not in the data set's folder"),
        ({"source": "linked/a.png"}, "line 1: .* is not in the data set's folder"),
        ({"source": "pairs.jsonl"}, "line 1: .*cannot be read"),
        ({"source": "pipe"}, "line 1: there is no file 'pipe'"),
        ({"source": "huge.png"}, "line 1: .*30000 x 30000; a picture must have"),
        ({"mask": "black.png"}, None),
    ],
)
def test_a_bad_picture_is_refused_with_its_row(
    more: dict[str, str], told: str | None, tmp_path: Path
) -> None:
    data = pictures(tmp_path / "data", "a.png", "b.png")
    drawn(1).save(tmp_path / "a.png")
    (data / "link.png").symlink_to(tmp_path / "a.png")
    (data / "linked").symlink_to(tmp_path)
    os.mkfifo(data / "pipe")
    (data / "huge.png").write_bytes(png(width=30_000, height=30_000))
    Image.new("L", (16, 16)).save(data / "black.png")
    write_list(data / "pairs.jsonl", [{**ROW, **more}])
    pairs = read_pairs([data])
    if told is None:
        mask = pairs[0].mask()
        assert mask is not None and not mask.any()
        return
    with pytest.raises(DatasetError, match=told):
        pairs[0].source()
        pairs[0].target()


def test_several_places_follow_one_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pictures(tmp_path / name, "a.png", "b.png")
    write_list(tmp_path / "one/pairs.jsonl", [{**ROW, "instruction": "1"}])
    write_list(tmp_path / "two/x.jsonl", [{**ROW, "instruction": n} for n in "23"])
    pairs = read_pairs([tmp_path / "one", str(tmp_path / "two/x.jsonl")])
    assert [pair.instruction for pair in pairs] == ["1", "2", "3"]
    assert [pair.instruction for pair in pairs[-2:]] == ["2", "3"]


def test_seed_data_edit_is_read(tmp_path: Path) -> None:
    """Part 2, and the turns of Part 3; the pictures lie beside the annotations."""
    pictures(tmp_path / "images", "x/0.png", "x/1.png", "x/2.png")
    single = {"source_image": "x/0.png", "target_image": "x/1.png", "instruction": "add a hat"}
    write_list(tmp_path / "annotations/split_0001.jsonl", [{**single, "response": "Here."}])
    turns = {
        "source_image": "x/0.png",
        **{"instruction_1": "one", "edit_image_1": "x/1.png"},
        **{"instruction_2": "two", "edit_image_2": "x/2.png"},
        **{"instruction_3": "", "edit_image_3": ""},
    }
    write_list(tmp_path / "annotations/split_0002.jsonl", [turns])
    pairs = read_pairs([tmp_path])
    assert list(map(shows, pairs)) == [("add a hat", 0, 1), ("one", 0, 1), ("two", 1, 2)]
    assert Path(pairs[2].id).name == "split_0002.jsonl, line 1, turn 2"
    path = write_list(tmp_path / "annotations/bad.jsonl", [{**turns, "edit_image_2": None}])
    with pytest.raises(DatasetError, match=r"bad\.jsonl, line 1, turn 2: "):
        read_pairs([path])
    write_list(path, [{**single, "instruction": None}])
    with pytest.raises(DatasetError, match=r"bad\.jsonl, line 1: .*instruction"):
        read_pairs([path])


def test_the_order_is_shuffled_anew_in_each_pass_and_resumes_anywhere() -> None:
    order = Order(10, seed=3)
    seen = [order[position] for position in range(30)]
    passes = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert Order(10, seed=3)[17] == seen[17]
    assert [Order(10, seed=4)[position] for position in range(10)] != passes[0]


def test_fuzz_damaged_lists_are_refused(
    cases: Callable[[int], Iterator[Random]], tmp_path: Path
) -> None:
    pictures(tmp_path, "a.png", "b.png")
    turns = {"source_image": "a.png", "edit_image_1": "b.png", "instruction_1": "加一顶"}
    rows = [ROW, {**ROW, "weight": 2.5, "kept": True}, turns]
    path = write_list(tmp_path / "pairs.jsonl", rows)
    whole = path.read_bytes()
    for random in cases(200):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 4, 30))):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        path.write_bytes(damaged)
        with suppress(DatasetError):
            for pair in read_pairs([path]):
                pair.source()

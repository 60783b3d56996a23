"""Data sets of benchmarks: what is read, and what is refused with the row's name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import drawn, own_data, write_lines
from PIL import Image

from varedit_export.errors import DatasetError
from varedit_export.evaluation.benchmarks import BENCHMARKS, benchmark, folder
from varedit_runtime.errors import ConfigError


def test_ones_own_edits_are_read(tmp_path: Path) -> None:
    own_data(tmp_path, 1)
    row = {
        "id": "大",
        "image": "0.png",
        "instruction": "加一顶帽子",
        "before": " ",
        "caption": "a",
    }
    drawn(3, mode="RGBA").save(tmp_path / "alpha.png")
    write_lines(
        tmp_path, [row, "", {"image": "alpha.png", "instruction": "x", "mask": "mask-0.png"}]
    )
    first, second = folder.read(tmp_path)
    assert (first.id, first.instruction) == ("大", "加一顶帽子")
    assert (first.before, first.caption) == (None, "a")
    assert first.target is None and first.mask is None and second.id == "3"
    assert second.source().mode == "RGBA"
    assert second.mask is not None and second.mask()[:8].all() and not second.mask()[8:].any()


ROW = {"image": "0.png", "instruction": "change it"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no rows"),
        (["{"], "line 1"),
        ([ROW, {"image": "0.png"}], "line 2.*instruction"),
        ([{**ROW, "colour": 1}], "line 1.*colour"),
        ([{**ROW, "instruction": " \n"}], "row 1: the instruction is empty"),
        ([{**ROW, "id": "a"}, {**ROW, "id": "a"}], "two rows have the id 'a'"),
        ([{**ROW, "image": "none.png"}], "line 1: there is no file 'none.png'"),
        ([{**ROW, "image": ".."}], "line 1: .* is not in the data set's folder"),
        ([{**ROW, "mask": "/etc/passwd"}], "line 1: .* is not in the data set's folder"),
        ([{**ROW, "target": "link.png"}], "line 1: .* is not in the data set's folder"),
        ([{**ROW, "image": "a\0b"}], "line 1"),
        (["[" * 100_000], "line 1"),
    ],
)
def test_a_bad_row_of_ones_own_is_refused(rows: list[Any], told: str, tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", 1)
    drawn(1).save(tmp_path / "outside.png")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DatasetError, match=told):
        folder.read(write_lines(data, rows))


def test_pictures_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    own_data(tmp_path, 1)
    (tmp_path / "0.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "black.png")
    write_lines(tmp_path, [{**ROW, "mask": "black.png"}])
    [case] = folder.read(tmp_path)
    with pytest.raises(DatasetError, match=r"line 1: .*0\.png cannot be read"):
        case.source()


def test_a_folder_without_a_list_and_an_unknown_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"edits\.jsonl cannot be read"):
        folder.read(tmp_path)
    with pytest.raises(ConfigError, match="no benchmark is called 'coco'; there are "):
        benchmark("coco")
    for name in BENCHMARKS:
        assert benchmark(name).families

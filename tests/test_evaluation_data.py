"""Data sets of benchmarks: what is read, and what is refused with the row's name."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluating import Shifted, drawn, own_data, write_lines
from hub_stand_in import Repository, serve, use
from pairing import as_image, png, write_parquet
from PIL import Image

from varedit_export.datasets import tables
from varedit_export.errors import DatasetError
from varedit_export.evaluation.benchmarks import BENCHMARKS, benchmark, folder, pie_bench
from varedit_export.evaluation.case import Edited
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.metrics import FAMILIES, family
from varedit_export.evaluation.paper import published
from varedit_export.options import EvaluateOptions
from varedit_export.weights.download import Download
from varedit_runtime.errors import CheckpointError, ConfigError


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
        (["{"], "line 1: it must be one whole JSON object"),
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
        ([{**ROW, "type": "overall"}], "row 1: a type cannot be called overall"),
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
    with pytest.raises(DatasetError, match=r"has no edits\.jsonl"):
        folder.read(tmp_path)
    with pytest.raises(ConfigError, match="no benchmark is called 'coco'; there are "):
        benchmark("coco")
    for name in BENCHMARKS:
        assert benchmark(name).families


# Published formats, written as their repositories and cards say


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def level(picture: Image.Image) -> Any:
    """Return the first level of a picture, which says which one it is."""
    return np.asarray(picture)[0, 0, 0]


def emu(number: int, **more: Any) -> dict[str, Any]:
    row = {"instruction": "add a hat", "image": as_image(drawn(number)), "task": "add"}
    captions = {"input_caption": "a girl", "output_caption": "a girl with a hat"}
    return {**row, "split": "test", "idx": number, "hash": "x", **captions, **more}


def test_emu_edit_is_read_from_several_files(tmp_path: Path) -> None:
    first = [emu(0), emu(1, input_caption=""), emu(2, image=as_image(drawn(2, mode="RGBA")))]
    write_parquet(tmp_path / "data/test-00000-of-00002.parquet", first)
    other = emu(3, task="text", instruction="加上文字")
    write_parquet(tmp_path / "data/test-00001-of-00002.parquet", [other])
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [emu(9)])
    cases = benchmark("emu-edit").read(tmp_path)
    assert [case.id for case in cases] == ["0", "1", "2", "3"]
    assert [case.groups for case in cases] == [("add",)] * 3 + [("text",)]
    assert cases[1].before is None and cases[0].caption == "a girl with a hat"
    assert cases[3].instruction == "加上文字"
    pictures = [case.source() for case in reversed(cases)]
    wanted = [drawn(3), drawn(2, mode="RGBA"), drawn(1), drawn(0)]
    assert list(map(level, pictures)) == list(map(level, wanted))
    assert pictures[1].mode == "RGBA"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([emu(0), emu(0)], "two rows have the id '0'"),
        ([emu(0, instruction="")], "row 0: the instruction is empty"),
        ([emu(0, instruction=None)], "row 0: .*instruction"),
        ([emu(0, idx="a")], "row 0: .*idx"),
        ([{"instruction": "x"}], "there is no column idx, "),
    ],
)
def test_bad_rows_of_a_table_are_refused(
    rows: list[dict[str, Any]], told: str, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "test-0.parquet", rows)
    with pytest.raises(DatasetError, match=told):
        benchmark("emu-edit").read(tmp_path)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_small_file_of_very_long_rows_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text in many rows is stored once."""
    monkeypatch.setattr(tables, "LARGEST", 100_000)
    rows = [gedit(str(number), "en", instruction="x" * 1000) for number in range(200)]
    if kind == "arrow":
        write_arrow(tmp_path / "data-0.arrow", rows)
    else:
        write_parquet(tmp_path / "data/train-0.parquet", rows)
    with pytest.raises(DatasetError, match="its texts and lists have over"):
        benchmark("gedit-en").read(tmp_path)


def test_rows_that_are_short_in_a_file_and_long_in_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [emu(number, instruction="x" * 1000) for number in range(300)]
    path = write_parquet(tmp_path / "test-0.parquet", rows, 300)
    monkeypatch.setattr(tables, "LARGEST", 300_000)
    with pytest.raises(DatasetError, match="its texts and lists have over 300 kB"):
        benchmark("emu-edit").read(tmp_path)
    write_parquet(path, [emu(0, instruction=[["x"]])])
    with pytest.raises(DatasetError, match="instruction holds no plain values"):
        benchmark("emu-edit").read(tmp_path)


def test_a_dictionary_of_lists_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A list of a million nulls takes no bytes of a file, however many rows have it."""
    lists = pa.ListArray.from_arrays([0, 1_000_000], pa.nulls(1_000_000))
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 16, pa.int8()), lists)
    table = pa.Table.from_pylist([gedit(str(number), "en") for number in range(16)])
    table = table.set_column(table.column_names.index("instruction"), "instruction", column)
    with (
        pa.OSFile(str(tmp_path / "data-0.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    with pytest.raises(DatasetError, match="instruction holds no plain values"):
        benchmark("gedit-en").read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "edits.jsonl")
    with pytest.raises(DatasetError, match="it is not a file"):
        benchmark("folder").read(tmp_path)


def test_bad_pictures_of_a_table_are_refused_with_their_row(tmp_path: Path) -> None:
    rows = [emu(0, image={"bytes": b"no picture", "path": None}), emu(1, image=None)]
    write_parquet(tmp_path / "test-0.parquet", [*rows, emu(2)])
    cases = benchmark("emu-edit").read(tmp_path)
    with pytest.raises(DatasetError, match=r"test-0\.parquet, row 0: .*cannot be read"):
        cases[0].source()
    with pytest.raises(DatasetError, match=r"test-0\.parquet, row 1: image has no picture"):
        cases[1].source()
    cases[2].source()


def test_fuzz_damaged_tables_are_refused(
    cases: Callable[[int], Iterator[Random]], tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "test-0.parquet", [emu(n) for n in range(3)])
    stream = tmp_path / "arrow/data-0.arrow"
    stream.parent.mkdir()
    write_arrow(stream, [gedit("a", "en"), gedit("b", "en")])
    for name, file in (("emu-edit", path), ("gedit-en", stream)):
        whole = file.read_bytes()
        for random in cases(60):
            damaged = bytearray(whole)
            for _ in range(random.choice((1, 4, 30))):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            file.write_bytes(damaged[: random.choice((len(damaged), random.randrange(1, 4000)))])
            with suppress(DatasetError):
                for case in benchmark(name).read(file.parent):
                    case.source()


def pie(number: int, **more: Any) -> dict[str, Any]:
    texts = {
        "original_prompt": "a [girl]",
        "editing_prompt": "a [girl with a hat]",
        "editing_instruction": "add a hat",
        "editing_type_id": "2",
        "blended_word": "girl girl",
    }
    return {"image_path": f"2_add/{number}.jpg", **texts, "mask": [513, 2, 262_140, 9], **more}


def pie_data(folder: Path, rows: dict[str, Any]) -> Path:
    (folder / "annotation_images/2_add").mkdir(parents=True)
    for number in range(2):
        drawn(number, 512).save(folder / f"annotation_images/2_add/{number}.jpg")
    (folder / "mapping_file.json").write_text(json.dumps(rows))
    return folder


def test_pie_bench_is_read(tmp_path: Path) -> None:
    rows = {"000": pie(0), "001": pie(1, editing_type_id="9", editing_prompt="[]")}
    first, second = benchmark("pie-bench").read(pie_data(tmp_path, rows))
    assert (first.id, first.groups, first.instruction) == ("000", ("add object",), "add a hat")
    assert (first.before, first.caption) == ("a girl", "a girl with a hat")
    assert (second.groups, second.caption) == (("change style",), None)
    assert first.source().size == (512, 512) and first.mask is not None
    mask = first.mask()
    border = 4 * 512 - 4
    assert mask.sum() == border + 2 and mask[1, 1] and mask[1, 2] and not mask[1, 3]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (pie(0, mask=[1]), "row 000: mask: give pairs"),
        (pie(0, mask=[-1, 5]), "row 000: mask: give pairs of a start in the picture"),
        (pie(0, mask=[512 * 512, 1]), "row 000: mask: give pairs of a start in the picture"),
        (pie(0, mask=[0] * 2**19), "row 000: mask: there are more runs than pixels"),
        (pie(0, mask=[5, -1]), "row 000: mask: a length is below 0"),
        (pie(0, mask=None), "row 000: .*mask"),
        ({k: v for k, v in pie(0).items() if k != "mask"}, "row 000: .*mask"),
        (pie(0, editing_type_id="10"), "row 000: .*editing_type_id"),
        (pie(0, image_path="../mapping_file.json"), "row 000: .*not in the data set's folder"),
        (pie(5), "row 000: there is no file"),
    ],
)
def test_bad_rows_of_pie_bench_are_refused(row: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=told):
        benchmark("pie-bench").read(pie_data(tmp_path, {"000": row}))


def test_a_mask_of_another_size_than_its_picture_is_refused(tmp_path: Path) -> None:
    [case] = benchmark("pie-bench").read(pie_data(tmp_path, {"000": pie(0)}))
    one = Edited(case, drawn(0), drawn(1))
    with pytest.raises(DatasetError, match="mask of 000 is 512 x 512, and its picture 16 x 16"):
        assert one.mask


def test_imgedit_is_read(tmp_path: Path) -> None:
    (tmp_path / "original_images/animal").mkdir(parents=True)
    drawn(0).save(tmp_path / "original_images/animal/1.jpg")
    rows = {"1082": {"id": "animal/1.jpg", "prompt": "make it smooth", "edit_type": "adjust"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))
    [case] = benchmark("imgedit").read(tmp_path)
    assert (case.id, case.groups, case.instruction) == ("1082", ("adjust",), "make it smooth")
    assert case.source().size == (16, 16)
    rows = {"1": {"id": "animal/1.jpg", "prompt": "remove it"}}
    (tmp_path / "UGE_edit.json").write_text(json.dumps(rows))
    [case] = benchmark("imgedit-uge").read(tmp_path)
    assert case.groups == ()
    (tmp_path / "basic_edit.json").write_text('{"1": {"id": "animal/2.jpg", "prompt": "x"}}')
    with pytest.raises(DatasetError, match=r"basic_edit\.json, row 1: there is no file"):
        benchmark("imgedit").read(tmp_path)


def test_turns_of_imgedit_edit_the_result_before(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    drawn(0).save(tmp_path / "data/1.jpg")
    turns = {"id": "1.jpg", "turn1": "first", "turn2": "second", "turn3": "third"}
    rows = {"1": turns, "2": {"id": "1.jpg", "turn1": "a", "turn2": "b"}}
    (tmp_path / "data/content_memory.json").write_text(json.dumps(rows))
    options = EvaluateOptions(
        benchmark="imgedit-turns",
        data=tmp_path / "data",
        output=tmp_path / "run",
        metrics=("pixels",),
    )
    edits = Shifted(refused="b")
    report = evaluate(edits, options)
    assert edits.made == [0, 3, 1, 4, 2]  # all first turns, then all second ones
    assert [row.groups[1] for row in report.edits][:3] == ["turn 1", "turn 2", "turn 3"]
    pictures = [tmp_path / "run" / (row.picture or "") for row in report.edits[:3]]
    results = [np.asarray(Image.open(path)) for path in pictures]
    for seed, (before, after) in enumerate(pairwise(results), 1):
        assert (after == before // 2 + 10 + seed).all()
    assert report.edits[4].failed == "not understood"


def gedit(key: str, language: str, **more: Any) -> dict[str, Any]:
    row = {"task_type": "color_alter", "key": key, "instruction": "给她加一顶帽子"}
    images = {"input_image": as_image(drawn(1)), "input_image_raw": as_image(drawn(2))}
    exists = {"Intersection_exist": key == "a"}
    return {**row, "instruction_language": language, **images, **exists, **more}


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_gedit_is_read_by_language(kind: str, tmp_path: Path) -> None:
    rows = [gedit("a", "en"), gedit("b", "cn"), gedit("c", "en")]
    if kind == "arrow":
        write_arrow(tmp_path / "data-00000-of-00001.arrow", rows)
    else:
        write_parquet(tmp_path / "data/train-0.parquet", rows)
    first, second = benchmark("gedit-en").read(tmp_path)
    assert (first.id, first.groups) == ("a", ("color_alter", "intersection"))
    assert (second.id, second.groups) == ("c", ("color_alter",))
    assert level(second.source()) == level(drawn(2))
    [chinese] = benchmark("gedit-cn").read(tmp_path)
    assert (chinese.id, chinese.instruction) == ("b", "给她加一顶帽子")


def test_magicbrush_is_read(tmp_path: Path) -> None:
    transparent = Image.new("RGBA", (32, 32), (9, 9, 9, 255))  # twice as large as the source
    transparent.paste((0, 0, 0, 0), (0, 0, 32, 8))
    rows = [
        {
            "img_id": "77",
            "turn_index": turn,
            "source_img": as_image(drawn(turn)),
            "mask_img": as_image(transparent),
            "instruction": "add a hat",
            "target_img": as_image(drawn(turn + 10)),
        }
        for turn in (1, 2)
    ]
    write_parquet(tmp_path / "data/dev-00000-of-00001.parquet", rows)
    first, second = benchmark("magicbrush").read(tmp_path)
    assert (first.id, second.id, second.groups) == ("77-1", "77-2", ("turn 2",))
    assert second.target is not None and level(second.target()) == level(drawn(12))
    assert level(first.source()) == level(drawn(1)) and second.mask is not None
    assert second.mask()[:4].all() and not second.mask()[4:].any()
    assert second.mask().shape == (16, 16) and second.mask().dtype == bool


def test_a_folder_without_the_benchmarks_files_is_refused(tmp_path: Path) -> None:
    for name in ("emu-edit", "magicbrush", "gedit-en"):
        with pytest.raises(DatasetError, match=r"has no .*, nor has its folder data"):
            benchmark(name).read(tmp_path)


def test_the_papers_numbers_name_groups_and_scores_that_there_are() -> None:
    """Of the judge's scores, the names alone are told."""
    known = {score.name for name in FAMILIES for score in family(name).scores}
    emu = {one.group: one.value for one in published("emu-edit") if one.score == "clip_out"}
    assert emu == {"overall": 0.282}  # the last model is 8b
    for name in BENCHMARKS:
        for one in published(name):
            assert one.score in known or one.score.startswith("judge_")
            assert one.table in (1, 2, 5, 6, 7, 8, 9) and one.model in ("2b", "8b")
    assert {one.group for one in published("pie-bench")} == {*pie_bench.TYPES, "overall"}


def test_the_papers_numbers_of_types_have_the_papers_mean() -> None:
    """PIE-Bench has 700 edits, of each type as many as here."""
    counts = dict(zip(pie_bench.TYPES, (140, 80, 80, 80, 40, 40, 40, 40, 80, 80), strict=True))
    found = {(p.score, p.model, p.group): p.value for p in published("pie-bench")}
    for score in ("judge_success", "judge_balance"):
        for model in ("2b", "8b"):
            total = sum(found[score, model, name] * count for name, count in counts.items())
            assert found[score, model, "overall"] == pytest.approx(total / 700, abs=0.001)


# Data and weights on the hub


def test_data_on_the_hub_is_fetched_after_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "test-0.parquet", [emu(0)])
    content = (tmp_path / "test-0.parquet").read_bytes()
    files = {
        "data/test-0.parquet": content,
        "data/validation-0.parquet": b"not read",
        "README": b"",
    }
    told: list[str] = []
    with serve({"datasets/facebook/emu_edit_test_set": Repository(files, "cc-by-nc-4.0")}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        options = EvaluateOptions(
            benchmark="emu-edit",
            data="hf://datasets/facebook/emu_edit_test_set",
            output=tmp_path / "run",
            metrics=("pixels",),
        )

        def refuse(download: Download) -> None:
            raise ConfigError("not downloaded")

        with pytest.raises(ConfigError, match="not downloaded"):
            evaluate(Shifted(), options, accept=refuse)
        assert not any("resolve" in request for request in hub.requests)
        report = evaluate(Shifted(), options, accept=lambda download: told.append(str(download)))
    assert len(report.edits) == 1
    assert "hf://datasets/facebook/emu_edit_test_set" in told[0] and "cc-by-nc-4.0" in told[0]
    assert not any("validation" in request for request in hub.requests)


def test_places_that_are_not_there_are_told(tmp_path: Path) -> None:
    options = {"benchmark": "emu-edit", "output": tmp_path / "run", "metrics": ("pixels",)}
    with pytest.raises(ConfigError, match="FOLDER, or --data hf://datasets/facebook/emu_edit"):
        evaluate(Shifted(), EvaluateOptions(**options))
    with pytest.raises(ConfigError, match="--data: there is no folder"):
        evaluate(Shifted(), EvaluateOptions(**options, data=tmp_path / "none"))
    mine = EvaluateOptions("folder", tmp_path / "run", tmp_path)
    with pytest.raises(DatasetError, match=r"has no edits\.jsonl, .* image and instr.* --data"):
        evaluate(Shifted(), mine)
    with pytest.raises(ConfigError, match="--weights: clip is not computed"):
        evaluate(Shifted(), EvaluateOptions(**options, data=tmp_path, weights=("clip=x",)))
    with pytest.raises(ConfigError, match="give METRIC=PLACE"):
        evaluate(Shifted(), EvaluateOptions(**options, data=tmp_path, weights=("clip",)))
    with pytest.raises(ConfigError, match="--metric nano scores edits of nano alone"):
        evaluate(Shifted(), EvaluateOptions("emu-edit", tmp_path, tmp_path, metrics=("nano",)))
    assert not (tmp_path / "run").exists()


def test_a_metric_without_known_weights_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    told: list[str] = []
    options = EvaluateOptions(benchmark="pie-bench", output=tmp_path / "run", data=tmp_path)
    with pytest.raises(ConfigError, match="give its weights with --weights lpips=PLACE"):
        evaluate(Shifted(), replace(options, metrics=("lpips",)))
    with pytest.raises(CheckpointError, match=r"cannot reach the hub.*--weights clip=FOLDER"):
        evaluate(Shifted(), options, notice=told.append)
    assert told == ["lpips is left out: it needs --weights lpips=PLACE"]


@pytest.mark.parametrize("name", ["", "\\", "x/../"])
def test_pictures_that_rows_name_are_found_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache has links to files beside the data set's folder."""
    row = {"image": f"{name}0.png", "instruction": "change it"}
    (tmp_path / "secret.png").write_bytes(png(drawn(1)))
    files = {"edits.jsonl": json.dumps(row).encode(), "0.png": png(drawn(0, 64))}
    options = EvaluateOptions("folder", tmp_path / "run", "hf://datasets/me/mine")
    with serve({"datasets/me/mine": Repository(files)}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        if not name:
            assert len(evaluate(Shifted(), options).edits) == 1
        else:
            with pytest.raises(DatasetError, match="line 1"):
                evaluate(Shifted(), options)

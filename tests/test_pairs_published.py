"""Pairs in shards, folders and tables of published layouts: what is read, and what is refused."""

import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluating import drawn
from hub_stand_in import Repository, serve, use
from pairing import (
    as_image,
    pictures,
    png,
    shard,
    shows,
    write_list,
    write_parquet,
    write_tar,
)
from PIL import Image
from pyarrow import parquet

from varedit_export.datasets.tables import Table
from varedit_export.errors import DatasetError
from varedit_export.pairs import columns, stored
from varedit_export.pairs.read import read_pairs
from varedit_runtime.errors import CheckpointError


def test_shards_are_read(tmp_path: Path) -> None:
    marked = Image.fromarray(np.full((16, 16), 255, np.uint8))
    members = shard() | {
        "0001.mask.png": png(marked),
        "0001.json": b'{"weight": 2, "instruction": "not this", "clip": [1]}',
        "0001.input_caption.txt": b"a girl",
        "README.md": b"of no pair",
        "LICENSE.txt": b"of no pair",
    }
    write_tar(tmp_path / "0.tar", dict(reversed(members.items())))
    theirs = {
        "./a/7.original_image.jpg": png(drawn(2)),
        "./a/7.edited_image.jpg": png(drawn(3)),
        "./a/7.edit_prompt.txt": "加一顶帽子".encode(),
    }
    write_tar(tmp_path / "1.tar", theirs, tarfile.PAX_FORMAT)
    pairs = read_pairs([tmp_path])
    assert sorted(map(shows, pairs)) == [
        ("change 0", 0, 1),
        ("change 1", 1, 2),
        ("加一顶帽子", 2, 3),
    ]
    one = next(pair for pair in pairs if pair.instruction == "change 1")
    mask = one.mask()
    assert one.weight == 2 and mask is not None and mask.all()
    assert one.id == f"{tmp_path / '0.tar'}, 0001"
    assert one.files["source"].name == "0.tar/0001.source.png"
    assert len({pair.key for pair in pairs}) == 3
    # A list may name what is in a shard.
    row = {part: one.files[part].name for part in ("source", "target", "mask")}
    listed = write_list(tmp_path / "some.jsonl", [{**row, "instruction": "change 1"}])
    assert shows(read_pairs([listed])[0]) == ("change 1", 1, 2)
    write_list(listed, [{**row, "source": "0.tar/none.png", "instruction": "x"}])
    with pytest.raises(DatasetError, match=r"line 1: 0\.tar has no 'none\.png'"):
        read_pairs([listed])[0]


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "0000.target.png"
    return member


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"0000.source.png": None}, "0000: there is no source"),
        ({"0000.target.png": None}, "0000: there is no target"),
        ({"0000.txt": None}, "0000: there is no instruction, such as 0000.txt"),
        ({"0000.txt": b" \n"}, "0000: the instruction is empty"),
        ({"0000.txt": b"\xff"}, "0000: .*utf-8"),
        ({"0000.txt": b"x" * (2**20 + 1)}, "0000: its text has over 1.0 MB"),
        ({"0000.json": b'{"weight": -1}'}, "0000: .*0"),
        ({"0000.json": b"{"}, "0000: "),
        ({"0000.source.png": b"no picture"}, "0000: .*cannot be read"),
        ({"0000.source_img.png": png(drawn(0))}, "0000: there are two files for its source"),
        ({"/0001.txt": b"x"}, "'/0001.txt' is not in the data set's folder"),
        ({"../0001.txt": b"x"}, "'../0001.txt' is not in the data set's folder"),
        ({"0001.txt": special("0001.txt", tarfile.FIFOTYPE)}, None),
        (
            {"0000.source.png": special("0000.source.png", tarfile.SYMTYPE)},
            "no source",
        ),
        (
            {"0000.source.png": special("0000.source.png", tarfile.LNKTYPE)},
            "no source",
        ),
    ],
)
def test_a_bad_shard_is_refused(more: dict[str, Any], told: str | None, tmp_path: Path) -> None:
    members = {k: v for k, v in (shard(0, 1) | more).items() if v is not None}
    path = write_tar(tmp_path / "0.tar", members)

    def read() -> None:
        for pair in read_pairs([path]):
            pair.source()

    if told is None:
        return read()
    with pytest.raises(DatasetError, match=told):
        read()


def test_a_damaged_shard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "0.tar", shard())
    whole = path.read_bytes()
    header = whole.index(b"0001.source.png")
    for damaged, told in (
        (whole[:header] + b"\1" + whole[header + 1 :], f"damaged at byte {header}"),
        (whole[: header + 600], "ends in the middle of '0001.source.png'"),
        (whole[: header + 100], "damaged"),
        (b"", "empty"),
        (b"no tar file" * 100, "0.tar: "),
        (b"\x1f\x8b" + whole, "0.tar: "),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=told):
            read_pairs([path])
    twice = write_tar(tmp_path / "1.tar", {})
    with tarfile.open(twice, "a:") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.source.png"))
    with pytest.raises(DatasetError, match="two files for its source"):
        read_pairs([twice])
    long = write_tar(tmp_path / "2.tar", {"a" * 3000: b""}, tarfile.PAX_FORMAT)
    monkeypatch.setattr(stored, "_LARGEST_HEADER", 2000)
    with pytest.raises(DatasetError, match="the header of a member is too large"):
        read_pairs([long])


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """Return a member's header; sizes that octal digits cannot say are binary, as GNU has them."""
    field = b"%011o\0" % size if 0 <= size < 8**11 else (size % 2**96).to_bytes(12, "big")
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[124:136], block[156:157], block[257:265] = field, kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(record: bytes) -> bytes:
    return header(b"pax", len(record), b"x") + record.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (header(b"a", -1536), "none that can be read"),
        (header(b"a", 2**95 + 2**70), "ends in the middle of 'a'"),
        (pax(b"14 size=-4096\n") + header(b"a", 0), "none that can be read"),
        (header(b"long", -1536, b"L"), "the header of a member is too large"),
        (header(b"long", 2**95 + 2**70, b"L"), "the header of a member is too large"),
        (pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + header(b"a", 512), "h.tar: "),
        (pax(b"10 path=x\n") * 3000 + header(b"a", 0), "recursion"),
    ],
)
def test_hostile_headers_of_a_shard_are_refused(content: bytes, told: str, tmp_path: Path) -> None:
    """Sizes below 0, which could be read for ever, and such that would fill the memory."""
    (tmp_path / "h.tar").write_bytes(content + b"99999999999\n".ljust(2048, b"1"))
    with pytest.raises(DatasetError, match=told):
        read_pairs([tmp_path / "h.tar"])


def test_a_shard_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", shard(0, 1))
    before = read_pairs([path])[0].key
    write_tar(path, shard(1, 2))
    pairs = read_pairs([path])
    assert shows(pairs[1]) == ("change 2", 2, 3) and before not in {pair.key for pair in pairs}


def test_folders_are_read(tmp_path: Path) -> None:
    pictures(tmp_path, "source/a.b.png", "target/a.b.PNG", "more/source/c.png", "more/target/c.jpg")
    pictures(tmp_path, "1/source.png", "1/target.png", "d.source.png", "d.target.webp", "other.png")
    (tmp_path / "instruction").mkdir()
    (tmp_path / "instruction/a.b.txt").write_text("加一顶帽子", "utf-8")
    (tmp_path / "more/c.json").write_text('{"edit_prompt": "two", "weight": 0.5}')
    (tmp_path / "1/instruction.txt").write_text("three")
    (tmp_path / "d.txt").write_text("four")
    pairs = {pair.instruction: pair for pair in read_pairs([tmp_path])}
    assert {*pairs} == {"加一顶帽子", "two", "three", "four"}
    assert pairs["two"].weight == 0.5 and shows(pairs["three"])[1:] == (0, 1)
    (tmp_path / "d.target.webp").unlink()
    with pytest.raises(DatasetError, match=r"d: there is no target"):
        read_pairs([tmp_path])


def test_links_in_a_folder_do_not_lead_out(tmp_path: Path) -> None:
    pictures(tmp_path, "out/a.target.png", "in/a.source.png")
    (tmp_path / "in/a.txt").write_text("x")
    (tmp_path / "in/a.target.png").symlink_to(tmp_path / "out/a.target.png")
    (tmp_path / "in/all").symlink_to(tmp_path / "out")
    with pytest.raises(DatasetError, match=r"'a\.target\.png' is not in the data set's folder"):
        read_pairs([tmp_path / "in"])[0]


def magicbrush(n: int, mask: Image.Image | None = None, **more: Any) -> dict[str, Any]:
    row = {"img_id": str(n), "turn_index": 1, "source_img": as_image(drawn(n))}
    row |= {"mask_img": as_image(mask), "instruction": f"change {n}"}
    return {**row, "target_img": as_image(drawn(n + 1)), **more}


def test_magicbrush_is_read(tmp_path: Path) -> None:
    alpha = drawn(9, mode="RGBA")
    rows = [magicbrush(0), magicbrush(1, alpha), magicbrush(2, instruction="加一顶帽子")]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", rows)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [magicbrush(3)])
    write_parquet(tmp_path / "data/dev-00000-of-00001.parquet", [magicbrush(9)])
    pairs = read_pairs([tmp_path])
    texts = ["change 0", "change 1", "加一顶帽子", "change 3"]
    assert list(map(shows, pairs)) == [(text, n, n + 1) for n, text in enumerate(texts)]
    assert pairs[0].mask() is None and pairs[1].mask() is not None
    assert pairs[1].id == "train-00000-of-00002.parquet, row 1"
    name = pairs[2].files["target"].name
    assert name == "data/train-00000-of-00002.parquet/target_img/2"
    row = {"source": pairs[2].files["source"].name, "target": name, "instruction": "x"}
    listed = write_list(tmp_path / "some.jsonl", [row])
    assert shows(read_pairs([listed])[0]) == ("x", 2, 3)
    for cell in ("target_img/99", "target_img", "none/0", "target_img/-1", "../x"):
        write_list(listed, [{**row, "target": f"data/train-00000-of-00002.parquet/{cell}"}])
        with pytest.raises(DatasetError, match="line 1"):
            read_pairs([listed])[0].target()


def test_instructpix2pix_is_read(tmp_path: Path) -> None:
    images = {"original_image": as_image(drawn(4)), "edited_image": as_image(drawn(5))}
    texts = {"original_prompt": "a", "edit_prompt": "make it night", "edited_prompt": "b"}
    path = write_parquet(tmp_path / "x.parquet", [{**images, **texts}])
    assert shows(read_pairs([path])[0]) == ("make it night", 4, 5)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (magicbrush(0, instruction="  "), "row 0: the instruction is empty"),
        (magicbrush(0, instruction=None), "row 0: .*instruction"),
        (magicbrush(0, instruction=[["x"]]), "instruction holds no plain values"),
        (magicbrush(0, weight=0.0), "row 0: .*weight"),
        ({"source_img": as_image(drawn(0)), "instruction": "x"}, "no column is a pair's target"),
        (magicbrush(0, source_img=None), "row 0: there is no source"),
        (magicbrush(0, target_img={"bytes": b"none"}), "row 0: .*cannot be read"),
    ],
)
def test_bad_rows_of_a_table_are_refused(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train-0.parquet", [row])
    with pytest.raises(DatasetError, match=told):
        for pair in read_pairs([path]):
            pair.source()
            pair.target()


def imgedit(n: int, top: str = "results_add") -> dict[str, Any]:
    names = [f"{top}/{n}/original.png"], [f"{top}/{n}/result.png"]
    return {"input_images": names[0], "output_images": names[1], "prompt": f"change {n}"}


def test_imgedit_is_read(tmp_path: Path) -> None:
    """Pictures that were unpacked, and those in joined tar files; edits of several turns."""
    for n, top in ((0, "results_add"), (1, "results_add"), (2, "results_turns")):
        names = [f"{top}/{n}/original.png", f"{top}/{n}/result.png"]
        content = dict(zip(names, (png(drawn(n)), png(drawn(n + 1))), strict=True))
        folder = "Multiturn" if top == "results_turns" else "Singleturn"
        if n == 0:
            for name, data in content.items():
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        else:
            write_tar(tmp_path / f"{folder}/part{n}.tar", content)
    path = write_parquet(tmp_path / "Parquet/add_part0.parquet", [imgedit(0), imgedit(1)])
    turns = {"data": [imgedit(2, "results_turns"), imgedit(1)]}
    write_parquet(tmp_path / "Parquet/turns_part0.parquet", [turns])
    expected = [(f"change {n}", n, n + 1) for n in (0, 1, 2, 1)]
    for place in (tmp_path, tmp_path / "Parquet"):
        pairs = read_pairs([place])
        assert list(map(shows, pairs)) == expected
    assert pairs[2].id == "turns_part0.parquet, row 0, turn 1"
    assert pairs[2].files["source"].name == "Multiturn/part2.tar/results_turns/2/original.png"
    assert list(map(shows, read_pairs([path]))) == expected[:2]
    write_parquet(path, [imgedit(7)])
    with pytest.raises(DatasetError, match="row 0: there is no file 'results_add/7/original"):
        read_pairs([path])[0]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"prompt": ""}, "row 0: the instruction is empty"),
        ({"input_images": ["a", "b"]}, "row 0: .*input_images"),
        ({"output_images": []}, "row 0: .*output_images"),
        ({"input_images": ["../a"]}, "row 0: '../a' is not in the data set's folder"),
        ({"output_images": ["/a"]}, "row 0: '/a' is not in the data set's folder"),
        ({"prompt": 5}, "row 0: .*prompt"),
    ],
)
def test_bad_rows_of_imgedit_are_refused(more: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "Parquet/x.parquet", [{**imgedit(0), **more}])
    with pytest.raises(DatasetError, match=told):
        read_pairs([path])


def test_long_lists_in_a_small_table_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varedit_export.datasets.tables.LARGEST", 50_000)
    turns = {"data": [imgedit(0)] * 300}
    path = write_parquet(tmp_path / "Parquet/x.parquet", [turns] * 20)
    with pytest.raises(DatasetError, match="its texts and lists have over"):
        read_pairs([path])


def test_empty_lists_in_a_tiny_table_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million of them in one row take 667 bytes of a file, and 300 MB of memory."""
    path = tmp_path / "x.parquet"
    lists = pa.array([[[]] * 2_000_000], pa.list_(pa.list_(pa.string())))
    parquet.write_table(pa.table({"data": lists}), path)
    assert path.stat().st_size < 1000
    monkeypatch.setattr(Table, "_pieces", lambda *_: pytest.fail("it is read"))
    monkeypatch.setattr("varedit_export.datasets.tables.LARGEST", 100_000_000)
    with pytest.raises(DatasetError, match="its texts and lists have over 100 MB"):
        read_pairs([path])


def test_a_picture_that_a_small_table_repeats_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varedit_export.datasets.tables.LARGEST_GROUP", 2_000_000)
    rows = [magicbrush(0, source_img={"bytes": bytes(300_000)}) for _ in range(100)]
    path = write_parquet(tmp_path / "x.parquet", rows, 100)
    assert path.stat().st_size < 500_000
    with pytest.raises(DatasetError, match=r"a group of rows has over 2\.0 MB in memory"):
        read_pairs([path])[0].source()


def test_a_place_that_holds_no_pairs_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no .*none: give a file or folder of pairs"):
        read_pairs([tmp_path / "none"])
    with pytest.raises(DatasetError, match="no pairs"):
        read_pairs([tmp_path])


def test_data_on_the_hub_is_read_and_named_by_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_parquet(tmp_path / "x.parquet", [magicbrush(0), magicbrush(1)]).read_bytes()
    files = {"data/train-0.parquet": content, "data/dev-0.parquet": b"", "README.md": b"x"}
    with serve({"datasets/osunlp/MagicBrush": Repository(files)}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        asked = []
        pairs = read_pairs(["hf://datasets/osunlp/MagicBrush"], asked.append)
        assert len(asked) == 1 and list(map(shows, pairs)) == [
            ("change 0", 0, 1),
            ("change 1", 1, 2),
        ]
        place = pairs[1].root.place
        assert place.startswith("hf://datasets/osunlp/MagicBrush@")
        file = read_pairs(["hf://datasets/osunlp/MagicBrush/data/train-0.parquet"])
        assert file[0].files["source"].name == "train-0.parquet/source_img/0"
        one = pairs[1]
        row = {part: one.files[part].name for part in ("source", "target")}
        listed = tmp_path / "kept.jsonl"
        write_list(listed, [{**row, "instruction": "x", "data": place}])
        assert shows(read_pairs([listed])[0]) == ("x", 1, 2)
        with pytest.raises(CheckpointError, match="has no"):
            read_pairs(["hf://datasets/osunlp/MagicBrush/none"])
    for wrong in ("/etc", "../x", "file://x"):
        write_list(listed, [{**row, "instruction": "x", "data": wrong}])
        with pytest.raises(DatasetError, match=r"line 1: data is .*: give hf://datasets"):
            read_pairs([listed])


def test_fuzz_damaged_shards_and_tables_are_refused(
    cases: Callable[[int], Iterator[Random]], tmp_path: Path
) -> None:
    files = [
        write_tar(tmp_path / "0.tar", shard() | {"0001.json": json.dumps({"weight": 1}).encode()}),
        write_tar(tmp_path / "1.tar", {"é" * 120: b"", **shard()}, tarfile.PAX_FORMAT),
        write_parquet(tmp_path / "0.parquet", [magicbrush(0), magicbrush(1, drawn(1))]),
        write_parquet(tmp_path / "Parquet/0.parquet", [{"data": [imgedit(0), imgedit(1)]}]),
    ]
    for path in files:
        whole = path.read_bytes()
        for random in cases(40):
            damaged = bytearray(whole)
            for _ in range(random.choice((1, 4, 30))):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            path.write_bytes(damaged[: random.choice((len(damaged), random.randrange(1, 4000)))])
            with suppress(DatasetError):
                for pair in read_pairs([path]):
                    pair.source()
                    pair.mask()
    assert columns._tars.cache_info().currsize <= 1

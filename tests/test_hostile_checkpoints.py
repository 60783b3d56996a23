"""Checkpoints made to harm: refused by name, in the memory and time of a small file."""

import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, RECORDED, recorded_transformer, refusal
from safetensors.torch import save_file
from small_t5 import write_t5
from torch import Tensor

from varedit_export.options import BuildOptions
from varedit_export.resolve_options import plan_of
from varedit_reference.checkpoint import load_transformer
from varedit_reference.config import MAX_BLOCKS, TransformerConfig
from varedit_reference.pickled import LARGEST_HEADER
from varedit_reference.text_encoder import TextEncoder, read_config, read_vocabulary
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import CheckpointError, ConfigError, VareditError

MOST_MEMORY = 300 * 2**20  # of all cases of a test together, most of it Python's own growth


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


# Pickles, written by hand


def archive(path: Path, pickled: bytes, record: bytes = bytes(64)) -> Path:
    """Write an archive as torch.save does, of this pickle and one record of 16 floats."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", record)
    return path


def part(value: object) -> bytes:
    """Return the steps that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(kind: bytes = b"ctorch\nFloatStorage\n", key: str = "0", count: int = 16) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + part(count) + b"tQ"


def tensor(
    offset: object = 0, shape: object = (4, 4), stride: object = (4, 1), **other: Any
) -> bytes:
    arguments = storage(**other) + b"".join(map(part, (offset, shape, stride, False)))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + part(None) + b"tR"


def state_dict(value: bytes, name: bytes = text("w")) -> bytes:
    return b"\x80\x02}" + name + value + b"s."


def shared_tuples(depth: int) -> bytes:
    """Return a tuple of itself twice, so often that hashing or printing it would take for ever."""
    return b")" + b"q\x00h\x00\x86" * depth


def test_a_pickle_written_by_hand_is_read(tmp_path: Path) -> None:
    values = torch.arange(16.0)
    record = values.numpy().tobytes()
    path = archive(tmp_path / "w.pth", state_dict(tensor()), record)
    assert torch.equal(open_weights(path)["w"], values.view(4, 4))
    path = archive(tmp_path / "w.pth", state_dict(tensor(3, (2, 2), (1, 4))), record)
    assert torch.equal(open_weights(path)["w"], torch.tensor([[3.0, 7.0], [4.0, 8.0]]))


@pytest.mark.parametrize(
    "made",
    [
        tensor(0, (2**60,), (0,)),
        tensor(0, (4, 5), (4, 1)),
        tensor(1, (4, 4), (4, 1)),
        tensor(0, (2, 2), (2**62, 1)),
        tensor(0, (16, 16), (1, 0)),
        tensor(-1),
        tensor(0, (-4, -4)),
        tensor(0, (4, 4), (-4, 1)),
        tensor(0, (4,), (1, 1)),
        tensor(0, (1,) * 10_000, (1,) * 10_000),
        tensor(0, (2**63, 2**63), (1, 1)),
        tensor(0, (0, 2**63), (1, 1)),
        tensor("0"),
        tensor(True),
        tensor(0, None),
        tensor(0, ((4,), 4)),
        tensor(0, (17,), (1,), count=2**60),
        tensor(key="1"),
        tensor(key="../data.pkl"),
        tensor(key="0" * 10_000),
    ],
)
def test_a_tensor_that_its_record_does_not_hold_is_refused(tmp_path: Path, made: bytes) -> None:
    path = archive(tmp_path / "w.pth", state_dict(made))
    assert "is cut short or damaged" in refusal(lambda: open_weights(path))


@pytest.mark.parametrize(
    "value",
    [
        b"c__builtin__\nbytearray\n" + part(10**12) + b"\x85R",  # torch.load would take 1 TB
        b"ctorch\nTensor\n" + part(10**6) + part(10**6) + b"\x86R",
        b"c_codecs\nencode\n" + text("x") + b"\x85R",
        b"cos\nsystem\n" + text("false") + b"\x85R",
        tensor(kind=b"ctorch\nQInt8Storage\n"),
        shared_tuples(100),
        part([[]]),
        b"N",
    ],
)
def test_what_is_no_tensor_is_never_made(tmp_path: Path, value: bytes) -> None:
    path = archive(tmp_path / "w.pth", state_dict(value))
    assert "holds more than tensors ('w' is a" in refusal(lambda: open_weights(path))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + part("x" * 300) + b"q\x00h\x00h\x00\x93.",
        b"\x80\x02}",
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02h\x07.",
        b"\x80\x02}Q.",
        b"\x80\x02\x8a\xff" + b"1" * 9,
        b"\x80\x02\x8b\xff\xff\xff\x7f",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02(i__builtin__\nlist\n.",
        b"",
    ],
)
def test_a_pickle_that_is_none_of_a_state_dict_is_refused(tmp_path: Path, content: bytes) -> None:
    path = archive(tmp_path / "w.pth", content)
    assert "is cut short or damaged" in refusal(lambda: open_weights(path))


@pytest.mark.parametrize(
    "name",
    [
        shared_tuples(100),  # a key whose hash takes 2^100 steps
        part(2**70),
        part(b"w" * 9),
        part(None),
        part(True),
    ],
)
def test_only_texts_and_numbers_name_weights(tmp_path: Path, name: bytes) -> None:
    path = archive(tmp_path / "w.pth", state_dict(tensor(), name))
    assert "holds more than tensors (a name is a " in refusal(lambda: open_weights(path))


def test_other_names_may_stand_beside_the_state_dict(tmp_path: Path) -> None:
    """A trainer's callbacks are named by their classes."""
    path = tmp_path / "trainer.pth"
    content = {
        "trainer": {"gpt_fsdp": {"w": torch.ones(2)}},
        "callbacks": {Path: 1, None: 2, (1, 2): 3},
    }
    torch.save(content, path)
    assert torch.equal(open_weights(path)["w"], torch.ones(2))


def test_a_pickle_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pth", b"\x80\x02" + b"}" * 10 * LARGEST_HEADER + b".")
    assert f"names and shapes of more than {LARGEST_HEADER}" in refusal(lambda: open_weights(path))


def test_a_directory_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pth", state_dict(tensor()))
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    size = struct.unpack_from("<I", content, end + 12)[0]
    entries = content[end - size : end]
    many = entries * (LARGEST_HEADER // len(entries) + 2)
    path.write_bytes(
        content[: end - size]
        + many
        + content[end : end + 12]
        + struct.pack("<I", len(many))
        + content[end + 16 :]
    )
    assert f"names and shapes of more than {LARGEST_HEADER}" in refusal(lambda: open_weights(path))


def test_a_record_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pth", state_dict(tensor(0, (2**40,), (1,))))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46
    assert content[entry : entry + 4] == b"PK\1\2"
    for place in (20, 24):  # the compressed size and the size
        content[entry + place : entry + place + 4] = b"\xf0\xff\xff\xff"
    path.write_bytes(content)
    assert "lies past the end" in refusal(lambda: open_weights(path))


# What a file holds besides the model


def saved(folder: Path, **changes: Tensor) -> Path:
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    torch.save(recorded_transformer() | changed, folder / "w.pth")
    return folder / "w.pth"


def test_a_tensor_of_one_element_repeated_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, x__zero_k_bias=torch.zeros(1).expand(2**60))
    assert f"a tensor of {2**60} elements in 4 bytes" in refusal(
        lambda: load_transformer(path, CONFIG.transformer)
    )


def test_key_biases_have_names_and_shapes_of_the_model(tmp_path: Path) -> None:
    path = saved(tmp_path, x__zero_k_bias=torch.zeros(64))
    message = refusal(lambda: load_transformer(path, CONFIG.transformer))
    assert "1 unexpected (x.zero_k_bias)" in message
    path = saved(tmp_path, text_proj_for_sos__ca__zero_k_bias=torch.zeros(10**6))
    message = refusal(lambda: load_transformer(path, CONFIG.transformer))
    assert "1 misshapen (text_proj_for_sos.ca.zero_k_bias [1000000] for [64])" in message


BUFFERS = {
    "lvl_1L": torch.zeros(1, 9, dtype=torch.int64),
    "attn_bias_for_masking": torch.full((1, 1, 9, 9), -torch.inf),
    "Infinity_visible_kvlen": torch.zeros(9, dtype=torch.int32),
    "Infinity_invisible_qlen": torch.zeros(9, dtype=torch.int32),
}


def test_buffers_of_the_training_code_are_left_out(tmp_path: Path) -> None:
    expected = load_transformer(RECORDED / "var.pth", CONFIG.transformer).state_dict()
    loaded = load_transformer(saved(tmp_path, **BUFFERS), CONFIG.transformer).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    nested = {f"block_chunks.0.{name}": tensor for name, tensor in BUFFERS.items()}
    load_transformer(saved(tmp_path, **nested), CONFIG.transformer)


def test_a_buffer_of_another_name_or_of_absurd_shape_is_not(tmp_path: Path) -> None:
    others = {name: torch.zeros(3) for name in ("lvl_1L.weight", "my_lvl_1L", "x.quantizer")}
    path = saved(tmp_path, **others)
    message = refusal(lambda: load_transformer(path, CONFIG.transformer))
    assert f"3 unexpected ({', '.join(others)})" in message
    path = saved(tmp_path, lvl_1L=torch.zeros(1, 1, 1, 1, 3))
    assert "1 unexpected (lvl_1L)" in refusal(lambda: load_transformer(path, CONFIG.transformer))


# Safetensors and JSON


def safetensors(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("length", [2**63, 2**40, LARGEST_HEADER + 1, 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = safetensors(tmp_path / "w.safetensors", b"{}", length)
    assert "is not a whole safetensors file" in refusal(lambda: open_weights(path))


def test_a_header_of_a_million_tensors_is_not_read(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(i): entry for i in range(100_000)}).encode()
    path = safetensors(tmp_path / "w.safetensors", header, data=bytes(9))
    assert f"names and shapes of more than {LARGEST_HEADER}" in refusal(lambda: open_weights(path))


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**6},
        {"num_layers": MAX_BLOCKS + 1},
        {"num_layers": 0},
        {"num_layers": 10**40},
        {"vocab_size": 2**60},
        {"d_model": -1},
        {"num_heads": "4"},
        {"relative_attention_num_buckets": 2},
        {"relative_attention_max_distance": 1},
        {"layer_norm_epsilon": 0},
        {"feed_forward_proj": 3},
    ],
)
def test_impossible_sizes_of_a_text_encoder_are_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(change))
    message = refusal(lambda: read_config(tmp_path))
    assert "config.json does not describe a T5 encoder (" in message


def test_a_model_of_a_million_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"depth at most {MAX_BLOCKS}"):
        TransformerConfig(10**6, 64, 2, 8, 128, ((1, 1),), ((1, 1),) * 4)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**6},
        {"depth": 1e999},
        {"embed_dim": 2**62},
        {"ch_mult": [1] * 10**5},
        {"ch_mult": []},
        {"base_ch": 2**40},
        {"codebook_dim": 2**40},
        {"text_channels": 2**40},
        {"pn": ["0.06M"]},
        {"patch": None},
    ],
)
def test_a_recording_of_impossible_sizes_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    settings = json.loads((RECORDED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    options = BuildOptions(config=tmp_path / "config.json", random_weights=0)
    with pytest.raises(ConfigError, match="does not describe a recording"):
        plan_of(options)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_large_files_and_pipes_in_a_folder_are_not_read(tmp_path: Path, name: str) -> None:
    write_t5(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    assert f"{name} has more than" in refusal(lambda: TextEncoder.load(tmp_path))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert name in refusal(lambda: TextEncoder.load(tmp_path))


# Random damage


NUMBERS = (0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def damaged(random: Random, content: bytes) -> bytes:
    """Replace bytes or sizes, cut, repeat or remove parts, mostly near the start or the end."""
    edited = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        near = random.randrange(min(600, len(edited)))
        place = random.choice((near, len(edited) - 1 - near, random.randrange(len(edited))))
        other, length = random.randrange(len(edited)), random.choice((1, 2, 4, 8, 64))
        number = random.choice((*NUMBERS, len(edited)))
        match random.randrange(6):
            case 0:
                edited[place] = random.randrange(256)
            case 1 | 2:
                width = random.choice((1, 2, 4, 8))
                edited[place : place + width] = (number % 256**width).to_bytes(width, "little")
            case 3:
                edited[place:place] = edited[other : other + length]
            case 4:
                edited[place : place + length] = edited[other : other + length]
            case _:
                del edited[place : random.choice((place + length, len(edited)))]
        edited = edited or bytearray(b"P")
    return bytes(edited)


def small_state() -> dict[str, Tensor]:
    return {
        "head.weight": torch.randn(4, 3),
        "head.bias": torch.randn(4).half(),
        "norm.weight": torch.randn(2, 2, 2).bfloat16(),
    }


def opens_or_says_why(path: Path) -> None:
    try:
        weights = open_weights(path)
    except CheckpointError as error:
        assert len(str(error)) <= 2000
    else:
        assert sum(t.numel() * t.itemsize for t in weights.values()) <= 100 * path.stat().st_size


def test_fuzz_damaged_archives(tmp_path: Path, cases: Callable[[int], Iterator[Random]]) -> None:
    path = tmp_path / "w.pth"
    torch.save(small_state(), path)
    content = path.read_bytes()
    for random in cases(400):
        path.write_bytes(damaged(random, content))
        opens_or_says_why(path)


def test_fuzz_damaged_pickles(tmp_path: Path, cases: Callable[[int], Iterator[Random]]) -> None:
    """The archive is whole, so that its checksums do not hide the damage."""
    path = tmp_path / "w.pth"
    torch.save(small_state(), path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    (name,) = (name for name in records if name.endswith("data.pkl"))
    for random in cases(400):
        with zipfile.ZipFile(path, "w") as file:
            for record, content in records.items():
                file.writestr(record, damaged(random, content) if record == name else content)
        opens_or_says_why(path)


def test_fuzz_damaged_safetensors(tmp_path: Path, cases: Callable[[int], Iterator[Random]]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(small_state(), path)
    content = path.read_bytes()
    for random in cases(500):
        path.write_bytes(damaged(random, content))
        opens_or_says_why(path)


@pytest.mark.parametrize(
    ("name", "read"), [("config.json", read_config), ("tokenizer.json", read_vocabulary)]
)
def test_fuzz_damaged_json(
    tmp_path: Path,
    cases: Callable[[int], Iterator[Random]],
    name: str,
    read: Callable[[Path], object],
) -> None:
    write_t5(tmp_path)
    content = (tmp_path / name).read_bytes()
    for random in cases(300):
        (tmp_path / name).write_bytes(damaged(random, content))
        try:
            read(tmp_path)
        except VareditError as error:
            assert isinstance(error, CheckpointError) and len(str(error)) <= 2000

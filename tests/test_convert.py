"""The converter: what it writes is what it read, whole or not at all."""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_equal
from click.testing import CliRunner
from disks import file_size_limit
from released import write_released_tokenizer, write_released_transformer
from safetensors import safe_open
from small_t5 import write_t5
from torch import Tensor

from varedit_export.cli import main
from varedit_reference import weights_file
from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.config import preset
from varedit_reference.convert import convert
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.weights_file import open_weights, write_safetensors, write_tensors
from varedit_runtime.errors import CheckpointError, ConfigError

CONFIG = preset("tiny-2b")
FILES = [
    "transformer.safetensors",
    "tokenizer.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/config.json",
    "text_encoder/tokenizer.json",
]


in_both_types = pytest.mark.parametrize("released", [torch.bfloat16, torch.float32], indirect=True)


@pytest.fixture
def released(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    folder, dtype = tmp_path / "released", getattr(request, "param", torch.bfloat16)
    write_released_transformer(CONFIG, 1, folder / "var.pth", dtype, chunks=2)
    write_released_tokenizer(CONFIG, 2, folder / "vae.pth", dtype)
    write_t5(folder / "t5", shards="bin")
    return {
        "transformer": folder / "var.pth",
        "tokenizer": folder / "vae.pth",
        "text_encoder": folder / "t5",
    }


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@in_both_types
def test_a_converted_model_is_the_released_one_bit_for_bit(
    released: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "converted"
    assert convert("tiny-2b", **released, output=output) == [output / name for name in FILES]
    assert files_in(output) == sorted(FILES)
    direct, converted = (
        load_transformer(path, CONFIG.transformer).state_dict()
        for path in (released["transformer"], output / "transformer.safetensors")
    )
    assert_equal(converted, direct)
    direct, converted = (
        load_tokenizer(path, CONFIG.tokenizer).state_dict()
        for path in (released["tokenizer"], output / "tokenizer.safetensors")
    )
    assert_equal(converted, direct)
    prompt = ["make the sky red"]
    [expected_features] = TextEncoder.load(released["text_encoder"]).encode(prompt)
    [features] = TextEncoder.load(output / "text_encoder").encode(prompt)
    assert torch.equal(features, expected_features)


def test_the_command_writes_what_it_says(released: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "converted"
    arguments = ["--size", "tiny-2b", "--checkpoint", released["transformer"], "--tokenizer"]
    arguments += [released["tokenizer"], "--text-encoder", released["text_encoder"], "-o", output]
    done = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(output / name) for name in FILES]
    assert files_in(output) == sorted(FILES)


@in_both_types
def test_converted_files_keep_the_float_type_and_say_what_they_are(
    released: dict[str, Any], tmp_path: Path
) -> None:
    convert("tiny-2b", **released, output=tmp_path / "out")
    stored = next(iter(open_weights(released["transformer"]).values())).dtype
    for component in ("transformer", "tokenizer"):
        with safe_open(tmp_path / "out" / f"{component}.safetensors", framework="pt") as file:
            assert file.metadata() == {
                "format": "varedit_reference",
                "component": component,
                "size": "tiny-2b",
            }
            assert {file.get_tensor(name).dtype for name in file.keys()} == {stored}  # noqa: SIM118
    names = open_weights(tmp_path / "out" / "text_encoder")
    assert "shared.weight" in names
    assert not [n for n in names if n.startswith(("decoder", "lm_head")) or "embed_tokens" in n]


def test_a_conversion_is_quiet_where_nobody_watches(
    released: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    convert("tiny-2b", **released, output=tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_converting_again_replaces_the_files(released: dict[str, Any], tmp_path: Path) -> None:
    convert("tiny-2b", **released, output=tmp_path / "out")
    (tmp_path / "out" / "transformer.safetensors").write_bytes(b"old")
    convert("tiny-2b", **released, output=tmp_path / "out")
    load_transformer(tmp_path / "out" / "transformer.safetensors", CONFIG.transformer)


def test_a_wrong_size_or_component_writes_nothing(released: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(CheckpointError, match="pass --size tiny-2b"):
        convert("tiny-8b", **released, output=output)
    with pytest.raises(ConfigError, match="no size is called '3b'"):
        convert("3b", **released, output=output)
    with pytest.raises(CheckpointError, match="looks like the transformer of size tiny-2b"):
        convert("tiny-2b", **{**released, "tokenizer": released["transformer"]}, output=output)
    write_t5(tmp_path / "narrow", width=64)
    with pytest.raises(CheckpointError, match="an encoder of width 64, and the transformer reads"):
        convert("tiny-2b", **{**released, "text_encoder": tmp_path / "narrow"}, output=output)
    assert not output.exists()


def test_weights_are_not_written_over_those_that_are_read(
    released: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    convert("tiny-2b", **released, output=output)
    before = {name: (output / name).read_bytes() for name in FILES}
    link = tmp_path / "link.safetensors"
    link.hardlink_to(output / "transformer.safetensors")
    for own in (
        {"transformer": output / "transformer.safetensors"},
        {"transformer": link},
        {"text_encoder": output / "text_encoder"},
    ):
        with pytest.raises(CheckpointError, match="choose another folder"):
            convert("tiny-2b", **{**released, **own}, output=output)
    assert {name: (output / name).read_bytes() for name in FILES} == before


def test_too_small_a_disk_is_noticed_before_anything_is_written(
    released: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = released["transformer"].stat().st_size + 1000  # room for the first file only
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": size}))
    with pytest.raises(CheckpointError, match=r" free and .*B are to be written: free some"):
        convert("tiny-2b", **released, output=tmp_path / "out")
    assert files_in(tmp_path / "out") == []


def test_an_output_that_is_a_file_is_a_typed_error(
    released: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        convert("tiny-2b", **released, output=tmp_path / "out")


def test_a_write_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(20_000) for name in "abc"}
    told = r"cannot write .*weights\.safetensors: File too"
    with file_size_limit(100_000), pytest.raises(CheckpointError, match=told):
        write_safetensors(tmp_path / "weights.safetensors", tensors, {})
    assert not list(tmp_path.iterdir())


def test_an_interrupt_midway_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    tensors = {"a": torch.zeros(9), "b": torch.zeros(9)}

    def interrupted(items: list[Any], **options: Any) -> Iterator[Any]:
        yield items[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_file, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, tensors, {})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_what_ends_early_waits_for_no_tensor(tmp_path: Path) -> None:
    """They are made in threads, each for seconds if it is large."""
    go_on = threading.Event()
    begun: list[str] = []

    def make(name: str) -> Tensor:
        begun.append(name)
        if name != "0":
            go_on.wait()
        return torch.zeros(9)

    def interrupted(names: Sequence[str]) -> Iterator[str]:
        yield names[0]
        raise KeyboardInterrupt

    def write() -> None:
        layout = {str(n): torch.zeros(9) for n in range(9)}
        with pytest.raises(KeyboardInterrupt):
            write_tensors(tmp_path / "w.safetensors", layout, make, {}, interrupted)

    writing = threading.Thread(target=write)
    writing.start()
    writing.join(60)
    ended = not writing.is_alive()
    go_on.set()
    writing.join()
    assert ended and len(begun) <= 4


def test_the_written_format_is_safetensors(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "odd bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 5).T,
        "double": torch.randn(2, 2, dtype=torch.float64),
        "half": torch.randn(8).half(),
        "empty": torch.zeros(0, 3),
        "ünicode": torch.ones(1),
    }
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, tensors, {"size": "2b"})
    loaded = open_weights(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"size": "2b"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].itemsize == 0


def test_only_float_weights_are_written(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2).long()}
    with pytest.raises(CheckpointError, match="the weight a is stored as int64"):
        write_safetensors(tmp_path / "weights.safetensors", tensors, {})
    assert not list(tmp_path.iterdir())

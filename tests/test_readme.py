"""The README's example runs, on a small model."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from bundles import small_bundle
from PIL import Image
from small import small_config
from small_t5 import write_t5

from varedit_reference.initialise import write_released_tokenizer, write_released_transformer

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"(?:^    from .*\n)(?:^(?:    .*)?\n)+", README, re.M)


def test_the_example_with_a_bundle_edits_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, _ = EXAMPLES
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert "bundles/2b-512" in example
    exec(dedent(example).replace("bundles/2b-512", str(small_bundle())), {})
    with Image.open("edited.png") as edited:
        assert edited.size == (60, 40)


def test_the_python_example_edits_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, example = EXAMPLES
    config = small_config()
    write_released_transformer(config, 1, tmp_path / "2B-512.pth", torch.bfloat16, chunks=2)
    write_released_tokenizer(config, 2, tmp_path / "infinity_vae_d32reg.pth", torch.float32)
    write_t5(tmp_path / "flan-t5-xl")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    released, small = 'preset("2b", 512)', 'preset("tiny-2b", 256)'
    assert released in example
    exec(dedent(example).replace(released, small), {})
    with Image.open("edited.png") as edited:
        assert edited.size == (60, 40)

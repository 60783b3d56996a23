"""The examples in Python of the README and of the reference's page run, on small models."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from bundles import small_bundle
from PIL import Image
from released import write_released_tokenizer, write_released_transformer
from small import small_config
from small_t5 import write_t5

ROOT = Path(__file__).parent.parent


def python_example(page: str) -> str:
    """Return the one indented block of a page that begins with an import."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (example,) = re.findall(r"(?:^    from .*\n)(?:^(?:    .*)?\n)+", text, re.M)
    return dedent(example)


def test_the_example_with_a_bundle_edits_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = python_example("README.md")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert "bundles/8b-512" in example
    exec(example.replace("bundles/8b-512", str(small_bundle())), {})
    with Image.open("edited.png") as edited:
        assert edited.size == (60, 40)


def test_the_python_example_edits_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = python_example("docs/reference.md")
    config = small_config()
    write_released_transformer(config, 1, tmp_path / "2B-512.pth", torch.bfloat16, chunks=2)
    write_released_tokenizer(config, 2, tmp_path / "infinity_vae_d32reg.pth", torch.float32)
    write_t5(tmp_path / "flan-t5-xl")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    released, small = 'preset("2b", 512)', 'preset("tiny-2b", 256)'
    assert released in example
    exec(example.replace(released, small), {})
    with Image.open("edited.png") as edited:
        assert edited.size == (60, 40)

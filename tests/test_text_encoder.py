"""The T5 text encoder against transformers' own, from the folders that people have."""

import json
import sys
from pathlib import Path

import pytest
import torch
from small_t5 import write_t5

from varedit_reference.text_encoder import TextEncoder
from varedit_runtime.errors import CheckpointError, MissingExtraError, TextError

PROMPTS = ["make the sky red", "add a hat", "remove the dog", "red"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_t5(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shards", ["safetensors", "bin"])
def test_features_equal_those_of_transformers(tmp_path: Path, shards: str) -> None:
    model = write_t5(tmp_path, shards=shards)
    assert len(list(tmp_path.glob("*.index.json"))) == 1
    encoder = TextEncoder.load(tmp_path)
    [features] = encoder.encode(["make the sky red"])
    ids = torch.tensor([[4, 5, 6, 7, 1]])
    assert encoder.tokenise("make the sky red") == ids[0].tolist()
    expected = model.get_encoder()(input_ids=ids).last_hidden_state[0]
    assert features.shape == (5, 128)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_a_batch_equals_one_by_one(folder: Path) -> None:
    encoder = TextEncoder.load(folder)
    together = encoder.encode(PROMPTS)
    assert [len(features) for features in together] == [5, 4, 4, 2]
    for prompt, features in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(features, encoder.encode([prompt])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_smaller_type_stays_close(folder: Path, precision: str, dtype: torch.dtype) -> None:
    [exact] = TextEncoder.load(folder).encode(PROMPTS[:1])
    [features] = TextEncoder.load(folder, precision).encode(PROMPTS[:1])
    assert features.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert 0 < (features.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_in_fp16_the_product_that_overflows_stays_fp32(folder: Path) -> None:
    encoder = TextEncoder.load(folder, "fp16")
    types = {name: p.dtype for name, p in encoder.model.named_parameters()}
    outputs = {name for name in types if name.endswith(".wo.weight")}
    assert len(outputs) == 2
    assert all((types[name] == torch.float32) == (name in outputs) for name in types)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_instruction_is_refused(folder: Path, prompt: str) -> None:
    with pytest.raises(TextError, match="empty"):
        TextEncoder.load(folder).encode(["red", prompt])


def test_512_tokens_pass_and_513_are_refused_or_cut(folder: Path) -> None:
    encoder = TextEncoder.load(folder)
    longest, longer = " ".join(["red"] * 511), " ".join(["red"] * 511 + ["hat"])
    assert len(encoder.tokenise(longest)) == 512
    with pytest.raises(TextError, match="513 tokens, end token included, of at most 512"):
        encoder.tokenise(longer)
    assert encoder.tokenise(longer, truncate=True) == encoder.tokenise(longest)
    [features] = encoder.encode([longer], truncate=True)
    assert len(features) == 512


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*missing: give a Flan-T5"):
        TextEncoder.load(tmp_path / "missing")


def test_a_folder_with_spiece_model_alone_says_what_to_do(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*spiece\.model.*AutoTokenizer"):
        TextEncoder.load(folder)


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"model": 3}'])
def test_a_broken_tokenizer_is_a_typed_error(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        TextEncoder.load(folder)


def test_a_tokenizer_without_end_token_is_a_typed_error(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text().replace("</s>", "[SEP]")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no end token </s>"):
        TextEncoder.load(folder)


@pytest.mark.parametrize("content", [None, "not JSON", '{"num_layers": "two"}', "[]"])
def test_a_broken_config_is_a_typed_error(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a T5 encoder"):
        TextEncoder.load(folder)


def test_weights_of_another_size_are_a_typed_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 64, "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"9 missing .*, \d+ misshapen \(shared.weight"):
        TextEncoder.load(folder)


def test_a_folder_without_an_encoder_is_a_typed_error(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no T5 encoder"):
        TextEncoder.load(folder)


def test_without_transformers_the_error_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "varedit-export\[export\]"'):
        TextEncoder.load(folder)

"""Loading checkpoints: every layout that exists, and a typed error for everything else."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CONFIG,
    RECORDED,
    State,
    assert_equal,
    recorded_tokenizer,
    recorded_transformer,
    refusal,
    save_shards,
)
from released import released_state
from safetensors.torch import save_file

from varedit_reference.checkpoint import (
    empty_tokenizer,
    empty_transformer,
    fit,
    load_tokenizer,
    load_transformer,
    own_layout,
    released_tokenizer,
    released_transformer,
)
from varedit_reference.config import preset
from varedit_reference.weights_file import open_weights

Save = Callable[[State, Path], Path]


# Layouts


def test_a_transformer_written_back_is_the_file(recording_folder: Path) -> None:
    size = recording_folder.name.split("-")[0].replace("tiny", "tiny-")
    config = preset(size).transformer
    released = recorded_transformer(recording_folder)
    model = load_transformer(recording_folder / "var.pth", config)
    zeros = {name for name in released if name.endswith("zero_k_bias")}
    assert len(zeros) == 1 + 2 * config.depth
    expected = {name: tensor for name, tensor in released.items() if name not in zeros}
    assert_equal(released_state(model, released_transformer(config.depth, chunks=2)), expected)
    assert len(model.state_dict()) == len(expected)


def test_a_tokenizer_written_back_is_the_file(recording_folder: Path) -> None:
    size = recording_folder.name.split("-")[0].replace("tiny", "tiny-")
    released = recorded_tokenizer(recording_folder)
    model = load_tokenizer(recording_folder / "vae.pth", preset(size).tokenizer)
    expected = {name: t for name, t in released.items() if name.startswith(("encoder", "decoder"))}
    assert len(expected) < len(released)
    assert_equal(released_state(model, released_tokenizer()), expected)


def test_blocks_follow_one_another_through_the_chunks() -> None:
    model = load_transformer(RECORDED / "var.pth", CONFIG.transformer)
    released = recorded_transformer()
    for block in range(4):
        name = f"block_chunks.{block // 2}.module.{block % 2}.ffn.fc1.weight"
        assert torch.equal(model.get_parameter(f"blocks.{block}.mlp.0.weight"), released[name])


def save_pth(state: State, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def save_parameters(state: State, folder: Path) -> Path:
    parameters: State = {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for name, tensor in state.items()
    }
    return save_pth(parameters, folder)


def save_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_folder(state: State, folder: Path) -> Path:
    save_safetensors(state, folder)
    return folder


def save_bin_shards(state: State, folder: Path) -> Path:
    return save_shards(state, folder, "bin")


SAVES = [
    save_pth, save_parameters, save_safetensors, save_folder, save_shards, save_bin_shards,
]  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
def test_every_kind_of_file_loads_the_same(tmp_path: Path, save: Save) -> None:
    expected = load_transformer(RECORDED / "var.pth", CONFIG.transformer).state_dict()
    path = save(recorded_transformer(), tmp_path)
    assert_equal(load_transformer(path, CONFIG.transformer).state_dict(), expected)
    expected = load_tokenizer(RECORDED / "vae.pth", CONFIG.tokenizer).state_dict()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    path = save(recorded_tokenizer(), tmp_path)
    assert_equal(load_tokenizer(path, CONFIG.tokenizer).state_dict(), expected)


@pytest.mark.parametrize("chunks", [None, 1, 2, 4])
def test_blocks_may_lie_in_chunks_or_in_one_list(tmp_path: Path, chunks: int | None) -> None:
    model = load_transformer(RECORDED / "var.pth", CONFIG.transformer)
    state = released_state(model, released_transformer(CONFIG.transformer.depth, chunks))
    first = "blocks.0." if chunks is None else "block_chunks.0.module.0."
    assert any(name.startswith(first) for name in state)
    again = load_transformer(save_pth(state, tmp_path), CONFIG.transformer)
    assert_equal(again.state_dict(), model.state_dict())


def test_a_tokenizer_may_lack_the_inner_names(tmp_path: Path) -> None:
    model = load_tokenizer(RECORDED / "vae.pth", CONFIG.tokenizer)
    state = released_state(model, released_tokenizer(inner_names=False))
    assert "decoder.up.1.upsample.conv.weight" in state
    assert "encoder.mid.block_1.norm1.weight" in state
    path = tmp_path / "vae.pth"
    torch.save({"epoch": 3, "vae": state}, path)
    assert_equal(load_tokenizer(path, CONFIG.tokenizer).state_dict(), model.state_dict())


def test_own_names_load_as_well(tmp_path: Path) -> None:
    model = load_transformer(RECORDED / "var.pth", CONFIG.transformer)
    path = save_shards(released_state(model, own_layout), tmp_path)
    assert_equal(load_transformer(path, CONFIG.transformer).state_dict(), model.state_dict())
    coder = load_tokenizer(RECORDED / "vae.pth", CONFIG.tokenizer)
    path = save_safetensors(released_state(coder, own_layout), tmp_path)
    assert_equal(load_tokenizer(path, CONFIG.tokenizer).state_dict(), coder.state_dict())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("save", [save_pth, save_shards])
def test_any_float_type_loads(tmp_path: Path, stored: torch.dtype, save: Save) -> None:
    state = {name: tensor.to(stored) for name, tensor in recorded_transformer().items()}
    model = load_transformer(save(state, tmp_path), CONFIG.transformer)
    expected = {name: tensor.float() for name, tensor in state.items() if "zero_k" not in name}
    assert_equal(released_state(model, released_transformer(4, chunks=2)), expected)


def test_products_are_kept_in_the_weight_type_and_the_rest_in_fp32() -> None:
    model = load_transformer(
        RECORDED / "var.pth", CONFIG.transformer, torch.float32, torch.bfloat16
    )
    released = recorded_transformer()
    assert torch.equal(
        model.get_parameter("text_memory.0.weight"),
        released["text_proj_for_ca.0.weight"].bfloat16(),
    )
    assert torch.equal(model.get_parameter("head.weight"), released["head.weight"])
    types = {p.dtype for name, p in model.named_parameters() if name.endswith(".qkv.weight")}
    assert types == {torch.bfloat16}


def test_missing_key_biases_are_zero(tmp_path: Path) -> None:
    state = {n: t for n, t in recorded_transformer().items() if not n.endswith("zero_k_bias")}
    model = load_transformer(save_pth(state, tmp_path), CONFIG.transformer)
    expected = load_transformer(RECORDED / "var.pth", CONFIG.transformer)
    assert_equal(model.state_dict(), expected.state_dict())


def test_a_loaded_model_is_for_inference() -> None:
    models = (
        load_transformer(RECORDED / "var.pth", CONFIG.transformer),
        load_tokenizer(RECORDED / "vae.pth", CONFIG.tokenizer),
    )
    for model in models:
        assert not model.training
        assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_loading_leaves_the_file_alone(tmp_path: Path) -> None:
    path = Path(shutil.copy(RECORDED / "var.pth", tmp_path))
    before = path.read_bytes()
    load_transformer(path, CONFIG.transformer).head.bias.zero_()
    assert path.read_bytes() == before


# Files that are not what they should be


class Poison:
    """Pickles as a call that makes a marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def write_poison(path: Path, marker: Path, form: str) -> None:
    poisoned = {"head.bias": torch.zeros(2), "step": Poison(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Poison(marker)))
    else:
        torch.save(poisoned, path, _use_new_zipfile_serialization=form == "archive")


def test_the_poison_works(tmp_path: Path) -> None:
    write_poison(tmp_path / "poison.pth", tmp_path / "marker", "archive")
    torch.load(tmp_path / "poison.pth", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", ["archive", "old format", "bare pickle"])
def test_a_poisoned_pickle_is_refused_and_never_run(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "poison.pth", tmp_path / "marker"
    write_poison(path, marker, form)
    for load in (
        lambda: open_weights(path),
        lambda: load_transformer(path, CONFIG.transformer),
        lambda: load_tokenizer(path, CONFIG.tokenizer),
    ):
        message = refusal(load)
        expected = "holds more than tensors ('step' is a posix.system): "
        assert (expected if form == "archive" else "not what torch.save writes") in message
        assert not marker.exists()


def test_a_poisoned_shard_is_refused_and_never_run(tmp_path: Path) -> None:
    save_bin_shards(recorded_transformer(), tmp_path)
    write_poison(tmp_path / "model-1.bin", tmp_path / "marker", "archive")
    message = refusal(lambda: load_transformer(tmp_path, CONFIG.transformer))
    assert "model-1.bin holds more than tensors" in message
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "extra",
    [3, "text", [torch.zeros(1)], {"nested": torch.zeros(1)}, torch.zeros(2).to_sparse(), None],
)
def test_a_state_dict_with_more_than_dense_tensors_is_refused(tmp_path: Path, extra: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**recorded_transformer(), "extra": extra}, path)
    assert "holds more than tensors ('extra' is a" in refusal(lambda: open_weights(path))


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save([torch.zeros(2)], path)
    assert "holds a list, not tensors by name" in refusal(lambda: open_weights(path))


@pytest.mark.parametrize("keep", [1, 3, 30, 1000, 0.1, 0.5, 0.9, 0.999, -1])
@pytest.mark.parametrize("save", [save_pth, save_safetensors, save_shards, save_bin_shards])
def test_a_file_that_was_cut_short_says_so(tmp_path: Path, save: Save, keep: float) -> None:
    path = save(recorded_transformer(), tmp_path)
    file = path if path.is_file() else next(path.glob("model-1.*"))
    size = file.stat().st_size
    os.truncate(file, int(size * keep) if 0 < keep < 1 else int(keep) % size)
    message = refusal(lambda: load_transformer(path, CONFIG.transformer))
    assert str(file) in message
    assert any(words in message for words in ("cut short", "not a whole", "not what torch.save"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors"])
def test_an_empty_file_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty" in refusal(lambda: open_weights(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weights.pth", "is not what torch.save writes, a zip archive: it starts with b'version"),
        ("weights.pt", "is not what torch.save writes"),
        ("weights.safetensors", "is not a whole safetensors file"),
        ("weights.txt", "is no known kind of weights: expected .safetensors, .pth"),
    ],
)
def test_a_text_file_says_what_it_is_not(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n" * 9)
    assert expected in refusal(lambda: open_weights(tmp_path / name))


def test_a_zip_archive_of_something_else_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "is cut short or damaged" in refusal(lambda: open_weights(tmp_path / "weights.pth"))


def test_a_compressed_checkpoint_is_never_misread(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(RECORDED / "var.pth") as stored,
        zipfile.ZipFile(tmp_path / "var.pth", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for record in stored.infolist():
            compressed.writestr(record.filename, stored.read(record))
    assert "is compressed" in refusal(lambda: open_weights(tmp_path / "var.pth"))


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    for name in ("weights.pth", "folder", "x" * 300):
        message = refusal(lambda name=name: open_weights(tmp_path / name))
        assert "there are no weights at" in message or "cannot read" in message


# Folders


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_shards(recorded_transformer(), tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    message = refusal(lambda: load_transformer(tmp_path, CONFIG.transformer))
    assert "lacks 1 of the 3 shards that model.safetensors.index.json names" in message
    assert "(model-2.safetensors): fetch them as well" in message


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    save_shards(recorded_transformer(), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-0.safetensors")
    message = refusal(lambda: open_weights(tmp_path))
    assert "places cfg_uncond in model-0.safetensors, which does not hold it" in message


def edit_index(folder: Path, shard: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["cfg_uncond"] = shard
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{}/outside.safetensors", "..", "a\0"])
def test_an_index_cannot_name_files_outside_the_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    save_shards(recorded_transformer(), folder)
    save_file(recorded_transformer(), tmp_path / "outside.safetensors")
    edit_index(folder, shard.format(tmp_path))
    assert "lacks 1 of the 4 shards" in refusal(lambda: open_weights(folder))


def test_a_shard_cannot_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    save_shards(recorded_transformer(), folder)
    (folder / "model-1.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model-1.safetensors").symlink_to("../outside.safetensors")
    assert "links to a file outside the folder" in refusal(lambda: open_weights(folder))


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    save_shards(recorded_transformer(), snapshot)
    blobs.mkdir()
    for i, shard in enumerate(sorted(snapshot.glob("*.safetensors"))):
        shard.rename(blobs / str(i))
        shard.symlink_to(f"../../blobs/{i}")
    assert_equal(open_weights(snapshot), recorded_transformer())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ],
)
def test_a_broken_index_says_so(tmp_path: Path, content: str, expected: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogateescape"))
    assert expected in refusal(lambda: open_weights(tmp_path))


def test_a_folder_without_weights_or_with_too_many_says_so(tmp_path: Path) -> None:
    assert "holds no weights" in refusal(lambda: open_weights(tmp_path))
    for name in ("one.pth", "two.pth"):
        shutil.copy(RECORDED / "var.pth", tmp_path / name)
    assert "several .pth files and no index" in refusal(lambda: open_weights(tmp_path))


# Tensors that are not the model's


def load_edited(tmp_path: Path, edit: Callable[[State], Any]) -> str:
    state = recorded_transformer()
    edit(state)
    path = save_pth(state, tmp_path)
    return refusal(lambda: load_transformer(path, CONFIG.transformer))


def test_all_mismatches_are_one_error_with_names_and_counts(tmp_path: Path) -> None:
    def edit(state: State) -> None:
        for name in [name for name in state if ".fc1." in name]:
            del state[name]
        state["head.weight"] = torch.zeros(3, 4)
        state["head.bias"] = torch.zeros(16, 1)
        state |= {"ema.decay": torch.zeros(1)}

    message = load_edited(tmp_path, edit)
    assert (
        "weights.pth does not fit: 8 missing (block_chunks.0.module.0.ffn.fc1.weight, " in message
    )
    assert "block_chunks.0.module.1.ffn.fc1.weight, ...), 1 unexpected (ema.decay), " in message
    assert "2 misshapen (head.weight [3, 4] for [16, 64], head.bias [16, 1] for [16])" in message
    assert message.endswith("give a whole checkpoint of the size asked for")


def test_the_same_elements_in_another_shape_do_not_pass(tmp_path: Path) -> None:
    message = load_edited(tmp_path, lambda s: s.update(pos_start=s["pos_start"].flatten()))
    assert "1 misshapen (pos_start [64] for [1, 1, 64])" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    message = load_edited(tmp_path, lambda s: s.update({"head.bias": s["head.bias"].to(dtype)}))
    kind = str(dtype).removeprefix("torch.")
    assert f"the weight head.bias is stored as {kind}: expected one of float64" in message


def test_a_key_bias_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    name = "block_chunks.1.module.0.ca.zero_k_bias"
    message = load_edited(tmp_path, lambda s: s[name].__setitem__(5, 1e-3))
    assert f"has a key bias ({name}) that is not zero" in message


@pytest.mark.parametrize(("given", "asked"), [("8b", "2b"), ("2b", "8b"), ("tiny-8b", "tiny-2b")])
def test_weights_of_another_size_or_component_are_recognised(given: str, asked: str) -> None:
    own, wrong = preset(given), preset(asked)
    layout = released_transformer(own.transformer.depth)
    weights = released_state(empty_transformer(own.transformer), layout)
    coder = released_state(empty_tokenizer(own.tokenizer), released_tokenizer())
    asked_transformer = empty_transformer(wrong.transformer)
    other = released_transformer(wrong.transformer.depth)
    message = refusal(lambda: fit(asked_transformer, weights, other, "var.pth"))
    assert message.startswith("var.pth does not fit: ") and len(message) < 1000
    assert f"this looks like the transformer of size {given}: pass --size {given}" in message
    asked_coder = empty_tokenizer(wrong.tokenizer), released_tokenizer()
    for model, its in (asked_coder, (asked_transformer, other)):
        message = refusal(lambda model=model, its=its: fit(model, coder, its, "vae.pth"))
        assert f"this looks like the tokenizer of size {given}: pass it as one" in message

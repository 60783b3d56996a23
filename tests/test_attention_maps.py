"""Maps of attention: of planted weights as calculated, of nano as the paper claims, and drawn."""

import os
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small import random_edits, random_var, small_config
from torch import Tensor

from varedit_export.attention.maps import AttentionMaps, LayerMap, layer_maps, recorded, words_of
from varedit_export.cli import main
from varedit_reference.config import Conditioning, ModelConfig, preset
from varedit_reference.rotary import BASE, scale_positions, source_positions
from varedit_reference.scale_loop import seeded
from varedit_reference.transformer import VAR, fused_attention, masked_attention
from varedit_runtime.grids import Grid

ROOT = Path(__file__).parent.parent
GRIDS = ((1, 1), (2, 2), (4, 4))
SHARPNESS = 20.0
HEAD = slice(2, 8), slice(5, 11)  # rows and columns of the finest tokens over the sample's head


def small(conditioning: Conditioning) -> ModelConfig:
    config = small_config(conditioning=conditioning)
    return replace(config, transformer=replace(config.transformer, grids=GRIDS))


def planted(config: ModelConfig) -> VAR:
    """Return a model whose attention depends on positions alone: all tokens enter it alike."""
    model = random_var(config)
    width = config.transformer.width
    model.shared_modulation.weight.data.zero_()
    model.shared_modulation.bias.data.zero_()
    for block in model.blocks:
        block.modulation.data[2] = -1  # LN(x)·(1 + scale1) + shift1 is shift1
        block.modulation.data[4] = 1
        block.self_attention.qkv.weight.data[: 2 * width] = torch.eye(width).repeat(2, 1)
        block.self_attention.query_bias.data.zero_()
        block.self_attention.log_scale.data.fill_(np.log(SHARPNESS))
        block.cross_attention.query.weight.data.zero_()
        block.cross_attention.query.bias.data.zero_()
    return model


def maps_of(model: VAR, config: ModelConfig) -> AttentionMaps:
    edits = random_edits(config, (5, 9))
    with recorded(model, range(config.transformer.depth)) as recorders:
        edits.run(model, seeded([1, 2]))
    words = tuple(f"w{i}" for i in range(9))
    nothing = Image.new("RGB", (8, 8))
    return AttentionMaps(GRIDS, words, layer_maps(model, recorders), nothing, nothing)


def calculated(config: ModelConfig, aligned: bool) -> list[np.ndarray]:
    """Return the attention of each scale: softmax of the mean cosine of the angles between."""
    transformer = config.transformer
    source = _points(source_positions(transformer), transformer.head_width)
    targets = [
        _points(scale_positions(transformer, k), transformer.head_width) for k in range(len(GRIDS))
    ]
    found = []
    for k, (rows, columns) in enumerate(GRIDS):
        seen = source
        if aligned:
            side = GRIDS[-1][0]
            cells = source.reshape(rows, side // rows, columns, side // columns, -1)
            seen = cells.mean((1, 3)).reshape(rows * columns, -1)
        keys = np.concatenate((seen, *targets[: k + 1]))
        scores = np.exp(SHARPNESS * np.real(targets[k] @ keys.conj().T))
        found.append(scores / scores.sum(1, keepdims=True))
    return found


def _points(places: Tensor, head_width: int) -> np.ndarray:
    """Return rotated unit vectors as complex numbers, one for each pair of channels."""
    frequencies = BASE ** (-np.arange(head_width // 4) * 2 / (head_width / 2))
    angles = (places.numpy()[:, :, None] * frequencies).reshape(len(places), -1)
    return np.exp(1j * angles) / np.sqrt(head_width / 2)


def test_planted_weights_give_the_calculated_maps() -> None:
    config = small("sar")
    maps = maps_of(planted(config), config)
    for number, layer in maps.layers.items():
        assert layer.source == (GRIDS if number == 0 else GRIDS[-1:])
        for k, expected in enumerate(calculated(config, number == 0)):
            own = layer.weights[sum(r * c for r, c in GRIDS[:k]) :][: len(expected)]
            seen = own[~np.isnan(own)].reshape(len(expected), -1)
            np.testing.assert_allclose(seen, expected, atol=1e-4)
    np.testing.assert_allclose(maps.layers[0].words[:, :5], 1 / 5, atol=1e-6)
    assert not maps.layers[0].words[:, 5:].any()  # the other picture's text is longer
    expected = calculated(config, True)[1]
    shares = expected[:, :4].sum(1).mean(), expected[:, 4].mean(), expected[:, 5:].sum(1).mean()
    found = maps.shares(0)
    np.testing.assert_allclose(found[1, [1, 3, 4]], shares, atol=1e-4)
    assert np.isnan(found[1, [0, 2, 5]]).all()


@pytest.mark.parametrize("conditioning", ["sar", "finest", "full"])
def test_every_conditioning_has_its_map(conditioning: Conditioning) -> None:
    config = small(conditioning)
    model = random_var(config)
    maps = maps_of(model, config)
    own = [r * c for r, c in GRIDS]
    for number, layer in maps.layers.items():
        source = {"sar": 16 + 5 * (number == 0), "finest": 16, "full": 21}[conditioning]
        assert layer.weights.shape == (21, source + 21)
        np.testing.assert_allclose(np.nansum(layer.weights, 1), 1, atol=1e-5)
        seen = (~np.isnan(layer.weights)).sum(1)
        for k, length in enumerate(own):
            first = sum(own[:k])
            before = length if conditioning == "sar" and number == 0 else source
            assert (seen[first : first + length] == before + sum(own[: k + 1])).all()
        assert np.nanmax(maps.distances(number)) < 2
        assert np.nansum(maps.shares(number), 1) == pytest.approx(np.ones(3), abs=1e-5)
    attention = model.blocks[0].self_attention.attend, model.blocks[0].cross_attention.attend
    assert attention == (fused_attention, masked_attention)


def grids_of(array: np.ndarray) -> tuple[Grid, ...]:
    return tuple((int(rows), int(columns)) for rows, columns in array)


def test_nano_looks_widely_first_and_deeper_nearby(tmp_path: Path) -> None:
    """As the paper says of SAR (its Figure 3)."""
    heat, words, arrays = (tmp_path / name for name in ("heat.png", "words.png", "maps.npz"))
    sample = ROOT / "docs/samples/person.png"
    told = ["-o", heat, "--words", words, "--arrays", arrays, "--layers", "0,5", "--seed", 3]
    line = ["attention", "nano", sample, "add a hat", *told]
    done = CliRunner().invoke(main, [*map(str, line)], prog_name="varedit-export")
    assert done.exit_code == 0, done.output
    with np.load(arrays) as loaded:
        found = dict(loaded)
    layers = {
        n: LayerMap(
            grids_of(found[f"source_grids.{n}"]), found[f"weights.{n}"], found[f"words.{n}"]
        )
        for n in (0, 5)
    }
    picture = Image.open(sample)
    maps = AttentionMaps(grids_of(found["grids"]), tuple(found["words"]), layers, picture, picture)
    lengths = np.array([rows * columns for rows, columns in maps.grids])
    even = lengths / (lengths + lengths.cumsum())  # all of the target so far gets the rest
    assert (np.diagonal(maps.shares(0)[:, :7]) > 0.9 * even).all()
    assert maps.shares(5)[-1, -1] > 1.2 * maps.shares(0)[-1, -1]  # the scale itself
    assert np.nanmin(maps.distances(0)) > 0.9 and maps.distances(5)[2:].max() < 0.65
    assert maps.words == ("add", "a", "hat", "</s>")
    hat = layers[5].words[-256:, 2].reshape(16, 16)
    assert hat[HEAD].mean() > 2.5 * hat.mean()
    for drawn in (heat, words):
        with Image.open(drawn) as image:
            assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 100


def test_pieces_become_words() -> None:
    assert words_of(["▁add", "▁a", "▁ha", "t", "</s>"]) == (
        ("add", "a", "hat", "</s>"),
        [0, 1, 2, 2, 3],
    )
    assert words_of(["a", "b", "Ġc", "</s>"]) == (("ab", "c", "</s>"), [0, 0, 1, 2])


def test_a_size_has_the_weights_that_build_would_take(tmp_path: Path) -> None:
    heat, arrays = (str(tmp_path / name) for name in ("heat.png", "maps.npz"))
    sample = str(ROOT / "docs/samples/person.png")
    size = ["tiny-2b", "--res", "256", "--random-weights", "0", "--conditioning", "full"]
    line = ["attention", *size, sample, "hat", "-o", heat, "--layers", "1", "--arrays", arrays]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0, done.output
    config = preset("tiny-2b", 256)
    tokens = sum(rows * columns for rows, columns in config.transformer.grids)
    with np.load(arrays) as loaded:
        assert loaded["weights.1"].shape == (tokens, 2 * tokens)
        assert grids_of(loaded["grids"]) == config.transformer.grids


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nano", "--res", "256"], "--res is for a SIZE: a bundle has weights of its own"),
        (["tiny-2b", "--res", "256", "--variant", "a"], "--variant is for a bundle"),
        (["tiny-2b", "--res", "256"], "checkpoint"),
    ],
)
def test_options_of_the_other_kind_of_model_are_refused(
    words: list[str], said: str, tmp_path: Path
) -> None:
    line = ["attention", *words, "a.png", "add a hat", "-o", str(tmp_path / "heat.png")]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 1 and said in done.output, done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "heat.jpg"], "must end in .png"),
        (["-o", "heat.png", "--arrays", "maps.npy"], "must end in .npz"),
        (["-o", "heat.png", "--layers", "0,6"], "no layer 6: the model has 0 to 5"),
        (["-o", "heat.png", "--layers", "first"], "are no layers"),
        (["-o", "heat.png", "--layers", "9" * 5000], "are no layers"),
        (["-o", str(ROOT / "docs/samples/person.png")], "exists: choose another name"),
        (["-o", "nowhere/heat.png"], "cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = str(ROOT / "docs/samples/person.png")
    done = CliRunner().invoke(main, ["attention", "nano", sample, "add a hat", *options])
    assert done.exit_code in (1, 2) and said in done.output
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr("varedit_export.attention.maps.bundle_maps", lambda *_, **__: None)
    monkeypatch.setattr("varedit_export.attention.drawing.draw_self_attention", full)
    heat = str(tmp_path / "heat.png")
    done = CliRunner().invoke(main, ["attention", "nano", "a.png", "add a hat", "-o", heat])
    assert done.exit_code == 1
    assert done.stderr == f"Error: {heat} cannot be written: No space left on device\n"

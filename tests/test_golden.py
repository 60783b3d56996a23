"""The reference against recordings of the released implementation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from recorder import record
from safetensors.torch import load_file, save_file

from varedit_reference.golden.__main__ import main
from varedit_reference.golden.recordings import check, open_recording
from varedit_runtime.errors import CheckpointError


def test_every_stage_agrees_with_the_recording(recording_folder: Path) -> None:
    recording = open_recording(recording_folder)
    lines = list(check(recording))
    assert not [line for line in lines if not line.passed]
    stages = {line.stage.split(",")[0] for line in lines}
    assert {"preprocessed image", "encoder features", "quantised sum", "pooled text"} <= stages
    logits = [line for line in lines if line.stage.startswith("guided logits")]
    assert len(logits) == len(recording.config.transformer.grids)


# A nudge of each kind of tensor, far under what a wrong formula gives, has to be noticed.
NUDGES = {
    "out.preprocessed_image": 1e-6,
    "out.encoder_features": 2e-4,
    "out.source_tokens": 2e-4,
    "out.quantized_sum": 2e-4,
    "out.text_pooled": 2e-5,
    "out.scale_input_tokens.3": 2e-5,
    "out.guided_logits.6": 3e-4,
    "out.bit1_probability.0": 1e-4,
    "debug.block2.scale1": 1e-3,
    "out.image_rgb_u8": 2,
    "out.restored_image_rgb_u8": 3,
}


@pytest.mark.parametrize(("tensor", "nudge"), NUDGES.items())
def test_a_wrong_value_exceeds_its_tolerance(tensor: str, nudge: float) -> None:
    folder = Path(__file__).parent / "golden" / "tiny2b-256"
    recording = open_recording(folder)
    values = recording.tensors[tensor]
    place = int((values.flatten().float() - 0.5).abs().argmin())  # away from a clamp
    values.flatten()[place] += nudge if values.is_floating_point() else int(nudge)
    assert any(not line.passed for line in check(recording))


def test_a_flipped_bit_is_noticed() -> None:
    recording = open_recording(Path(__file__).parent / "golden" / "tiny8b-256")
    recording.tensors["out.quantizer_bits.2"] ^= 1
    assert any(not line.passed for line in check(recording))


def test_nan_never_passes() -> None:
    recording = open_recording(Path(__file__).parent / "golden" / "tiny2b-256")
    recording.tensors["out.guided_logits.4"][0, 0, 0] = torch.nan
    assert "guided logits, scale 4" in {m.stage for m in check(recording) if not m.passed}


def test_command_prints_every_stage_and_exits_by_the_verdict(tmp_path: Path) -> None:
    good = Path(__file__).parent / "golden" / "tiny2b-256"
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    tensors = load_file(bad / "golden.safetensors")
    tensors["out.guided_logits.1"] += 1
    save_file(tensors, bad / "golden.safetensors")

    passed = CliRunner().invoke(main, [str(good)])
    assert passed.exit_code == 0, passed.output
    assert "guided logits, scale 6" in passed.output
    failed = CliRunner().invoke(main, [str(good), str(bad)])
    assert failed.exit_code == 1
    assert "EXCEEDED" in failed.output


def test_a_folder_that_is_no_recording_is_one_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a recording"):
        open_recording(tmp_path)
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 2  # the folder's name, then the error


def test_a_broken_recording_does_not_hide_the_others(tmp_path: Path) -> None:
    good = Path(__file__).parent / "golden" / "tiny2b-256"
    result = CliRunner().invoke(main, [str(tmp_path), str(good)])
    assert result.exit_code == 1
    assert "not a recording" in result.stderr
    assert "restored picture" in result.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", None), ("tau", 0), ("cfg", [4.0]), ("num_heads", 0), ("depth", []), ("pn", "2M")],
)
def test_a_setting_that_makes_no_sense_is_one_typed_error(
    tmp_path: Path, name: str, value: Any
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(Path(__file__).parent / "golden" / "tiny2b-256", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, name: value}))
    with pytest.raises(CheckpointError, match="not a recording"):
        open_recording(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "depth": 6,
            "block_chunks": 3,
            "embed_dim": 128,
            "num_heads": 8,
            "tau": [0.5] * 3 + [1] * 4,
        },
        {"cfg": 1, "pn": "0.25M", "depth": 2, "text_len": 512},
        {"neg_len": 3, "text_channels": 256, "cfg": [3.0] * 6 + [1.0]},
        {
            **{"pn": "1M", "codebook_dim": 3, "patch": 8, "ch_mult": [1, 1, 1, 1], "patchify": 1},
            **{"depth": 1, "block_chunks": 1, "cfg": 2.0, "neg_len": 9},
        },
    ],
)
def test_any_recording_of_the_format_is_checked(tmp_path: Path, changes: dict[str, Any]) -> None:
    recording = open_recording(record(tmp_path / "recording", **changes))
    lines = list(check(recording))
    assert not [line for line in lines if not line.passed]
    recording.tensors["out.guided_logits.6"] += 1e-3
    assert any(not line.passed for line in check(recording))

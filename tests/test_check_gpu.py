"""The script that tries every backend on a GPU leaves its report wherever it is run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import check_gpu
import pytest
import torch
from check_device import CHECKS
from check_gpu import EAGER, Trial, Way
from torch import nn

from varedit_reference.transformer import Linear
from varedit_runtime.locate import embedded


def test_a_report_is_left_whatever_fails(tmp_path: Path) -> None:
    shutil.copytree(embedded(), tmp_path / "nano")
    script = Path(__file__).with_name("check_gpu.py")
    options = ["-o", str(tmp_path), "--model", "nano", "--repeat", "1"]
    told = 0
    for chosen in (["device"], ["onnxruntime", "tensorrt", "tensorrt-rtx"]):
        parts = [option for part in chosen for option in ("--part", part)]
        command = [sys.executable, str(script), *options, *parts]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told += len(done.stdout.splitlines())
    report = json.loads((tmp_path / "report.json").read_text())
    ways = {way["name"]: way for way in report["ways"]}
    assert len(ways) == told == len(CHECKS) + 8  # what an earlier call found is kept
    cpu = ways["onnxruntime cpu"]
    assert cpu["verified"] and not cpu["failed"] and cpu["edit"] > 0 and cpu["opening_again"] > 0
    assert (cpu["eager"] is None) == (cpu["ratio"] is None) == (not torch.cuda.is_available())
    assert {"prefill", "scale_06", "image_decoder"} <= cpu["steps"].keys()
    markdown = (tmp_path / "report.md").read_text()
    for name, way in ways.items():
        (row, *_) = (line for line in markdown.splitlines() if f"| {name} |" in line)
        assert way["failed"] in row


def test_what_was_found_before_a_way_was_given_up_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ['{"verified": true}', '{"verified": true, "edit": 0.5}', '{"verified": true, "e']
    done = CompletedProcess([], 1, "\n".join(lines), "given up")
    monkeypatch.setattr(check_gpu, "_run", lambda command, limit: done)
    trial = Trial(tmp_path, repeat=1, limit=60)
    way = check_gpu._tried(Way("nano", "onnxruntime cuda", compiling=2), tmp_path, trial)
    expected = Way("nano", "onnxruntime cuda", 2, verified=True, edit=0.5, failed="given up")
    assert way == expected


def test_what_a_process_said_before_it_was_given_up_is_kept() -> None:
    slow = "import time; print('said', flush=True); time.sleep(600)"
    done = check_gpu._run([sys.executable, "-c", slow], 5)
    assert (done.returncode, done.stdout) == (1, "said\n")
    assert check_gpu._said(done) == "given up after 5 s"


def test_the_report_has_what_is_known_and_says_what_eager_is() -> None:
    ways = [
        Way("nano", "a", verified=True, edit=0.5, by_steps=0.6, opening=3, failed="given up"),
        Way("nano", "b", verified=False, edit=0.5, by_steps=0.6, eager=1, ratio=2, opening=3),
        Way("nano", "c", failed="no GPU"),
    ]
    report = {"date": "2026-01-01", "command": "python", "machine": "none"}
    text = "\n".join(check_gpu._markdown(report, ways))
    assert "| nano | a | holds; given up | 500.0 | 600.0 |  |  |" in text
    assert "| nano | b | **fails** | 500.0 | 600.0 | 1000.0 | 2.00x |" in text
    assert "| nano | c | no GPU |  |  |  |  |" in text
    assert EAGER in text and "| nano | a |  |  | 3.0 |" in text


@torch.inference_mode()
def test_eager_casts_weights_once() -> None:
    product = Linear(8, 4, compute_dtype=torch.float32, weight_dtype=torch.float32)
    model = nn.Sequential(product, nn.Linear(4, 4))
    product.compute_dtype = torch.float16
    before = product(torch.ones(2, 8))
    check_gpu.compute_in_fp16(model)
    assert product.weight.dtype == product.compute_dtype == torch.float16
    assert model[1].weight.dtype == torch.float32
    assert torch.equal(product(torch.ones(2, 8)), before)

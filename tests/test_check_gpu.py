"""The script that tries every backend on a GPU leaves its report wherever it is run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from varedit_runtime.locate import embedded


def test_a_report_is_left_whatever_fails(tmp_path: Path) -> None:
    shutil.copytree(embedded(), tmp_path / "nano")
    script = Path(__file__).with_name("check_gpu.py")
    options = ["-o", str(tmp_path), "--model", "nano", "--repeat", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, check=True
    )
    report = json.loads((tmp_path / "report.json").read_text())
    ways = {way["name"]: way for way in report["ways"]}
    assert len(ways) == len(done.stdout.splitlines()) == 8
    cpu = ways["onnxruntime cpu"]
    assert cpu["verified"] and not cpu["failed"] and cpu["edit"] > 0 and cpu["ratio"] > 0
    assert {"prefill", "scale_06", "image_decoder"} <= cpu["steps"].keys()
    markdown = (tmp_path / "report.md").read_text()
    for name, way in ways.items():
        (row, *_) = (line for line in markdown.splitlines() if f"| {name} |" in line)
        assert way["failed"] in row

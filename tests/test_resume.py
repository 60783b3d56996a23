"""Builds that are killed: what is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 10

# Everything is imported once, and every build is a fork of that. A build is killed in the middle of
# what it does to the files of its bundle, as often as it is told to, counted from its beginning.
BUILDS = """
import json, os, random, signal, sys
from pathlib import Path
import bundles
from varedit_export.assemble import assemble
from varedit_export.plan import BundlePlan
from varedit_export.sources import random_sources
from varedit_export.parity import compare_bundle
import onnx_ir, onnxscript, torch.onnx, torch.export
from dataclasses import replace

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
config = bundles.bundle_config()
transformer = replace(config.transformer, grids=config.transformer.grids[:3])
config = replace(config, transformer=transformer)

def run(target, kill_at):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            counted = count_of(target, kill_at)
            # The shapes of a bundle that other tests trace, too.
            shapes = {"resolution": 64, "text_tokens": 16}
            wanted = replace(bundles.request(target), config=config, **shapes)
            sources = replace(random_sources(config, seed=0), text=None)
            assemble(BundlePlan([wanted], sources), bundles.quiet)
            target.with_suffix(".events").write_text(str(counted[0]))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]

def count_of(target, kill_at):
    counted = [0]
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.link", "os.mkdir"):
            if target.name in str(arguments[0]):
                counted[0] += 1
                if counted[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return counted

assert run(folder / "whole", 0) == 0
events = int((folder / "whole.events").read_text())
draw = random.Random(0)
killed = []
while len(killed) < kills:
    # Spread over the build, of which every attempt finds more done.
    at = draw.randint(1, max(events // 3, 2))
    if run(folder / "killed", at) == signal.SIGKILL:
        killed.append(at)
assert run(folder / "killed", 0) == 0
print(json.dumps({"events": events, "killed": killed}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of itself")
def test_a_build_that_is_killed_ten_times_comes_out_the_same(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", BUILDS, str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path)),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout.splitlines()[-1])["killed"]) == KILLS
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    manifest, other = (json.loads(c.pop("manifest.json")) for c in (whole, killed))
    for files in (whole, killed):
        files.pop("manifest.sha256")  # of the name, too
    assert whole == killed
    assert (manifest.pop("name"), other.pop("name")) == ("whole", "killed")
    assert manifest == other
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

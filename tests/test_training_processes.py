"""Training in two processes (FSDP2, gloo on the CPU) is training in one."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_training import options, written_pairs

import varedit_export
from varedit_export import TrainOptions
from varedit_reference.weights_file import open_weights
from varedit_runtime.errors import ConfigError

SECONDS = 300  # in which both processes end, or the test fails

# The options of several runs, one after the other, each with a port to meet at.
CODE = """
import os, pickle, sys, torch, varedit_export
torch.set_num_threads(1)
for port, options in pickle.load(open(sys.argv[1], "rb")):
    os.environ["MASTER_PORT"] = str(port)
    varedit_export.train(options, print)
"""


@pytest.fixture(autouse=True)
def gradients(no_gradients: None) -> Iterator[None]:
    with torch.enable_grad():
        yield


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_in_two(runs: list[TrainOptions], folder: Path) -> None:
    """Train in two processes as torchrun would start them. Fails if they take too long."""
    given = folder / "runs.pickle"
    given.write_bytes(pickle.dumps([(free_port(), one) for one in runs]))
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
    }
    children = []
    try:
        for rank in ("0", "1"):
            own = environment | {"RANK": rank, "LOCAL_RANK": rank}
            with (folder / f"{rank}.txt").open("wb") as output:
                command = [sys.executable, "-W", "ignore", "-c", CODE, str(given)]
                children.append(subprocess.Popen(command, env=own, stdout=output, stderr=output))
        codes = [child.wait(SECONDS) for child in children]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for child in children:
            child.kill()
            child.wait()
    told = "\n".join((folder / f"{rank}.txt").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], told


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Losses, what is learned, and what a checkpoint holds are those of one process."""
    pairs = written_pairs(tmp_path)
    settings = {"batch": 4, "steps": 2, "report_every": 2}
    kinds = {"full": None, "lora": 2}
    runs = {k: options(pairs, tmp_path / k, lora=r, **settings) for k, r in kinds.items()}
    train_in_two([*runs.values()], tmp_path)
    for kind, given in runs.items():
        alone = tmp_path / f"{kind}-alone"
        expected = varedit_export.train(options(pairs, alone, lora=kinds[kind], **settings))
        two, one = ((folder / "log.jsonl").read_text() for folder in (Path(given.output), alone))
        for line, other in zip(two.splitlines(), one.splitlines(), strict=True):
            assert json.loads(line) == pytest.approx(json.loads(other), rel=1e-4), kind
        again = varedit_export.train(given)  # goes on, in one process, behind the last step
        for name, weight in open_weights(expected).items():
            torch.testing.assert_close(open_weights(again)[name], weight, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "1.txt").read_text() == ""  # the first process speaks


def test_processes_share_batches_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varedit_export.training.parallel.processes", lambda: 3)
    with pytest.raises(ConfigError, match="--batch is 4, which 3 processes cannot share"):
        varedit_export.plan_train(options(tmp_path, tmp_path, batch=4))

"""The threads that an editor starts: counted in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_cuda import pretend

from varedit_runtime.editing.editor import Editor
from varedit_runtime.locate import embedded

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="they are not listed")

SESSIONS = 6
COUNT = """
import os
import onnxruntime
from PIL import Image
from varedit_runtime import Editor
from varedit_runtime.errors import BackendError
from varedit_runtime.locate import embedded

def count():
    return len(os.listdir("/proc/self/task"))

def drawn(threads):
    before = count()
    with Editor.open(embedded(), backend="onnxruntime", threads=threads) as editor:
        started = count() - before
        image = editor.edit(Image.new("RGB", (32, 32), "teal"), "red", seed=1).image
    return started, image
"""


def run(script: str) -> list[str]:
    asked = [sys.executable, "-c", COUNT + script]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()


def test_each_session_has_the_threads_that_were_asked_for_and_no_more() -> None:
    started = run("for threads in (1, 2, 5): print(drawn(threads)[0])")
    assert list(map(int, started)) == [0, SESSIONS, 4 * SESSIONS]


def test_the_pool_of_a_process_serves_all_sessions() -> None:
    script = """
before = count()
onnxruntime.set_global_thread_pool_sizes(3, 1)
started, image = drawn(None)
print(count() - before, started, drawn(None)[1] == image)
try:
    drawn(2)
except BackendError as error:
    print(error)
"""
    said = (
        "this program has one pool of threads for all sessions of ONNX Runtime: leave out threads"
    )
    assert run(script) == ["2 0 True", said]


def test_no_threads_wait_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = pretend(monkeypatch)
    with Editor.open(embedded(), provider="cuda"):
        assert {session.settings.intra_op_num_threads for session in sessions} == {1}

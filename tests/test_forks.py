"""An editor in a child that was forked: an error, never a crash, and nobody waits forever.

Forks are made in processes of their own, which must end by themselves.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")

BEGIN = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from PIL import Image
from varedit_runtime import Editor
from varedit_runtime.errors import EditorError
from varedit_runtime.locate import embedded

PICTURE = Image.new("RGB", (32, 32), "teal")

def edit(editor, **options):
    return editor.edit(PICTURE, "red", seed=1, **options).image

def refused(use):
    try:
        use()
    except EditorError as error:
        return "opened before this process was forked" in str(error)

def ended_well(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

editor = Editor.open(embedded(), backend="onnxruntime", threads=2)
told = []
expected = edit(editor, on_scale=told.append)
prepared = editor.prepare(PICTURE, "red", seed=1)
"""

USED_IN_THE_CHILD = """
child = os.fork()
if not child:
    uses = (
        lambda: edit(editor),
        lambda: editor.edit_prepared([prepared]),
        lambda: editor.prepare(PICTURE, "red"),
        lambda: editor.backend,
        lambda: editor.grouping,
        lambda: editor.forget(),
        lambda: editor.swap_weights(embedded()),
        lambda: told[0].preview(),
    )
    assert all(map(refused, uses)), list(map(refused, uses))
    with editor:
        pass
    editor.close()
    with Editor.open(embedded(), backend="onnxruntime", threads=2) as own:
        assert edit(own) == expected
    del editor
    sys.exit()
print(ended_well(child), edit(editor) == expected)
"""

WHILE_OTHERS_EDIT = """
begun, stop = threading.Event(), False

def run():
    while not stop:
        edit(editor)
        begun.set()

threads = [threading.Thread(target=run) for _ in range(2)]
for thread in threads:
    thread.start()
begun.wait()
children = []
for _ in range(10):
    child = os.fork()
    if not child:
        assert refused(lambda: edit(editor))
        editor.close()
        sys.exit()
    children.append(child)
ended = all(map(ended_well, children))
stop = True
for thread in threads:
    thread.join()
print(ended, edit(editor) == expected)
"""

INSIDE_ON_SCALE = """
child = None

def fork(progress):
    global child
    if child is None:
        child = os.fork()

try:
    same = edit(editor, on_scale=fork) == expected
except EditorError as error:
    sys.exit("opened before this process was forked" not in str(error) or bool(child))
print(ended_well(child), same)
"""


@pytest.mark.parametrize("script", [USED_IN_THE_CHILD, WHILE_OTHERS_EDIT, INSIDE_ON_SCALE])
def test_a_forked_editor_is_an_error_in_the_child_alone(script: str) -> None:
    asked = [sys.executable, "-c", BEGIN + script]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True True\n" and not done.returncode, done.stderr

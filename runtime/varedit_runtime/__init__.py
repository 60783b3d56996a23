"""The runtime: edits pictures with a bundle, without PyTorch.

    from varedit_runtime import Editor

    with Editor.open("bundles/2b-512") as editor:
        result = editor.edit("photo.png", "add a hat", seed=7)
    result.image.save("edited.png")

- `editing/`: edits, as a library: the `Editor`, the check of its arguments, masks.
- `pipeline.py`: the same with the call of diffusers' pipelines.
- `cli.py`, `commands/`, `terminal/`: the `varedit-run` command; `bench.py`: how fast a
  backend is, with the report in `bench_report.py`.
- `backends/`: the registry of what can run the stages of an edit: ONNX Runtime, or compiled engines
  on a GPU; and what a machine has for them.
- `bundle.py`, `manifest.py`, `locate.py`: opening bundles, checking them, finding them.
- `pictures.py`: pictures in and out, exactly as the released models see them; `decoding/`: files
  from strangers.
- `text.py`, `noise.py`, `values.py`, `grids.py`, `geometry.py`: what the reference and the graphs
  must compute in the same way.
- `files.py`: reading files that may change or disappear; `errors.py`: the errors to catch.
"""

import os
from importlib import import_module

# As in typing, which takes longer to import than a command that is interrupted may wait.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from varedit_runtime.backends.handle import EditHandle
    from varedit_runtime.editing.editor import Editor
    from varedit_runtime.editing.prepared import PreparedEdit
    from varedit_runtime.editing.preparer import Preparer
    from varedit_runtime.editing.results import EditResult, Progress

# ONNX Runtime reads this when it is imported. Unset, it writes a device ID to the user's home and
# reports to its makers. Whoever wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "EditHandle": "backends.handle",
    "EditResult": "editing.results",
    "Editor": "editing.editor",
    "PreparedEdit": "editing.prepared",
    "Preparer": "editing.preparer",
    "Progress": "editing.results",
}

__all__ = ["EditHandle", "EditResult", "Editor", "PreparedEdit", "Preparer", "Progress"]


def __getattr__(name: str) -> object:
    """Import a class, and with it NumPy and more, when it is first used."""
    if name in _MODULES:
        return getattr(import_module(f"varedit_runtime.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

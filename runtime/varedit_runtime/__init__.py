"""What edits a picture, without PyTorch, and what every other part must agree with it on.

    from varedit_runtime import Editor

    with Editor.open("bundles/2b-512") as editor:
        result = editor.edit("photo.png", "add a hat", seed=7)
    result.image.save("edited.png")

- `editor.py`: edits, as a library; `cli.py`, `command.py`: the `varedit-run` command.
- `backend.py`, `wiring.py`: the stages that every backend runs, and which memory each tensor is.
- `onnx_backend.py`: the graphs on ONNX Runtime; `bench.py`: how fast a backend is.
- `engine_backend.py`: compiled engines on a GPU; `gpu_memory.py`, `gpu_weights.py`: where all of it
  lies; `device.py`, `cuda_device.py`: the GPU; `engine_set.py`, `packing.py`: engines on disk.
- `bundle.py`, `manifest.py`, `locate.py`: bundles, what they say of themselves, where they are.
- `pictures.py`: pictures in and out, exactly as the released models see them.
- `text.py`, `noise.py`, `settings.py`, `grids.py`, `resizing.py`: what the reference and the graphs
  must read in the same way.
- `errors.py`: every error a caller may want to catch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varedit_runtime.editor import Editor, EditResult, Progress

__all__ = ["EditResult", "Editor", "Progress"]


def __getattr__(name: str) -> Any:
    """Import what edits, and with it numpy and ONNX Runtime, when it is first asked for."""
    if name in __all__:
        return getattr(import_module("varedit_runtime.editor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Nodes for ComfyUI: load a bundle, and edit pictures with it.

Link this folder into ComfyUI's `custom_nodes`, and install varedit-export into its environment.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]: ComfyUI's own
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]
from PIL import Image

from varedit_runtime import EditHandle, Editor, EditResult, Progress
from varedit_runtime.backends import BACKENDS
from varedit_runtime.backends.auto import AUTO
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import EditCancelled
from varedit_runtime.locate import named
from varedit_runtime.manifest import Variant

CATEGORY = "image/varedit"
LARGEST_PREVIEW = 512  # pixels of the longest side
PATIENCE = 0.1  # seconds after which an interrupt is noticed
EditorType = io.Custom("VAREDIT_EDITOR")


class LoadBundle(io.ComfyNode):
    """Opens a bundle. It stays open as long as ComfyUI keeps this node's output."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="VAREditLoadBundle",
            display_name="Load VAREdit Bundle",
            category=CATEGORY,
            inputs=[
                io.String.Input(
                    "bundle", default="nano", tooltip="One of your bundles, or the path of one."
                ),
                io.Combo.Input("backend", options=[AUTO, *BACKENDS], default=AUTO),
            ],
            outputs=[EditorType.Output(display_name="editor")],
        )

    @classmethod
    def fingerprint_inputs(cls, bundle: str, backend: str) -> str:
        """Let ComfyUI open a bundle again once another one was built in its place."""
        return Bundle.open(named(bundle)).digest

    @classmethod
    def execute(cls, bundle: str, backend: str) -> Any:
        return io.NodeOutput(Editor.open(named(bundle), backend=backend))


class Edit(io.ComfyNode):
    """Edits a batch of pictures, with a mask for all of them or for each."""

    @classmethod
    def define_schema(cls) -> Any:
        own = "0: as the bundle says."
        return io.Schema(
            node_id="VAREditEdit",
            display_name="VAREdit Edit",
            category=CATEGORY,
            inputs=[
                EditorType.Input("editor"),
                io.Image.Input("image"),
                io.String.Input("prompt", multiline=True),
                io.String.Input("negative_prompt", multiline=True, default=""),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Float.Input("guidance_scale", default=0, min=0, max=100, step=0.1, tooltip=own),
                io.Float.Input("temperature", default=0, min=0, max=10, step=0.01, tooltip=own),
                io.Int.Input(
                    "previews", default=3, min=0, max=20, tooltip="Each takes time to decode."
                ),
                io.Mask.Input("mask", optional=True, tooltip="Only what is masked may change."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls,
        editor: Editor,
        image: torch.Tensor,
        prompt: str,
        negative_prompt: str,
        seed: int,
        guidance_scale: float,
        temperature: float,
        previews: int,
        mask: torch.Tensor | None = None,
    ) -> Any:
        sources = _pictures(image)
        with _ended_by_interrupts() as handle:
            results = editor.edit(
                sources,
                prompt,
                negative_prompt=negative_prompt or None,
                mask=None if mask is None else _spread(_pictures(mask), len(sources)),
                guidance_scale=guidance_scale or None,
                temperature=temperature or None,
                seed=seed,
                on_scale=_Told(len(sources), editor.variant, previews),
                handle=handle,
            )
        return io.NodeOutput(_tensor(results, sources[0].mode))


class _Told:
    """Shows the progress of an edit, and previews after scales that are spread evenly."""

    def __init__(self, pictures: int, variant: Variant, previews: int) -> None:
        self._scales = len(variant.grids)
        self._bar = ProgressBar(-(-pictures // variant.batch) * self._scales)
        last = self._scales - 1
        self._shown = {last * (n + 1) // (previews + 1) for n in range(previews)}

    def __call__(self, progress: Progress) -> None:
        preview = None
        if progress.scale in self._shown:
            image = progress.preview(progress.pictures[0]).convert("RGB")
            preview = ("JPEG", image, LARGEST_PREVIEW)
        self._bar.update_absolute(self._bar.current + 1, preview=preview)


@contextmanager
def _ended_by_interrupts() -> Iterator[EditHandle]:
    """Yield a handle that ComfyUI's interrupt cancels; raise what ComfyUI expects of it."""
    handle, over = EditHandle(), Event()

    def watch() -> None:
        while not over.wait(PATIENCE):
            if model_management.processing_interrupted():
                handle.cancel()

    watching = Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield handle
    except EditCancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise
    finally:
        over.set()
        watching.join()


def _pictures(batch: torch.Tensor) -> list[Image.Image]:
    """Return the pictures of a tensor [B, H, W, C] or masks of one [B, H, W], of 0 to 1."""
    pixels = (batch.detach().cpu().float().numpy() * 255).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(one) for one in pixels]


def _spread(masks: list[Image.Image], count: int) -> list[Image.Image]:
    return masks * count if len(masks) == 1 else masks


def _tensor(results: Sequence[EditResult], mode: str) -> torch.Tensor:
    """Return results as a tensor [B, H, W, C]. Opaque ones get the alpha that others have."""
    pixels = [np.array(one.image.convert(mode), np.float32) for one in results]
    return torch.from_numpy(np.stack(pixels) / 255)


class VAREditExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self) -> list[Any]:
        return [LoadBundle, Edit]


async def comfy_entrypoint() -> VAREditExtension:
    return VAREditExtension()

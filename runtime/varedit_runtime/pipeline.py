"""A pipeline that is called as those of diffusers are, without diffusers.

    pipe = VAREditPipeline.from_pretrained("bundles/2b-512")
    pipe(image=photo, prompt="add a hat").images[0].save("edited.png")

PyTorch is needed only for its generators and tensors. `Editor` has more: see `pipe.editor`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.results import EditResult, Progress
from varedit_runtime.errors import ConfigError, EditCancelled, shown
from varedit_runtime.locate import named
from varedit_runtime.values import entries

PREVIEW = "preview"  # what a callback can ask for
OUTPUT_TYPES = ("pil", "np", "pt")
SLACK = 0.01  # by which resizing makes numbers pass 0 and 1
SEEDS = 2**53  # drawn ones are below, exact in JSON too

# Called with the pipeline, the scale twice (as step and time step), and what it asked for.
OnStepEnd = Callable[["VAREditPipeline", int, int, dict[str, Any]], Mapping[str, Any] | None]


@dataclass
class VAREditPipelineOutput:
    """What a call returns; `output["images"]` and `output[0]` are the images too.

    images: as `output_type` says. seeds: one for each image. warnings: lines for each image.
    """

    images: Any
    seeds: list[int]
    warnings: list[tuple[str, ...]]

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


class VAREditPipeline:
    """Edits pictures with an editor; made by `from_pretrained`."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._interrupt = False  # diffusers' name: a callback sets it to end the call

    @classmethod
    def from_pretrained(cls, bundle: str, **options: Any) -> "VAREditPipeline":
        """Open a bundle by its name or path. options: those of `Editor.open`, such as backend."""
        return cls(Editor.open(named(bundle) if isinstance(bundle, str) else bundle, **options))

    @property
    def num_timesteps(self) -> int:
        """The number of scales, after each of which a callback is called."""
        return len(self.editor.variant.grids)

    def __call__(
        self,
        *,
        image: Any,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        mask_image: Any = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> VAREditPipelineOutput | tuple[Any, ...]:
        """Edit one picture or a list of them as `Editor.edit` does.

        image, mask_image: Pillow images, what else `Editor.edit` takes, arrays [H, W, C] or
        [B, H, W, C] of 0 to 1 or of uint8, or tensors [C, H, W] or [B, C, H, W] of the same; lists
        of these. Of a mask only what is white may change. guidance_scale: by default the bundle's.
        num_inference_steps: the model's number of scales, which it has anyway, or None.
        generator: a torch.Generator, from which a seed is drawn, or one for each result.
        output_type: "pil", "np" for an array [B, H, W, C] or "pt" for a tensor [B, C, H, W], of 0
        to 1. callback_on_step_end: called after each scale; what it returns is not used.
        callback_on_step_end_tensor_inputs: ("preview",) for it to be given the pictures so far.

        Raises what `Editor.edit` raises; EditCancelled also if a callback set `pipe._interrupt`.
        """
        self._check(output_type, num_inference_steps)
        self._interrupt = False
        results = self.editor.edit(
            _pictures(image),
            prompt,
            negative_prompt=negative_prompt,
            mask=_pictures(mask_image),
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=_seeds(generator),
            on_scale=self._on_scale(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        results = [results] if isinstance(results, EditResult) else results
        images = _converted([one.image for one in results], output_type)
        seeds, warned = [one.seed for one in results], [one.warnings for one in results]
        output = VAREditPipelineOutput(images, seeds, warned)
        return output if return_dict else output.to_tuple()

    def _check(self, output_type: object, steps: object) -> None:
        if output_type not in OUTPUT_TYPES:
            told = ", ".join(OUTPUT_TYPES)
            raise ConfigError(f"output_type is {shown(output_type)}; give one of {told}")
        if steps not in (None, self.num_timesteps):
            told = f"num_inference_steps is {shown(steps)}"
            raise ConfigError(f"{told}; the model has {self.num_timesteps}: leave it out")

    def _on_scale(
        self, callback: OnStepEnd | None, wanted: Sequence[str]
    ) -> Callable[[Progress], None] | None:
        if callback is None:
            return None
        wanted = getattr(callback, "tensor_inputs", wanted)  # of diffusers' own callbacks
        if unknown := set(wanted) - {PREVIEW}:
            raise ConfigError(f"a callback can be given {PREVIEW} alone, not {shown(unknown)}")

        def on_scale(progress: Progress) -> None:
            given = {name: progress.preview() for name in wanted}
            callback(self, progress.scale, progress.scale, given)
            if self._interrupt:
                raise EditCancelled("the edit was interrupted by its callback")

        return on_scale


def _pictures(value: Any) -> Any:
    """Return pictures as the editor takes them: one, or a list."""
    pictures = list(_each(value))
    return pictures[0] if len(pictures) == 1 else pictures


def _each(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _each(one)
        return
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
        value = np.moveaxis(value, -3, -1) if value.ndim > 2 else value
    if not isinstance(value, np.ndarray):
        yield value
        return
    for one in value if value.ndim == 4 else [value]:
        yield _from_array(one)


def _from_array(pixels: np.ndarray) -> Image.Image:
    """Return an array [H, W, C] or [H, W] as a picture."""
    if pixels.dtype.kind in "fb":
        if not ((pixels > -SLACK) & (pixels < 1 + SLACK)).all():
            raise ConfigError("an image has numbers below 0 or above 1; give 0 to 1, or uint8")
        pixels = (pixels.astype(np.float32) * 255).round().clip(0, 255).astype(np.uint8)
    colours = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim < 2 or colours not in ((), (1,), (3,), (4,)):
        raise ConfigError(
            f"an image is an array of {pixels.dtype} of shape {pixels.shape}; give numbers of 0 to "
            "1, or uint8, with 1, 3 or 4 channels: the last ones of an array, the first of a tensor"
        )
    return Image.fromarray(pixels[..., 0] if colours == (1,) else pixels)


def _seeds(generator: Any) -> int | list[int] | None:
    listed = entries("generator", generator)
    if generator is None or listed is not None:
        return None if listed is None else [_seed(one) for one in listed]
    return _seed(generator)


def _seed(generator: Any) -> int:
    import torch

    if not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator is {shown(generator)}; give a torch.Generator, or a list")
    drawn = torch.randint(SEEDS, (1,), generator=generator, device=generator.device)
    return int(drawn.item())


def _converted(images: list[Image.Image], output_type: str) -> Any:
    if output_type == "pil":
        return images
    shapes = {(one.size, one.mode) for one in images}
    if len(shapes) > 1:
        raise ConfigError('results differ in size or transparency: give output_type="pil"')
    pixels = np.stack([np.array(one, np.float32) for one in images]) / 255
    if output_type == "np":
        return pixels
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2)

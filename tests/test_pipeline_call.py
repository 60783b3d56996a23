"""The pipeline that is called as those of diffusers are."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import ConfigError, EditCancelled, PictureError
from varedit_runtime.pipeline import VAREditPipeline

SAMPLE = Path(__file__).parent.parent / "docs" / "samples" / "person.png"


@pytest.fixture
def pipe(nano: Editor) -> VAREditPipeline:
    return VAREditPipeline(nano)


@pytest.fixture
def sample() -> Image.Image:
    return Image.open(SAMPLE).convert("RGB")


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_number_of_steps_can_be_the_models_alone(pipe: VAREditPipeline) -> None:
    image = Image.new("RGB", (64, 64), "white")
    pipe(image=image, prompt="add a hat", num_inference_steps=pipe.num_timesteps)
    with pytest.raises(ConfigError, match="num_inference_steps is 20; the model has 7: leave it"):
        pipe(image=image, prompt="add a hat", num_inference_steps=20)


def test_a_call_is_an_edit(pipe: VAREditPipeline, nano: Editor, sample: Image.Image) -> None:
    output: Any = pipe(
        image=sample,
        prompt=["add a hat", "make it night"],
        negative_prompt="a dog",
        guidance_scale=4,
        num_images_per_prompt=2,
        generator=generator(),
    )
    expected = nano.edit(
        sample,
        ["add a hat", "make it night"],
        negative_prompt="a dog",
        guidance_scale=4,
        num_images_per_prompt=2,
        seed=output.seeds[0],
    )
    assert output.images == output["images"] == output[0] == [one.image for one in expected]
    assert output.seeds == [one.seed for one in expected]
    assert output.warnings == [one.warnings for one in expected]


def test_generators_give_seeds_as_they_give_noise(
    pipe: VAREditPipeline, sample: Image.Image
) -> None:
    def seeds(of: Any) -> list[int]:
        output: Any = pipe(image=sample, prompt="add a hat", num_images_per_prompt=2, generator=of)
        return output.seeds

    used = generator()
    first, second = seeds(used), seeds(used)
    assert first == [first[0], first[0] + 1] != second
    assert seeds(generator()) == first
    assert seeds([generator(), generator()]) == [first[0]] * 2
    with pytest.raises(ConfigError, match=r"generator is 7; give a torch\.Generator"):
        seeds(7)


def test_pictures_come_and_go_as_arrays_and_tensors(
    pipe: VAREditPipeline, nano: Editor, sample: Image.Image
) -> None:
    pixels = np.array(sample, np.float32) / 255
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    marked = torch.zeros(1, sample.height, sample.width)
    marked[:, : sample.height // 2] = 1

    def call(image: Any, output_type: str, **others: Any) -> Any:
        made: Any = pipe(
            image=image,
            prompt="add a hat",
            generator=generator(),
            output_type=output_type,
            **others,
        )
        return made

    plain = call(sample, "pil")
    expected = np.array(plain.images[0], np.float32) / 255
    eight_bits = torch.from_numpy(np.array(sample)).permute(2, 0, 1)
    for image in (
        pixels,
        pixels[None],
        np.array(sample),
        tensor,
        tensor[None],
        [tensor],
        eight_bits,
    ):
        assert np.array_equal(call(image, "np").images, expected[None])
    assert torch.equal(call(tensor, "pt").images[0].permute(1, 2, 0), torch.from_numpy(expected))
    mask = Image.fromarray((marked[0].numpy() * 255).astype(np.uint8))
    masked = nano.edit(sample, "add a hat", mask=mask, seed=plain.seeds[0])
    for told in (marked, marked.bool()):
        assert call(sample, "pil", mask_image=told).images == [masked.image]


@pytest.mark.parametrize(
    "image",
    [
        *(np.zeros((8, 8, 3), np.int64), np.zeros((8, 8, 7)), 7),
        *(np.full((8, 8, 3), 255.0), np.full((8, 8, 3), -1.0), np.full((8, 8, 3), np.nan)),
        torch.full((3, 8, 8), 200.0),
    ],
    ids=["int64", "channels", "number", "255", "-1", "nan", "200"],
)
def test_what_is_no_picture_is_refused(pipe: VAREditPipeline, image: Any) -> None:
    with pytest.raises((ConfigError, PictureError), match="give"):
        pipe(image=image, prompt="add a hat")


def test_output_types_that_cannot_be_made_are_refused(
    pipe: VAREditPipeline, sample: Image.Image
) -> None:
    with pytest.raises(ConfigError, match="output_type is 'latent'; give one of pil, np, pt"):
        pipe(image=sample, prompt="add a hat", output_type="latent")
    with pytest.raises(ConfigError, match="differ in size"):
        pipe(image=[sample, sample.resize((64, 32))], prompt="add a hat", output_type="np")


def test_a_callback_sees_each_scale_and_can_end_the_call(
    pipe: VAREditPipeline, sample: Image.Image
) -> None:
    told = []

    def callback(pipeline: Any, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        told.append((step, timestep, [one.size for one in given["preview"]]))
        pipeline._interrupt = step == 2
        return given

    with pytest.raises(EditCancelled):
        pipe(
            image=sample,
            prompt="add a hat",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["preview"],
        )
    assert told == [(scale, scale, [sample.size]) for scale in range(3)]
    assert len(told) < pipe.num_timesteps
    output: Any = pipe(image=sample, prompt="add a hat", return_dict=False)
    assert output[0][0].size == sample.size  # the pipeline can be used again
    with pytest.raises(ConfigError, match=r"preview alone, not \{'latents'\}"):
        pipe(
            image=sample,
            prompt="add a hat",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents"],
        )


def test_callbacks_of_diffusers_work(pipe: VAREditPipeline, sample: Image.Image) -> None:
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    told = []

    class Shown(PipelineCallback):
        @property
        def tensor_inputs(self) -> list[str]:
            return ["preview"]

        def callback_fn(
            self, pipeline: Any, step_index: int, timesteps: int, callback_kwargs: Any
        ) -> Any:
            told.append(len(callback_kwargs["preview"]))
            return callback_kwargs

    pipe(
        image=sample,
        prompt="add a hat",
        callback_on_step_end=MultiPipelineCallbacks([Shown(), Shown()]),
    )
    assert told == [1] * 2 * pipe.num_timesteps


def test_neither_diffusers_nor_torch_is_needed(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from varedit_runtime.pipeline import VAREditPipeline
        pipe = VAREditPipeline.from_pretrained("nano", backend="onnxruntime")
        (image,) = pipe(image=sys.argv[1], prompt="add a hat").images
        print(image.size, {"torch", "diffusers"} & sys.modules.keys())
        """
    done = subprocess.run(
        [sys.executable, "-c", code, SAMPLE], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == f"{Image.open(SAMPLE).size} set()\n", done.stderr

"""Whole edits, from pictures and instructions to pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import random_var, small_config
from small_t5 import write_t5

from varedit_reference.initialise import initialise
from varedit_reference.pipeline import VAREdit
from varedit_reference.scale_loop import PredictedScale
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.tokenizer import Tokenizer
from varedit_runtime.errors import ConfigError, TextError
from varedit_runtime.pictures import from_decoder, restore


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VAREdit:
    folder = tmp_path_factory.mktemp("t5")
    write_t5(folder, width=128)
    config = small_config()
    tokenizer = initialise(Tokenizer(config.tokenizer), 1).eval()
    return VAREdit(config, tokenizer, random_var(config), TextEncoder.load(folder))


def picture(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    colours = np.stack((rows * 255 // height, columns * 255 // width, rows * 0 + 90), axis=2)
    return Image.fromarray(colours.astype(np.uint8))


PICTURES = [picture(90, 60), picture(40, 80)]
PROMPTS = ["add a hat", "make the sky red"]


def bits_of(model: VAREdit, **arguments: object) -> tuple[list[torch.Tensor], list[Image.Image]]:
    scales: list[PredictedScale] = []
    images = model.edit(**arguments, on_scale=scales.append)  # type: ignore[arg-type]
    return [step.bits for step in scales], images


def test_pictures_keep_their_sizes_and_a_batch_its_pictures(model: VAREdit) -> None:
    bits, images = bits_of(model, image=PICTURES, prompt=PROMPTS, seed=[1, 2])
    assert [image.size for image in images] == [(90, 60), (40, 80)]
    assert [np.asarray(image).std() > 5 for image in images] == [True, True]
    assert len(bits) == 7
    for i in range(2):
        alone, _ = bits_of(model, image=PICTURES[i : i + 1], prompt=[PROMPTS[i]], seed=[i + 1])
        assert torch.equal(alone[0][0], bits[0][i])
        agreeing = torch.cat([(a[0] == b[i]).flatten() for a, b in zip(alone, bits, strict=True)])
        assert agreeing.float().mean() > 0.99  # all, but for what follows a tie


def test_what_an_edit_depends_on(model: VAREdit) -> None:
    def run(**changes: object) -> torch.Tensor:
        given = {"image": PICTURES[:1], "prompt": PROMPTS[:1], "seed": [1]}
        bits, _ = bits_of(model, **(given | changes))
        return torch.cat([scale.flatten() for scale in bits])

    plain = run()
    assert torch.equal(run(), plain)
    assert torch.equal(run(guidance_scale=4.0, temperature=0.5), plain)  # the size's own
    for change in (
        {"seed": [2]},
        {"prompt": PROMPTS[1:]},
        {"image": PICTURES[1:]},
        {"guidance_scale": 1.0},
        {"temperature": 2.0},
        {"temperature": [0.5] * 6 + [2.0]},
        {"negative_prompt": ["remove the dog"]},
    ):
        assert not torch.equal(run(**change), plain), change


def test_the_picture_is_the_decoded_sum(model: VAREdit) -> None:
    sums: list[torch.Tensor] = []
    (edited,) = model.edit(
        PICTURES[:1], PROMPTS[:1], seed=[1], on_scale=lambda step: sums.append(step.sum)
    )
    decoded = from_decoder(model.tokenizer.decode(sums[-1])[0].numpy())
    assert edited == restore(decoded, PICTURES[0].size)


def test_wrong_arguments_are_typed_errors(model: VAREdit) -> None:
    with pytest.raises(ConfigError, match="2 pictures came with 1 prompts"):
        model.edit(PICTURES, PROMPTS[:1], seed=[1, 2])
    with pytest.raises(ConfigError, match="0 seeds"):
        model.edit(PICTURES, PROMPTS, seed=[])
    with pytest.raises(ConfigError, match="negative"):
        model.edit(PICTURES, PROMPTS, seed=[1, 2], negative_prompt=["a"])
    with pytest.raises(ConfigError, match="0 negative"):
        model.edit(PICTURES, PROMPTS, seed=[1, 2], negative_prompt=[])
    with pytest.raises(ConfigError, match="temperature is 0; it must be over 0"):
        model.edit(PICTURES, PROMPTS, seed=[1, 2], temperature=0)
    assert model.edit([], [], seed=[]) == []
    with pytest.raises(ConfigError, match="guidance_scale has 3 values"):
        model.edit(PICTURES, PROMPTS, seed=[1, 2], guidance_scale=[1, 2, 3])
    with pytest.raises(TextError, match="empty"):
        model.edit(PICTURES[:1], [" "], seed=[1])

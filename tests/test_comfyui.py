"""The nodes for ComfyUI, with stand-ins of ComfyUI's modules."""

import asyncio
import inspect
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy_stand_in
import numpy as np
import pytest
import torch
from PIL import Image

from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import PictureError
from varedit_runtime.locate import embedded

ROOT = Path(__file__).parent.parent
NODES = ROOT / "runtime" / "integrations" / "comfyui" / "__init__.py"
SAMPLE = ROOT / "docs" / "samples" / "person.png"
SETTINGS = {"negative_prompt": "", "guidance_scale": 0.0, "temperature": 0.0, "previews": 0}


@pytest.fixture
def screen() -> comfy_stand_in.Screen:
    return comfy_stand_in.Screen()


@pytest.fixture
def management(monkeypatch: pytest.MonkeyPatch, screen: comfy_stand_in.Screen) -> ModuleType:
    return comfy_stand_in.install(monkeypatch, screen)


@pytest.fixture
def nodes(management: ModuleType) -> Any:
    spec = spec_from_file_location("/custom_nodes/varedit", NODES)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensor(*pictures: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(one, np.float32) / 255 for one in pictures]))


def as_image(edited: torch.Tensor) -> Image.Image:
    return Image.fromarray((edited * 255).round().numpy().astype(np.uint8))


def test_the_nodes_take_what_their_schemas_say(nodes: Any) -> None:
    extension = asyncio.run(nodes.comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    for node in found:
        inputs = {put.names[0] for put in node.define_schema().inputs}
        assert inputs == set(inspect.signature(node.execute).parameters)
    assert [node.define_schema().node_id for node in found] == ["VAREditLoadBundle", "VAREditEdit"]


def test_a_bundle_is_loaded_by_name_and_again_when_it_was_built_anew(nodes: Any) -> None:
    (editor,) = nodes.LoadBundle.execute("nano", "onnxruntime")
    with editor:
        assert editor.bundle.path == embedded()
    told = nodes.LoadBundle.fingerprint_inputs("nano", "auto")
    assert told == Bundle.open(embedded()).digest


def test_results_are_the_editors(nodes: Any, nano: Editor) -> None:
    sample = Image.open(SAMPLE).convert("RGB")
    pictures, marked = [sample, sample.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], mask(sample)
    chosen = SETTINGS | {"guidance_scale": 4.0, "temperature": 0.5, "negative_prompt": "a dog"}
    (edited,) = nodes.Edit.execute(
        nano, tensor(*pictures), "add a hat", seed=3, mask=tensor(marked), **chosen
    )
    expected = nano.edit(
        pictures,
        "add a hat",
        seed=3,
        mask=marked,
        guidance_scale=4.0,
        temperature=0.5,
        negative_prompt="a dog",
    )
    assert [as_image(one) for one in edited] == [one.image for one in expected]


def mask(picture: Image.Image) -> Image.Image:
    marked = Image.new("L", picture.size)
    marked.paste(255, (0, 0, marked.width, marked.height // 2))
    return marked


def test_alpha_is_kept_for_a_whole_batch(nodes: Any, nano: Editor) -> None:
    opaque = Image.open(SAMPLE).convert("RGBA")
    clear = opaque.copy()
    clear.putalpha(128)
    (edited,) = nodes.Edit.execute(nano, tensor(opaque, clear), "add a hat", seed=3, **SETTINGS)
    assert edited.shape == (2, opaque.height, opaque.width, 4)
    assert [set((255 * one[..., 3]).flatten().tolist()) for one in edited] == [{255}, {128}]


def test_a_mask_of_another_size_is_refused(nodes: Any, nano: Editor) -> None:
    with pytest.raises(PictureError, match="mask"):
        nodes.Edit.execute(
            nano,
            tensor(Image.open(SAMPLE).convert("RGB")),
            "add a hat",
            seed=3,
            mask=torch.ones(1, 8, 8),
            **SETTINGS,
        )


def test_progress_has_as_many_previews_as_asked(
    nodes: Any, nano: Editor, screen: comfy_stand_in.Screen
) -> None:
    chosen = SETTINGS | {"previews": 2}
    picture = tensor(Image.open(SAMPLE).convert("RGB"))
    nodes.Edit.execute(nano, torch.cat([picture] * 2), "add a hat", seed=3, **chosen)
    scales = len(nano.variant.grids)
    assert [(value, most) for value, most, _ in screen.told] == [
        (n + 1, 2 * scales) for n in range(2 * scales)
    ]
    previews = [preview[1] for *_, preview in screen.told if preview is not None]
    assert [(one.mode, one.size) for one in previews] == [("RGB", Image.open(SAMPLE).size)] * 4


def test_an_interrupt_ends_the_edit(
    nodes: Any,
    nano: Editor,
    management: ModuleType,
    screen: comfy_stand_in.Screen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes.PATIENCE = 0.001
    picture = tensor(Image.open(SAMPLE).convert("RGB"))

    def interrupt(*told: Any) -> None:
        vars(management)["interrupted"] = True

    monkeypatch.setattr(screen, "show", interrupt)
    with pytest.raises(comfy_stand_in.Interrupted):
        nodes.Edit.execute(nano, torch.cat([picture] * 4), "add a hat", seed=3, **SETTINGS)

"""Metrics, compared with values by hand and with the libraries whose definitions they follow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import drawn, edited
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torchmetrics.functional.image import (
    lpips as torchmetrics_lpips,
)
from torchmetrics.functional.image import (
    structural_similarity_index_measure,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from varedit_export.evaluation.case import Values
from varedit_export.evaluation.metrics import FAMILIES, family
from varedit_export.evaluation.metrics.lpips import FEATURES
from varedit_runtime.errors import CheckpointError, ConfigError

HALF = np.arange(16)[:, None].repeat(16, 1) < 8  # the upper half may change


def scores(name: str, folder: Path | None = None, **one: Any) -> Values:
    """Return the scores that a family gives an edit."""
    [values] = family(name).open(folder).measure([edited(**one)])
    return values


def grey(level: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), level, np.uint8))


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float()


def test_pixels_by_hand() -> None:
    """51 of 255 levels is 0.2; outside of the mask is half of the picture."""
    found = scores("pixels", source=grey(0), result=grey(51), target=grey(102), mask=lambda: HALF)
    assert found["mse"] == pytest.approx(0.04 / 2)
    assert found["psnr"] == pytest.approx(10 * np.log10(1 / 0.02))
    assert found["l1_source"] == pytest.approx(0.2)
    assert found["l1"] == pytest.approx(0.2) and found["l2"] == pytest.approx(0.04)


def test_what_is_inside_of_the_mask_does_not_count() -> None:
    result = np.asarray(drawn(1)).copy()
    result[HALF] = 0
    found = scores("pixels", source=drawn(1), result=Image.fromarray(result), mask=lambda: HALF)
    assert (found["psnr"], found["ssim"], found["mse"]) == (100, 1, 0)
    assert found["l1"] is None and found["l1_source"] is not None


def test_a_mask_of_everything_and_no_mask_leave_nothing_to_compare() -> None:
    for mask in (None, lambda: np.ones((16, 16), bool)):
        found = scores("pixels", source=grey(0), result=grey(9), mask=mask)
        assert (found["psnr"], found["ssim"], found["mse"]) == (None, None, None)


def test_ssim_is_that_of_torchmetrics() -> None:
    kept = ~HALF[..., None]
    a, b = (as_tensor(np.asarray(drawn(seed)) / 255 * kept) for seed in (1, 2))
    found = scores("pixels", source=drawn(1), result=drawn(2), mask=lambda: HALF)
    wanted = structural_similarity_index_measure(b, a, data_range=1.0)
    assert isinstance(wanted, torch.Tensor)
    assert found["ssim"] == pytest.approx(wanted.item(), abs=1e-6)


def test_results_are_resized_to_the_right_result() -> None:
    found = scores("pixels", source=grey(0), result=grey(51), target=grey(102, side=8))
    assert found["l1"] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small CLIP with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    both = {**sizes, "num_attention_heads": 2, "projection_dim": 16}
    vision = {**both, "image_size": 32, "patch_size": 8}
    text = {**both, "vocab_size": 20, "max_position_embeddings": 12, "eos_token_id": 1}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    words = ["[UNK]", "[EOS]", "[PAD]", "a", "girl", "with", "hat", "in", "red"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return folder


def with_transformers(folder: Path) -> tuple[Callable[[Image.Image], Any], Callable[[str], Any]]:
    """Return what embeds pictures and texts by transformers alone."""
    model = CLIPModel.from_pretrained(folder)
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    process = CLIPImageProcessorPil(**size)  # pyright: ignore[reportArgumentType]

    def both(picture: Image.Image, text: str) -> Any:
        given = process(picture, return_tensors="pt")
        return model(**tokens([text], return_tensors="pt"), **given)

    return (
        lambda picture: both(picture, "a").image_embeds[0].detach().numpy(),
        lambda text: both(drawn(0), text).text_embeds[0].detach().numpy(),
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("size", [(40, 40), (50, 37), (20, 33), (49, 98)])
def test_clip_is_that_of_transformers(size: tuple[int, int], clip: Path) -> None:
    picture, text = with_transformers(clip)
    source, result, target = (drawn(seed, 64).resize(size) for seed in range(3))
    mask = np.arange(size[1])[:, None].repeat(size[0], 1) > 15
    one = {"source": source, "result": result, "target": target, "mask": lambda: mask}
    found = scores("clip", clip, **one, before="a girl", caption="a girl with a red hat")
    region = Image.fromarray(np.asarray(result) * mask[..., None])
    caption, change = text("a girl with a red hat"), text("a girl with a red hat") - text("a girl")
    wanted = {
        "clip_out": cosine(picture(result), caption),
        "clip_dir": cosine(picture(result) - picture(source), change),
        "clip_edit": cosine(picture(region), caption),
        "clip_source": cosine(picture(result), picture(source)),
        "clip_target": cosine(picture(result), picture(target)),
    }
    assert found == pytest.approx(wanted, abs=1e-5)


def test_clip_gives_what_there_is_and_cuts_long_captions(clip: Path) -> None:
    one = {"source": drawn(0), "result": drawn(1)}
    assert scores("clip", clip, **one).keys() == {"clip_source"}
    same = scores("clip", clip, **one, before="a girl", caption="a girl")
    assert same.keys() == {"clip_source", "clip_out"}  # equal captions have no direction
    long = scores("clip", clip, **one, caption="red " * 500)
    assert long == scores("clip", clip, **one, caption="red " * 12)
    unchanged = scores("clip", clip, source=drawn(0), result=drawn(0), before="a", caption="hat")
    assert unchanged["clip_dir"] == 0 and unchanged["clip_source"] == pytest.approx(1)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small vision transformer with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=224,
        patch_size=32,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def test_dino_is_the_class_token_of_the_centre(vit: Path) -> None:
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False)
    source, result = drawn(0, 256), drawn(1, 256)

    def feature(picture: Image.Image) -> np.ndarray:
        centre = np.asarray(picture)[16:240, 16:240] / 255
        levels = as_tensor((centre - MEAN) / DEVIATION)
        return model(levels).last_hidden_state[0, 0].detach().numpy()

    found = scores("dino", vit, source=source, result=result, target=source)
    wanted = cosine(feature(source), feature(result))
    assert found["dino_source"] == pytest.approx(wanted, abs=1e-5)
    assert found["dino_target"] == pytest.approx(wanted, abs=1e-5)
    assert scores("dino", vit, source=source, result=result)["dino_target"] is None


def test_structure_compares_the_keys_of_the_last_layer(vit: Path) -> None:
    """The keys are computed here from the states before that layer."""
    model: Any = ViTModel.from_pretrained(vit, add_pooling_layer=False)

    def similarities(picture: Image.Image) -> torch.Tensor:
        levels = as_tensor((np.asarray(picture) - MEAN) / DEVIATION)
        before = model(levels, output_hidden_states=True).hidden_states[-2]
        layer = model.layers[-1]
        keys = layer.attention.k_proj(layer.layernorm_before(before))[0]
        return torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)

    source, result = drawn(0, 224), drawn(1, 224)
    wanted = (similarities(source) - similarities(result)).square().mean().item()
    found = scores("structure", vit, source=source, result=result)["structure"]
    assert found == pytest.approx(wanted, rel=1e-4) and wanted > 0
    assert scores("structure", vit, source=source, result=source)["structure"] == 0
    assert scores("structure", vit, source=drawn(0, 90), result=drawn(1, 90))["structure"]


class Fire(nn.Module):
    """A module of SqueezeNet, named as in torchvision."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def squeezenet() -> nn.Sequential:
    """Return the features of SqueezeNet 1.1 with random weights."""
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
    wide = ((64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192))
    fires = [Fire(*sizes) for sizes in (*wide, (384, 48, 192), (384, 64, 256), (512, 64, 256))]
    head = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool(), *fires[:2], pool(), *fires[2:4]]
    return nn.Sequential(*head, pool(), *fires[4:])


def test_lpips_is_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = squeezenet()
    named = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(named, tmp_path / FEATURES)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: features)
    theirs: Any = torchmetrics_lpips._LPIPS(net="squeeze", pnet_rand=True)
    mask = np.arange(64)[:, None].repeat(64, 1) < 32
    a, b = (as_tensor(np.asarray(drawn(s, 64)) * ~mask[..., None] / 255) for s in (0, 1))
    one = {"source": drawn(0, 64), "result": drawn(1, 64)}
    found = scores("lpips", tmp_path, **one, mask=lambda: mask)["lpips"]
    assert found == pytest.approx(theirs(a * 2 - 1, b * 2 - 1).item(), rel=1e-4)
    assert scores("lpips", tmp_path, **one)["lpips"] is None


@pytest.mark.parametrize("name", ["clip", "dino", "structure", "lpips"])
def test_a_folder_without_weights_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no (model|squeezenet)"):
        family(name).open(tmp_path)
    for file in ("model.safetensors", "config.json", FEATURES):
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        family(name).open(tmp_path).measure(
            [edited(source=drawn(0), result=drawn(1), mask=lambda: HALF)]
        )


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ConfigError, match="no metric is called 'fid'; there are clip"):
        family("fid")
    names = [score.name for name in FAMILIES for score in family(name).scores]
    assert len(names) == len(set(names))

"""Bundles of several variants over one copy of the weights."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import built, bundle_config, request, small_bundle
from click.testing import CliRunner
from PIL import Image

from varedit_export import bench, cli
from varedit_export.graphs.model import GraphTransformer
from varedit_export.graphs.scales import ScaleStage
from varedit_export.graphs.trace import fake_tensors, trace
from varedit_export.graphs.variant_graphs import shallow
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import Sources, random_sources
from varedit_reference.config import ModelConfig
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as run_main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BundleError, ConfigError


def fewer_scales(config: ModelConfig, count: int) -> ModelConfig:
    """Return the model at a lower resolution."""
    grids = config.transformer.grids[:count]
    return replace(config, transformer=replace(config.transformer, grids=grids))


def requests(target: Path) -> list[VariantRequest]:
    first = request(target)
    second = replace(first, config=fewer_scales(first.config, 3), resolution=64, text_tokens=16)
    return [first, second, replace(first, batch=2)]


def weights() -> Sources:
    return random_sources(bundle_config(), seed=0)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return built("variants", lambda target: BundlePlan(requests(target), weights()))


def picture(size: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_variants_have_one_copy_of_the_weights(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.verify()
    names = [variant.name for variant in opened.manifest.variants]
    assert names == ["96-b1", "64-b1", "96-b2"]
    shared = {"transformer", "tokenizer", "text_encoder"}
    assert set(opened.components) == shared | {f"positions_{name}" for name in names}


def test_every_variant_was_compared(bundle: Path) -> None:
    parity = Bundle.open(bundle).manifest.parity
    compared = [line.stage for line in parity if line.measure == "logits, largest error"]
    assert compared == [
        f"scale_{k:02}{form}"
        for scales in (4, 3, 4)
        for form in ("", "_unguided")
        for k in range(scales)
    ]


def test_an_editor_has_one_of_them(bundle: Path) -> None:
    with Editor.open(bundle, threads=1) as editor:
        assert editor.variant.name == "96-b1"
        one = editor.edit(picture(96), "add a hat", seed=3)
    with Editor.open(bundle, variant="96-b2", threads=1) as editor:
        two = editor.edit([picture(96)] * 2, "add a hat", seed=3)
    with Editor.open(bundle, variant="64-b1", threads=1) as editor:
        assert editor.edit(picture(64), "add a hat", seed=3).image.size == (64, 64)
    difference = np.asarray(one.image, np.int16) - np.asarray(two[0].image)
    assert np.abs(difference).max() <= 1
    assert np.any(np.asarray(two[0].image) != np.asarray(two[1].image))
    with pytest.raises(BundleError, match="no variant '512-b1'; it has 96-b1, 64-b1, 96-b2"):
        Editor.open(bundle, variant="512-b1")


def test_the_command_edits_with_the_one_that_is_named(bundle: Path, tmp_path: Path) -> None:
    picture(64).save(tmp_path / "in.png")
    given = [str(tmp_path / "in.png"), "add a hat", "--bundle", str(bundle), "--threads", "1"]
    told = CliRunner().invoke(run_main, [*given, "--json", "--variant", "64-b1"])
    assert told.exit_code == 0, told.output
    assert '"variant": "64-b1"' in told.stdout


def test_what_cannot_share_weights_is_refused(tmp_path: Path) -> None:
    first, second, _ = requests(tmp_path)
    with pytest.raises(ConfigError, match="must differ"):
        BundlePlan([first, second, second], weights())
    for other in (
        replace(second, precision="fp16"),
        replace(second, config=replace(second.config, name="another")),
        replace(second, target=tmp_path / "another"),
    ):
        with pytest.raises(ConfigError, match="one model, precision and folder"):
            BundlePlan([first, other], weights())


def test_several_resolutions_are_planned_over_one_copy(tmp_path: Path) -> None:
    """The command says this before it begins, and stops there: its folder cannot be made."""
    (tmp_path / "file").touch()

    def planned(*resolutions: int) -> str:
        asked = [word for r in resolutions for word in ("--res", str(r))]
        arguments = ["build", "--size", "2b", *asked, "--random-weights", "0", "-o"]
        return CliRunner().invoke(cli.main, [*arguments, str(tmp_path / "file" / "b")]).stderr

    def megabytes(told: str) -> float:
        units = {"kB": 1e-3, "MB": 1, "GB": 1e3}
        sizes = re.findall(r"safetensors +([\d.]+) (\w+)", told)
        return sum(float(size) * units[unit] for size, unit in sizes)

    one, three = planned(512), planned(256, 512, 1024)
    assert "256-b1, 512-b1, 1024-b1, fp32" in three
    assert megabytes(three) < 1.001 * megabytes(one)


def test_all_are_measured_with_the_growth_over_them(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_process", lambda *_: None)
    report = bench.measure_all(bench.entrants(bundle, []), 1, threads=1, variant=bench.ALL)
    assert [one.variant for one in report.measurements] == ["96-b1", "64-b1", "96-b2"]
    assert [one.batch for one in report.measurements] == [1, 1, 2]
    assert [one.faster for one in report.measurements] == [None] * 3
    (growth,) = report.growth
    assert growth.name == str(bundle)


@pytest.mark.parametrize("variant", [bench.ALL, "64-b1"])
def test_a_variant_that_an_opponent_lacks_is_told_before_any_is_measured(
    bundle: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_measure_variant", None)
    both = bench.entrants(bundle, [small_bundle()])
    said = re.escape(f"{small_bundle()}: the bundle has no variant '64-b1'; it has 96-b1")
    with pytest.raises(BundleError, match=said):
        bench.measure_all(both, 1, threads=1, variant=variant)


def test_scales_are_traced_for_batches_of_any_size(tmp_path: Path) -> None:
    shapes, fake = shallow(replace(request(tmp_path), batch=5).shapes), fake_tensors()
    with fake:
        model = GraphTransformer(shapes.config.transformer, shapes.precision)
    traced = trace(ScaleStage(shapes, model, "first"), fake)
    (logits,) = (value for value in traced.graph.outputs if value.name == "logits")
    assert logits.shape is not None and logits.shape[0] == 5

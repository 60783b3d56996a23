"""The estimate of what a build needs, and that it does not start without it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundles import quiet, random_weights, request

from varedit_export import estimate
from varedit_export.assemble import assemble
from varedit_export.errors import ExportError
from varedit_export.estimate import needs
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import random_sources
from varedit_reference import weights_file
from varedit_reference.config import preset
from varedit_runtime.errors import CheckpointError


def full_size(size: str, resolution: int, target: Path, precision: str = "fp16") -> BundlePlan:
    config = preset(size, resolution)
    wanted = VariantRequest(config, resolution, "1:1", precision, 1, True, 128, target)
    return BundlePlan([wanted], random_sources(config, seed=0))


@pytest.mark.parametrize(
    ("size", "resolution", "measured_memory", "weights"),
    [("2b", 512, 1.24e9, 7.87e9), ("8b", 1024, 3.82e9, 20.25e9)],
)
def test_full_sizes_need_what_was_measured(
    tmp_path: Path, size: str, resolution: int, measured_memory: float, weights: float
) -> None:
    """Measured with measure_build.py (see docs/benchmarks.md); estimates are above measurements."""
    needed = needs(full_size(size, resolution, tmp_path / "bundle"))
    assert weights <= needed.disk <= 1.05 * weights
    assert measured_memory <= needed.memory <= 1.5 * measured_memory
    assert f"{needed.disk / 1e9:.1f} GB of disk, " in str(needed)


@pytest.mark.parametrize(
    ("size", "resolution", "precision", "measured_memory"),
    [("tiny-2b", 1024, "fp32", 2.68e9), ("125m", 256, "fp32", 1.87e9)],
)
def test_small_models_need_what_was_measured(
    tmp_path: Path, size: str, resolution: int, precision: str, measured_memory: float
) -> None:
    """One has hardly anything but attention, the other hardly anything but weights."""
    needed = needs(full_size(size, resolution, tmp_path / "bundle", precision))
    assert measured_memory <= needed.memory <= 1.33 * measured_memory


def test_the_readme_tells_what_a_build_tells(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    half, full = (needs(full_size("8b", 512, tmp_path / "b", p)) for p in ("fp16", "fp32"))
    row = "| disk for the bundle, besides the download |"
    assert f"{row} {half.disk / 1e9:.0f} GB | {full.disk / 1e9:.0f} GB |" in readme
    memory = f"{half.memory / 1e9:.1f} GB | {full.memory / 1e9:.1f} GB"
    assert f"| memory for building | {memory} |" in readme


def test_more_variants_need_more_time_and_hardly_more_disk(tmp_path: Path) -> None:
    one = full_size("2b", 512, tmp_path / "bundle")
    other = replace(one.request, config=preset("2b", 256), resolution=256)
    both = BundlePlan([one.request, other], one.sources)
    assert needs(both).seconds > 1.2 * needs(one).seconds
    assert needs(one).disk < needs(both).disk < 1.01 * needs(one).disk


def test_a_build_that_would_not_fit_in_memory_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BundlePlan([request(tmp_path / "bundle")], random_weights())
    monkeypatch.setattr(estimate, "available_memory", lambda: needs(plan).memory - 1)
    with pytest.raises(ExportError, match=r"MB of memory are available and the build needs .* MB:"):
        assemble(plan, quiet)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(estimate, "available_memory", lambda: None)  # a system that does not say
    estimate.check_memory(2**60)


def test_a_build_that_would_not_fit_on_the_disk_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BundlePlan([request(tmp_path / "bundle")], random_weights())
    usage = SimpleNamespace(free=needs(plan).disk - 1)
    monkeypatch.setattr(weights_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="free"):
        assemble(plan, quiet)
    assert not list(tmp_path.iterdir())

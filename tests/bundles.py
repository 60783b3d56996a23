"""A small bundle with random weights, built once for all tests that need one."""

import atexit
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock

from varedit_export.assemble import assemble
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import Sources, random_sources
from varedit_reference.config import ModelConfig, preset

TEXT_TOKENS = 24


def bundle_config(size: str = "tiny-8b") -> ModelConfig:
    """Return a model of two blocks, the first with SAR references, and the first four scales."""
    config = preset(size, 256)
    grids = config.transformer.grids[:4]
    return replace(config, transformer=replace(config.transformer, depth=2, grids=grids))


def request(target: Path, precision: str = "fp32", size: str = "tiny-8b") -> VariantRequest:
    return VariantRequest(
        config=bundle_config(size),
        resolution=96,
        aspect="1:1",
        precision=precision,
        batch=1,
        guided=True,
        text_tokens=TEXT_TOKENS,
        target=target,
    )


def quiet(what: str, done: int, steps: int) -> None:
    """Report progress to nobody."""


def random_weights() -> Sources:
    return random_sources(bundle_config(), seed=0)


@cache
def small_bundle() -> Path:
    """Build an fp32 bundle of random weights: 96 px, 4 scales, patches, a byte tokenizer."""
    return built("small", lambda target: BundlePlan([request(target)], random_weights()))


@cache
def half_bundle(precision: str) -> Path:
    """Build the same bundle in fp16, with the twin for CUDA, or in bf16, which has none."""

    def plan(target: Path) -> BundlePlan:
        wanted = replace(request(target, precision), fused_attention=precision == "fp16")
        return BundlePlan([wanted], random_weights())

    return built(precision, plan)


def built(name: str, plan: Callable[[Path], BundlePlan]) -> Path:
    """Build a bundle once per run of the tests; the first process that needs it does."""
    folder = run_folder()
    with FileLock(folder / f"{name}.test-lock"):
        if not (folder / name).exists():
            assemble(plan(folder / name), quiet)
    return folder / name


def run_folder() -> Path:
    """Return the folder that all processes of one run of the tests share."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(gettempdir()) / f"varedit-tests-{run}"
    if run == str(os.getpid()) and not folder.exists():
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    return folder

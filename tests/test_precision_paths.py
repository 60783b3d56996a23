"""Each precision goes the whole way: built, interrupted, resumed, verified, told of, run."""

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import built, quiet, random_weights, request
from click.testing import CliRunner, Result
from editing import picture
from test_resume import contents

from varedit_engines.progress import OnStep
from varedit_export.assemble import assemble
from varedit_export.cli import main as export
from varedit_export.plan import BundlePlan
from varedit_runtime.backends.onnxruntime.integers import exact
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as runtime
from varedit_runtime.precision import PRECISIONS, named

WITHOUT = "which ONNX Runtime cannot run: build with --precision fp32 for a CPU"


def plan_of(precision: str, target: Path) -> BundlePlan:
    fused = precision == "fp16"
    wanted = replace(request(target, precision), fused_attention=fused)
    return BundlePlan([wanted], random_weights())


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    precision = request.param
    if named(precision).whole_bytes and not exact():
        pytest.skip("this processor cuts off sums of 8-bit products")
    name = "small" if precision == "fp32" else precision
    return Bundle.open(built(name, lambda target: plan_of(precision, target)))


def interrupted_at(step: str) -> OnStep:
    def on_step(what: str, done: int, steps: int) -> None:
        if what.startswith(step):
            raise KeyboardInterrupt

    return on_step


@pytest.mark.usefixtures("no_flushing")
def test_a_build_that_is_interrupted_comes_out_the_same(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / bundle.path.name
    plan = plan_of(bundle.manifest.precision, target)
    every = ("weights of text_encoder, 5 of", "graph scale_01", "parity")
    for step in every if bundle.manifest.precision in ("fp32", "fp8") else every[-1:]:
        with pytest.raises(KeyboardInterrupt):
            assemble(plan, interrupted_at(step))
        assert not target.exists()
    assemble(plan, quiet)
    assert contents(target) == contents(bundle.path)


def run(main: object, *arguments: object) -> Result:
    assert main in (export, runtime)
    return CliRunner().invoke(main, list(map(str, arguments)))  # type: ignore[arg-type]


def test_it_is_verified_and_told_of(bundle: Bundle) -> None:
    name = bundle.manifest.precision
    verified = run(export, "verify", bundle.path)
    assert verified.exit_code == 0 and "EXCEEDED" not in verified.output, verified.output
    assert f"precision  {name}; in fp32: " in run(export, "inspect", bundle.path).output
    assert f"{bundle.path}: {name}, " in run(export, "doctor", bundle.path).output


def test_it_is_run_and_measured(bundle: Bundle, tmp_path: Path) -> None:
    photo, result = tmp_path / "photo.png", tmp_path / "result.png"
    picture(40, 30).save(photo)
    options = ("--backend", "onnxruntime", "--threads", "1")
    edited = run(
        runtime, photo, "add a hat", "--bundle", bundle.path, "--seed", "1", "-o", result, *options
    )
    measured = run(runtime, "bench", bundle.path, "--repeat", "1", *options)
    if bundle.manifest.policy.onnxruntime:
        assert edited.exit_code == 0 and result.exists(), edited.output
        assert measured.exit_code == 0 and "scale_01" in measured.output, measured.output
    else:
        assert WITHOUT in edited.output and WITHOUT in measured.output

"""Bundles that are compared: a sabotaged one, a copy, and one that a build has just made."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from evaluating import own_data
from msgspec import structs
from PIL import Image
from republishing import republish

import varedit_export
from varedit_engines.publish import Staging
from varedit_export.cli import main
from varedit_export.evaluation.bundle_edits import BundleEdits, Dials
from varedit_export.evaluation.case import Wanted
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import NoPictureError, PictureError
from varedit_runtime.locate import default_root, embedded, find_bundle
from varedit_runtime.manifest import weights_file

BLOCK = "blocks.2."
WORDS = ("--benchmark", "nano", "--metric", "pixels", "--guidance-scale", "1", "--threads", "1")


def publish_shuffled(source: Path, target: Path) -> Path:
    """Publish a copy of a bundle in which the matrices of one block are shuffled."""
    manifest = Bundle.open(source).manifest
    with Staging(target) as staging:
        for name in manifest.files:
            data = bytearray((source / name).read_bytes())
            if name == weights_file("transformer"):
                _shuffle(data)
            staging.file(name).write_bytes(data)
            staging.record(name)
        staging.publish(structs.replace(manifest, files=staging.files))
    return target


def _shuffle(data: bytearray) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    for name, stored in json.loads(data[8:start]).items():
        if name.startswith(BLOCK) and name.endswith(".weight") and len(stored["shape"]) == 2:
            begin, end = stored["data_offsets"]
            values = np.frombuffer(data, np.float32, (end - begin) // 4, start + begin)
            values[:] = np.random.default_rng(0).permutation(values)


def evaluate(bundle: Path, output: Path, *words: object) -> str:
    line = ["evaluate", bundle, "-o", output, *WORDS, "--backend", "onnxruntime", *words]
    done = CliRunner().invoke(main, list(map(str, line)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def faithful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate nano on 60 edits; return the run."""
    folder = tmp_path_factory.mktemp("runs") / "faithful"
    evaluate(embedded(), folder, "--limit", 60)
    return folder


def test_a_shuffled_block_is_told_with_60_edits(faithful: Path, tmp_path: Path) -> None:
    sabotaged = publish_shuffled(embedded(), tmp_path / "sabotaged")
    run = tmp_path / "run"
    output = evaluate(sabotaged, run, "--limit", 60, "--against", faithful)
    assert "L2 to target: worse than faithful by 0." in output
    overall = json.loads((run / "report.json").read_text())["comparisons"]["overall"]
    assert overall["l2"]["difference"]["count"] == 60
    assert overall["l2"]["difference"]["high"] < 0


def test_a_copy_is_equal(faithful: Path, tmp_path: Path) -> None:
    """A bundle that is named beside another makes the edits too, in a run of its own."""
    copy = tmp_path / "copy"
    republish(embedded(), copy)
    run = tmp_path / "run"
    shutil.copytree(faithful, run)  # whose edits are made already
    output = evaluate(embedded(), run, "--limit", 60, "--against", copy)
    assert output.count("equal to copy") == 6
    overall = json.loads((run / "report.json").read_text())["comparisons"]["overall"]
    assert overall["l2"]["difference"]["count"] == 60
    assert json.loads((run / "against/run.json").read_text())["bundle"] == Bundle.open(copy).digest


class Faulty:
    """An editor that cannot use one picture, and whose arithmetic fails on one instruction."""

    def prepare(self, image: Image.Image, prompt: str, **_: object) -> str:
        if image.width == 1:
            raise PictureError("too thin")
        return prompt

    def edit_prepared(self, prompts: list[str]) -> list[SimpleNamespace]:
        if "overflow" in prompts:
            raise NoPictureError("not finite")
        return [SimpleNamespace(image=prompt) for prompt in prompts]


def test_what_a_bundle_cannot_edit_is_a_failed_edit() -> None:
    opening = BundleEdits(embedded(), "onnxruntime", None, Dials()).opening
    pictures = [Image.new("RGB", (width, 8)) for width in (8, 1, 8, 8)]
    texts = ["a", "b", "overflow", "c"]
    wanted = [Wanted(*one, seed=0) for one in zip(range(4), pictures, texts, strict=True)]
    results = opening.results(Faulty(), wanted)  # pyright: ignore[reportArgumentType]
    assert results == ["a", "too thin", "not finite", "c"]


def build(*words: object) -> Result:
    line = ["build", "--size", "nano", "--precision", "fp32", "--backend", "onnxruntime", *words]
    return CliRunner().invoke(main, list(map(str, line)))


def test_a_build_that_is_not_good_enough_fails_and_does_not_become_the_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build itself is that of a copy."""
    data, places = own_data(home / "data", 1), iter(("first", "second"))

    def copied(*_: object) -> Bundle:
        target = default_root() / next(places)
        republish(embedded(), target)
        return Bundle.open(target)

    monkeypatch.setattr(varedit_export, "build", copied)
    gate = ("--evaluate", f"folder={data}", "--fail-below")
    good = build(*gate, "psnr=1")
    assert good.exit_code == 0 and "now uses first by default" in good.output
    bad = build(*gate, "psnr=99")
    assert bad.exit_code == 1 and "--fail-below: psnr is " in bad.output
    assert "now uses" not in bad.output and "varedit-run bundles --set second" in bad.output
    [run] = default_root().glob("second-evaluation-*")
    assert (run / "report.html").is_file() and find_bundle(None).path.name == "first"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--fail-below", "psnr=1"), "say what is evaluated with --evaluate"),
        (("--evaluate", "coco"), "no benchmark is called 'coco'"),
        (("--evaluate", "folder"), "give its data"),
        (("--evaluate", "folder=x", "--fail-below", "fid=1"), "no score is called 'fid'"),
        (("--evaluate", "folder=/none"), "--data: there is no folder"),
        (("--evaluate", "folder=/tmp", "--fail-below", "psnr=nan"), "give SCORE=NUMBER"),
        (("--evaluate", "folder=/dev"), "has no edits.jsonl"),
    ],
)
def test_a_gate_is_checked_before_anything_is_built(words: tuple[str, ...], told: str) -> None:
    done = build(*words)
    assert done.exit_code == 1 and told in done.output

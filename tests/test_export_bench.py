"""`varedit-export bench`: a bundle beside the reference that it was made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle_config, random_weights, small_bundle
from click.testing import CliRunner, Result
from editing import pair_bundle, picture, plain_bundle, reference, without_text

from varedit_export import bench
from varedit_export.cli import main
from varedit_export.parity.reference_backend import Reference, ReferenceBackend
from varedit_runtime.bench import INSTRUCTION, ROLLUP, MemoryUse, memory_in_use
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor, read_instructions
from varedit_runtime.errors import BackendError

SCALES = [f"scale_{k:02}" for k in range(len(bundle_config().transformer.grids))]
STAGES = ["text_encoder", "image_encoder", "condition", "prefill", *SCALES, "image_decoder"]
NOT_MEASURED = MemoryUse(None, None, None, None, 1, 1, 1, None, None, 1.0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    done = run("bench", small_bundle(), "--repeat", 2, "--threads", 1, "--json", file)
    assert done.exit_code == 0, done.output
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]
    return done.stdout, json.loads(file.read_text())


def test_every_stage_is_measured_for_both(measured: tuple[str, dict[str, Any]]) -> None:
    table, report = measured
    assert [stage["name"] for stage in report["stages"]] == STAGES
    for row in (*report["stages"], report["edit"]):
        for side in ("reference", "bundle"):
            assert 0 < row[side]["lower"] <= row[side]["median"] <= row[side]["upper"]
        assert row["ratio"] == row["reference"]["median"] / row["bundle"]["median"]
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [row["name"]]]
        assert line.endswith(f"{row['ratio']:.2f}x")
    for side in ("reference", "bundle"):
        least = sum(stage[side]["lower"] for stage in report["stages"])
        assert report["edit"][side]["upper"] > least / 2
    assert report["digest"] == Bundle.open(small_bundle()).digest
    assert (report["repeat"], report["threads"], report["batch"]) == (2, 1, 1)
    assert report["torch"] == torch.__version__


def test_both_draw_the_same_picture(measured: tuple[str, dict[str, Any]]) -> None:
    table, report = measured
    assert report["differing"] < 0.01
    assert "of values differ" in table


@pytest.mark.skipif(not ROLLUP.exists(), reason="the system does not tell")
def test_the_memory_is_of_a_process_without_pytorch(measured: tuple[str, dict[str, Any]]) -> None:
    table, report = measured
    memory, own = report["memory"], memory_in_use()
    assert own is not None
    assert memory["before"] < memory["peak"] < own
    assert memory["peak_ratio"] == memory["peak"] / memory["weights"]
    for told in ("memory", "activations", "x weights", "disk"):
        assert told in table


@pytest.mark.parametrize("path", [pair_bundle, plain_bundle], ids=["pair", "plain"])
def test_batches_and_bundles_without_guidance_are_measured(
    path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_memory", lambda *_: NOT_MEASURED)
    threads = torch.get_num_threads()
    report = bench.measure_both(path(), 1, threads=2)
    assert torch.get_num_threads() == threads
    assert report.threads == 2
    assert report.differing < 0.01
    assert report.edit.ratio > 0


def test_the_reference_has_the_bundles_weights_as_they_were_loaded() -> None:
    theirs = reference(bundle_config())
    with Editor.open(small_bundle(), threads=1) as editor:
        backend = bench.open_reference(editor).backend
    assert isinstance(backend, ReferenceBackend)
    for name in ("transformer", "tokenizer"):
        expected = getattr(theirs, name).state_dict()
        for key, tensor in getattr(backend.reference, name).state_dict().items():
            assert tensor.is_contiguous()
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)
    expected = theirs.text_encoder.model.state_dict()
    for key, tensor in backend.text_encoder.state_dict().items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("negative", [None, "rain"])
def test_an_edit_that_is_timed_is_the_references_own(negative: str | None) -> None:
    model, source = reference(bundle_config()), picture(90, 60)
    whole = Reference(model.config, model.transformer, model.tokenizer, random_weights().text)
    with Editor.open(small_bundle(), threads=1) as editor:
        backend = ReferenceBackend(whole, editor.variant)
        instructions = read_instructions(editor.bundle, editor.variant.text_tokens)
        timed = Editor(editor.bundle, editor.variant, backend, instructions)
        result = timed.edit(source, INSTRUCTION, seed=3, negative_prompt=negative)
    negatives = negative and [negative]
    (expected,) = model.edit([source], [INSTRUCTION], seed=[3], negative_prompt=negatives or None)
    assert np.array_equal(np.asarray(result.image), np.asarray(expected))
    assert list(result.timings) == STAGES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere"),
        ((small_bundle, "--repeat", "0"), "repeat is 0"),
        ((small_bundle, "--threads", "0"), "threads is 0"),
        ((small_bundle, "--json", "missing/bench.json"), "there is no folder missing"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[Any, ...], said: str) -> None:
    refused = run("bench", *(a() if callable(a) else a for a in arguments))
    assert refused.exit_code == 1, refused.output
    assert len(refused.stderr.strip().splitlines()) == 1
    assert said in refused.stderr


def test_a_bundle_without_a_text_encoder_is_measured_on_random_features(tmp_path: Path) -> None:
    """By both commands: this one runs the other one for the memory."""
    bundle, file = without_text(tmp_path), tmp_path / "bench.json"
    done = run("bench", bundle, "--repeat", 1, "--threads", 1, "--json", file)
    assert done.exit_code == 0, done.output
    assert "no text encoder: random features in place of an instruction's" in done.stdout
    report = json.loads(file.read_text())
    assert report["random_text"] and report["differing"] < 0.01
    assert [stage["name"] for stage in report["stages"]] == STAGES[1:]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('Error: no room')", "no room"),
        ("import os; os._exit(9)", "exit code 9"),
    ],
)
def test_a_process_that_fails_is_one_line(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RUNTIME", program)
    with pytest.raises(BackendError, match=said):
        bench.measure_memory(small_bundle(), 1, "96-b1")

"""`varedit-export bench`: a bundle beside the reference that it was made from."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from bundles import bundle_config, random_weights, small_bundle
from click.testing import CliRunner, Result
from editing import pair_bundle, picture, plain_bundle, reference, without_text

from varedit_export import bench
from varedit_export.bench import entrants, measure_all
from varedit_export.cli import main
from varedit_export.parity.reference_backend import Reference, ReferenceBackend
from varedit_runtime.backends import BACKENDS
from varedit_runtime.backends.onnxruntime.spec import OnnxRuntime
from varedit_runtime.bench import INSTRUCTION, ROLLUP, memory_in_use
from varedit_runtime.bench_report import Measurement, Report, Spread
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.errors import BackendError, ConfigError

SCALES = [f"scale_{k:02}" for k in range(len(bundle_config().transformer.grids))]
STAGES = ["text_encoder", "image_encoder", "condition", "prefill", *SCALES, "image_decoder"]


class Again(OnnxRuntime):
    """Runs as onnxruntime does, and says that another package computed."""

    name = "again"
    packages = ("numpy", "missing")


AGAIN = Again()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    options = ["--repeat", 2, "--threads", 1, "--dial", "fast", "--dial", "further"]
    done = run("bench", small_bundle(), *options, "--json", file)
    assert done.exit_code == 0, done.output
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]
    return done.stdout, msgspec.json.decode(file.read_bytes(), type=Report)


def test_every_stage_is_measured_for_both(measured: tuple[str, Report]) -> None:
    table, report = measured
    eager, whole, further, fast = report.measurements
    assert [one.dial for one in report.measurements] == [None, None, "further", "fast"]
    assert (eager.name, eager.provider, eager.process) == ("reference", "pytorch", None)
    for one in report.measurements:
        shared = STAGES[:4] if one is further else []
        assert [s.name for s in one.stages if s.name not in shared] == STAGES[len(shared) :]
        for taken in (one, *one.stages):
            for clock in (taken.wall, taken.cpu):
                assert 0 <= clock.lower <= clock.median <= clock.upper
            assert (taken.faster is None) == (one is eager)
        assert one.wall.upper > sum(stage.wall.lower for stage in one.stages) / 2
        assert one.digest == Bundle.open(small_bundle()).digest
    assert whole.faster == eager.wall.median / whole.wall.median
    assert whole.faster_cpu == eager.cpu.median / whole.cpu.median
    assert f"{whole.faster:.2f}x" in table and "CPU s" in table
    assert (report.repeat, report.threads, whole.batch) == (2, 1, 1)
    assert report.versions["torch"] == torch.__version__
    assert report.machine.processor in table
    unguided = fast.stages[-2].flops, whole.stages[-2].flops
    assert unguided[0] and unguided[0] * 2 == unguided[1]


def test_both_draw_the_same_picture(measured: tuple[str, Report]) -> None:
    _, whole, further, _ = measured[1].measurements
    assert whole.differing is not None and whole.differing < 0.01
    assert further.differing == whole.differing


@pytest.mark.skipif(not ROLLUP.exists(), reason="the system does not tell")
def test_the_memory_is_of_a_process_without_pytorch(measured: tuple[str, Report]) -> None:
    table, report = measured
    _, whole, *dials = report.measurements
    assert whole.process and not any(one.process for one in dials)
    memory, own = whole.process.memory, memory_in_use()
    assert own and memory.before and memory.peak
    assert memory.before < memory.peak < own
    assert memory.peak_ratio == memory.peak / memory.weights
    for told in ("memory", "activations", "x weights", "disk"):
        assert told in table


@pytest.mark.parametrize("path", [pair_bundle, plain_bundle], ids=["pair", "plain"])
def test_batches_and_bundles_without_guidance_are_measured(
    path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_process", lambda *_: None)
    threads = torch.get_num_threads()
    report = measure_all(entrants(path(), ["reference"]), 1, threads=2)
    assert torch.get_num_threads() == threads
    _, own = report.measurements
    assert report.threads == 2
    assert own.differing is not None and own.differing < 0.01
    assert own.faster and own.faster > 0


def test_another_bundle_and_another_backend_are_opponents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "measure_process", lambda *_: None)
    monkeypatch.setitem(BACKENDS, "again", f"{__name__}:AGAIN")
    copied = tmp_path / "copied"
    shutil.copytree(small_bundle(), copied)
    report = measure_all(entrants(small_bundle(), [copied, "again"]), 1, threads=1)
    assert report.versions.keys() == {"onnxruntime", "numpy"}  # and no PyTorch
    other, backend, own = report.measurements
    names = [str(copied), f"{small_bundle()}, again", str(small_bundle())]
    assert [one.name for one in report.measurements] == names
    assert other.faster is None
    assert backend.provider == own.provider == "cpu"
    assert own.differing == backend.differing == 0
    refused = run("bench", small_bundle(), "--against", "nowhere")
    assert refused.exit_code == 1 and "nowhere" in refused.stderr


def test_a_name_that_is_no_text_can_be_written() -> None:
    name = bench.Entrant(Path(os.fsdecode(b"\xff"))).name
    assert msgspec.json.decode(msgspec.json.encode(name)) == r"\udcff"


@pytest.mark.parametrize("against", ["reference", "onnxruntime", "itself"])
def test_nothing_is_compared_with_itself(against: str) -> None:
    others = ["reference", small_bundle() if against == "itself" else against]
    with pytest.raises(ConfigError, match="is compared with itself"):
        measure_all(entrants(small_bundle(), others), 1)


def test_growth_is_the_exponent_of_a_pictures_tokens() -> None:
    grids = {"a": ((1, 1), (2, 2)), "b": ((4, 4),)}
    variants: list[Any] = [SimpleNamespace(name=name, grids=own) for name, own in grids.items()]

    def timed(variant: str, seconds: float, batch: int) -> Measurement:
        given: dict[str, Any] = dict.fromkeys(Measurement.__struct_fields__)
        given |= {"name": "x", "variant": variant, "wall": Spread(seconds, 0, 0), "batch": batch}
        return Measurement(**given)

    # 9 and 32 tokens; seconds of a picture grow by the square of that.
    measurements = [timed("a", 81, 1), timed("b", 2 * 1024, 2)]
    (growth,) = bench._growths(measurements, variants, "finest")
    assert (growth.name, growth.dial) == ("x", None)
    assert growth.exponent == pytest.approx(2)
    assert not list(bench._growths(measurements[:1], variants[:1], "finest"))


def test_the_reference_has_the_bundles_weights_as_they_were_loaded() -> None:
    theirs = reference(bundle_config())
    with Editor.open(small_bundle(), threads=1) as editor:
        backend = bench.open_reference(editor.bundle, editor.variant).backend
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
    *_, own = json.loads(file.read_text())["measurements"]
    assert own["random_text"] and own["differing"] < 0.01
    assert [stage["name"] for stage in own["stages"]] == STAGES[1:]


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
        bench.measure_process(bench.Entrant(small_bundle()), 1, "96-b1")

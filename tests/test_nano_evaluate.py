"""nano's benchmark: its scores on pictures whose scores are known, and its commands."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from varedit_export.cli import main
from varedit_export.evaluation.case import Values
from varedit_nano import evaluate
from varedit_nano.benchmark import (
    ALTERNATIVES,
    Question,
    draw_question,
    margin,
    psnr,
    reconstruct,
    right_edit,
    scenes,
    score,
)
from varedit_nano.data import EVALUATION_SEEDS
from varedit_nano.model import load_nano
from varedit_nano.scenes import KINDS, EditSample
from varedit_nano.turns import SCENES, TURNS, right_turns, turns
from varedit_nano.turns import score as score_turn
from varedit_runtime.editing.editor import Editor
from varedit_runtime.locate import embedded

SIDE = 16


def edit(kind: str, colour: int, rows: slice, source: np.ndarray) -> EditSample:
    """Draw a target: the source with some rows painted in one grey."""
    target = source.copy()
    target[rows] = colour
    return EditSample(kind, f"paint it {colour}", source, target, (target != source).any(-1))


@pytest.fixture
def question() -> Question:
    source = np.full((SIDE, SIDE, 3), 100, np.uint8)
    right = edit("recolour", 200, slice(0, 4), source)
    others = [
        edit("recolour", 50, slice(0, 4), source),
        edit("recolour", 200, slice(8, 12), source),
    ]
    return Question(0, right, others)


def scored(question: Question, result: np.ndarray) -> Values:
    return score(question, result, question.right.source, question.right.target)


def test_a_perfect_result_is_accurate(question: Question) -> None:
    result = scored(question, question.right.target)
    assert result["accuracy"] == 100
    assert result["margin"] == 1
    assert result["preservation"] == 100
    assert result["ceiling"] == 100


def test_the_untouched_source_is_not(question: Question) -> None:
    result = scored(question, question.right.source)
    assert result["accuracy"] == 0
    assert result["margin"] == -1
    assert result["preservation"] == 100


def test_every_alternative_counts(question: Question) -> None:
    for other in question.alternatives:
        assert scored(question, other.target)["accuracy"] == 0


def test_only_the_union_of_the_masks_counts(question: Question) -> None:
    result = question.right.target.copy()
    result[13:] = 0  # outside of every mask
    assert scored(question, result)["accuracy"] == 100
    assert scored(question, result)["margin"] == 1
    kept = scored(question, result)["preservation"]
    assert kept == pytest.approx(10 * np.log10(255**2 / (100**2 * 3 / 12)))
    result[8:12] = 200  # what another edit asked for, as well
    assert margin(question, result) < margin(question, question.right.target)


def test_a_tie_is_no_win(question: Question) -> None:
    between = question.right.source.astype(float)
    between[:4] = 150  # as far from the source as from the target
    assert margin(question, between) <= 0
    between[:4] = 151
    assert margin(question, between) > 0


def test_nan_never_passes(question: Question) -> None:
    result = question.right.target.astype(float)
    result[0, 0] = np.nan
    assert scored(question, result)["accuracy"] == 0
    assert margin(question, result) == -1


@pytest.mark.parametrize(
    ("kind", "rows", "local"),
    [("style", 4, False), ("background", 4, False), ("compound", 12, False), ("compound", 4, True)],
)
def test_preservation_is_of_local_edits(kind: str, rows: int, local: bool) -> None:
    source = np.full((SIDE, SIDE, 3), 100, np.uint8)
    right = edit(kind, 200, slice(0, rows), source)
    result = scored(Question(0, right, []), right.target)
    assert (result["preservation"] is not None) == local


def test_the_tokenizer_is_scored_on_the_source(question: Question) -> None:
    again = question.right.source + np.uint8(10)
    result = score(question, question.right.target, again, question.right.source)
    assert result["tokenizer"] == pytest.approx(10 * np.log10(255**2 / 100))
    assert result["ceiling"] == 0


def test_psnr() -> None:
    a, b = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(a, b) == pytest.approx(0)
    assert psnr(a, a) == 100
    region = np.zeros((4, 4), bool)
    region[0] = True
    b[0] = 0
    assert psnr(a, b, region) == 100


def test_questions_are_fixed_and_of_all_kinds() -> None:
    questions = [draw_question(seed, size=32) for seed in range(len(KINDS))]
    assert [question.right.kind for question in questions] == list(KINDS)
    assert ALTERNATIVES >= 10
    for question in questions:
        assert len(question.alternatives) == ALTERNATIVES
        assert all((a.source == question.right.source).all() for a in question.alternatives)
    right_edit.cache_clear()
    assert (draw_question(1, size=32).right.target == questions[1].right.target).all()
    case = scenes(32)[1]
    assert (case.id, case.groups) == ("1", (KINDS[1],)) and len(scenes(32)) == 540
    assert case.instruction == questions[1].right.instruction and case.mask is not None
    assert (np.asarray(case.source()) == questions[1].right.source).all()


def test_the_command_scores_the_reference(tmp_path: Path) -> None:
    """It is the same run as of a bundle, of other edits."""
    arguments = ["--limit", "2", "--out", str(tmp_path / "run"), "--guidance-scale", "1"]
    done = CliRunner().invoke(evaluate.main, arguments, catch_exceptions=False)
    assert "overall" in done.output
    content = json.loads((tmp_path / "run/report.json").read_text())
    assert content["run"]["guidance_scale"] == 1 and content["run"]["conditioning"] == "sar"
    assert [one["groups"] for one in content["edits"]] == [["add"], ["remove"]]
    against = ["--against", str(tmp_path / "run"), "--limit", "1", "--out", str(tmp_path / "fast")]
    other = CliRunner().invoke(evaluate.main, [*against, "--fast"], catch_exceptions=False)
    assert "kept dB: too few edits to tell" in other.output


def test_a_bundle_is_scored_by_the_command(tmp_path: Path) -> None:
    words = ["evaluate", "nano", "--benchmark", "nano", "--limit", "1", "--threads", "1"]
    done = CliRunner().invoke(
        main, [*words, "-o", str(tmp_path / "run"), "--fail-below", "accuracy=101"]
    )
    assert done.exit_code == 1 and "accuracy is" in done.output
    content = json.loads((tmp_path / "run/report.json").read_text())
    [one] = content["edits"]
    with Editor.open(embedded(), backend="onnxruntime", threads=1) as editor:
        edit = right_edit(0, 128)
        result = editor.edit(Image.fromarray(edit.source), edit.instruction, seed=0)
    picture = tmp_path / "run" / one["picture"]
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(result.image))
    assert one["scores"]["margin"] == margin(draw_question(0, 128), np.asarray(result.image))


def test_turns_are_local_edits_of_what_the_last_one_left() -> None:
    cases = turns(32)
    assert len(cases) == SCENES * TURNS and cases[0].after is None
    assert [case.after for case in cases[6:10]] == ["1.1", "1.2", "1.3", "1.4"]
    samples = right_turns(1, 32)
    assert [case.instruction for case in cases[5:10]] == [one.instruction for one in samples]
    for before, one in pairwise(samples):
        changed = (before.target != one.target).any(-1)
        assert (one.source == samples[0].source).all() and changed.any()
        assert (one.mask >= before.mask).all() and (one.mask >= (changed & ~before.mask)).all()


def test_turns_are_compared_with_the_scene_before_the_first_outside_all_masks() -> None:
    source = np.full((SIDE, SIDE, 3), 100, np.uint8)
    first = edit("add", 200, slice(0, 2), source)
    mask = first.mask.copy()
    mask[4:6] = True
    second = replace(first, mask=mask)
    result = source.copy()
    result[4:6] = 0  # in the second mask alone
    assert score_turn(second, result)["kept"] == 100
    assert score_turn(first, result)["kept"] == pytest.approx(
        10 * np.log10(255**2 / (100**2 * 2 / 14))
    )
    assert score_turn(first, first.target) == {"kept": 100, "inside": 100}
    mask[:] = True
    assert score_turn(second, result)["kept"] is None


def test_turns_are_scored_by_the_command(tmp_path: Path) -> None:
    words = ["--benchmark", "nano-turns", "--limit", "2", "--guidance-scale", "1"]
    arguments = [*words, "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(evaluate.main, arguments, catch_exceptions=False)
    assert "turn 2" in done.output
    content = json.loads((tmp_path / "run/report.json").read_text())
    first, second = content["edits"]
    assert (first["id"], second["id"]) == ("0.1", "0.2")
    picture = np.asarray(Image.open(tmp_path / "run" / second["picture"]))
    assert second["scores"] == score_turn(right_turns(0, 128)[1], picture)


def test_the_weights_that_ship_are_as_good_as_the_card_says() -> None:
    """The card's accuracy is 92.4 %, and its tokenizer keeps 32.5 dB."""
    questions = [draw_question(seed, 128) for seed in EVALUATION_SEEDS[: 2 * len(KINDS)]]
    with Editor.open(embedded(), threads=1) as editor:
        results = [
            editor.edit(Image.fromarray(right.source), right.instruction, seed=number).image
            for number, right in enumerate(question.right for question in questions)
        ]
    margins = [margin(*one) for one in zip(questions, map(np.asarray, results), strict=True)]
    assert np.mean([one > 0 for one in margins]) >= 0.8
    sources = [question.right.source for question in questions[:8]]
    again = reconstruct(load_nano(), sources)
    assert np.mean([psnr(*pair) for pair in zip(sources, again, strict=True)]) > 31

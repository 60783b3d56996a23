"""nano's scores, on pictures whose scores are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from varedit_nano import evaluate
from varedit_nano.evaluate import (
    ALTERNATIVES,
    Question,
    SamplingSettings,
    Scores,
    by_kind,
    draw_questions,
    draw_result_sheet,
    margin,
    psnr,
    score,
    score_table,
)
from varedit_nano.scenes import KINDS, EditSample
from varedit_nano.sheets import GAP
from varedit_nano.text import build_vocabulary, new_text_encoder
from varedit_nano.train_transformer import new_transformer
from varedit_reference.config import ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.initialise import initialise
from varedit_reference.pipeline import VAREdit
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.tokenizer import Tokenizer
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


def scored(question: Question, result: np.ndarray) -> evaluate.EditScore:
    return score(question, result, question.right.source, question.right.target)


def test_a_perfect_result_is_accurate(question: Question) -> None:
    result = scored(question, question.right.target)
    assert result.accurate
    assert result.margin == 1
    assert result.preservation == 100
    assert result.reachable


def test_the_untouched_source_is_not(question: Question) -> None:
    result = scored(question, question.right.source)
    assert not result.accurate
    assert result.margin == -1
    assert result.preservation == 100


def test_every_alternative_counts(question: Question) -> None:
    for other in question.alternatives:
        assert not scored(question, other.target).accurate


def test_only_the_union_of_the_masks_counts(question: Question) -> None:
    result = question.right.target.copy()
    result[13:] = 0  # outside of every mask
    assert scored(question, result).accurate
    assert scored(question, result).margin == 1
    kept = scored(question, result).preservation
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
    assert not scored(question, result).accurate
    assert margin(question, result) == -1


@pytest.mark.parametrize(
    ("kind", "rows", "local"),
    [("style", 4, False), ("background", 4, False), ("compound", 12, False), ("compound", 4, True)],
)
def test_preservation_is_of_local_edits(kind: str, rows: int, local: bool) -> None:
    source = np.full((SIDE, SIDE, 3), 100, np.uint8)
    right = edit(kind, 200, slice(0, rows), source)
    result = scored(Question(0, right, []), right.target)
    assert (result.preservation is not None) == local


def test_the_tokenizer_is_scored_on_the_source(question: Question) -> None:
    again = question.right.source + np.uint8(10)
    result = score(question, question.right.target, again, question.right.source)
    assert result.tokenizer == pytest.approx(10 * np.log10(255**2 / 100))
    assert not result.reachable


def test_psnr() -> None:
    a, b = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(a, b) == pytest.approx(0)
    assert psnr(a, a) == 100
    region = np.zeros((4, 4), bool)
    region[0] = True
    b[0] = 0
    assert psnr(a, b, region) == 100


def test_means(question: Question) -> None:
    good, bad = (scored(question, p) for p in (question.right.target, question.right.source))
    scores = by_kind([good, bad, bad, bad])
    assert list(scores) == ["recolour", "overall"]
    assert scores["overall"] == Scores(4, 25.0, 100.0, 100.0, 100.0)
    assert "recolour" in score_table(scores)


def test_questions_are_fixed_and_of_all_kinds() -> None:
    questions = draw_questions(len(KINDS), size=32)
    assert [question.right.kind for question in questions] == list(KINDS)
    assert ALTERNATIVES >= 10
    for question in questions:
        assert len(question.alternatives) == ALTERNATIVES
        assert all((a.source == question.right.source).all() for a in question.alternatives)
    again = draw_questions(2, size=32)[1]
    assert (again.right.target == questions[1].right.target).all()


def test_the_sheet_shows_random_edits_and_the_worst(question: Question) -> None:
    pictures = [question.right.target] * 19 + [question.right.source]
    scores = [scored(question, picture) for picture in pictures]
    sheet = np.asarray(draw_result_sheet([question] * 20, pictures, scores))
    bottom = (len(sheet) - GAP) // evaluate.SHEET_ROWS  # of the first row of pictures
    width = sheet.shape[1] // 2
    top, result = bottom - SIDE, 2 * GAP + SIDE
    assert tuple(sheet[top, result]) == (200, 200, 200)
    assert tuple(sheet[top, width + result]) == (100, 100, 100)
    assert tuple(sheet[top, width + GAP + 2 * (GAP + SIDE)]) == (200, 200, 200)


@pytest.fixture
def tiny() -> VAREdit:
    grids = ((1, 1), (2, 2), (4, 4))
    config = ModelConfig(
        "tiny-nano",
        TokenizerConfig(bits=4, downsampling=8, channels=24, multipliers=(1, 1, 1, 1)),
        TransformerConfig(1, 64, 2, 4, 128, grids, grids, rotary="paper"),
    )
    vocabulary = build_vocabulary(["add a hat"])
    torch.manual_seed(0)
    return VAREdit(
        config,
        initialise(Tokenizer(config.tokenizer), 0),
        new_transformer(config, 0),
        TextEncoder(new_text_encoder(vocabulary, 128), vocabulary),
    )


def test_scores_do_not_depend_on_the_batch(tiny: VAREdit) -> None:
    questions = draw_questions(4, size=32)
    sampling = SamplingSettings(guidance_scale=2.0, temperature=1.0)
    whole, pictures = evaluate.evaluate(tiny, questions, 4, sampling)
    parts, others = evaluate.evaluate(tiny, questions, 3, sampling)
    assert [s.accurate for s in whole] == [s.accurate for s in parts]
    assert [psnr(a, b) > 40 for a, b in zip(pictures, others, strict=True)] == [True] * 4


def test_the_command_writes_table_scores_and_sheet(
    tiny: VAREdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_nano", lambda *_: tiny)
    arguments = ["--weights", str(tmp_path), "--count", "9", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(
        evaluate.main, [*arguments, "--guidance-scale", "1"], catch_exceptions=False
    )
    assert "overall" in done.output
    content = json.loads((tmp_path / "out/scores.json").read_text())
    assert content["guidance_scale"] == 1
    assert [one["kind"] for one in content["edits"]] == list(KINDS)
    assert content["scores"]["overall"]["edits"] == 9
    assert (tmp_path / "out/sheet.png").stat().st_size > 1000
    against = ["--against", str(tmp_path / "out/scores.json"), "--guidance-scale", "1"]
    same = CliRunner().invoke(evaluate.main, [*arguments, *against], catch_exceptions=False)
    assert "accuracy +0.0 (+0.0 to +0.0) points against" in same.output
    fast = [*arguments, "--fast", "--count", "1"]
    assert CliRunner().invoke(evaluate.main, fast, catch_exceptions=False).exit_code == 0
    guidance = json.loads((tmp_path / "out/scores.json").read_text())["guidance_scale"]
    assert guidance == [tiny.config.guidance_scale, 1, 1]
    fewer = CliRunner().invoke(evaluate.main, [*arguments, *against, "--count", "8"])
    assert fewer.exit_code == 1 and "scores of other edits" in fewer.output


def test_a_difference_of_paired_edits_has_an_interval(question: Question) -> None:
    """Of 100 edits 4 are better and 1 is worse: 3 points more, give or take 4.3."""
    scores = [replace(scored(question, question.right.target), seed=i) for i in range(100)]
    scores[99] = replace(scores[99], accurate=False)
    others = [{"seed": i, "accurate": i not in range(4)} for i in range(100)]
    assert evaluate.compared(scores, others) == "accuracy +3.0 (-1.3 to +7.3) points"


def test_a_bundle_answers_too() -> None:
    (asked,) = draw_questions(1, size=128)
    with Editor.open(embedded(), backend="onnxruntime") as editor:
        (picture,) = evaluate.answer(editor, [asked], SamplingSettings())
    assert picture.shape == asked.right.target.shape and picture.std() > 0

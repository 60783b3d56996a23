"""Runs of an evaluation: they continue, refuse what is another run, and compare."""

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from disks import file_size_limit
from evaluating import Shifted, evaluated, own_data, write_lines
from judging import Answer, serving
from killing import FORKS, killed_at, uses

from varedit_export.cli import main
from varedit_export.evaluation.case import Edited, Values
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.report import table
from varedit_export.evaluation.run import Run, open_run
from varedit_export.evaluation.statistics import compare, mean_of
from varedit_export.options import EvaluateOptions
from varedit_runtime.errors import ConfigError, VareditError

REPORTS = ("report.json", "report.html")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return own_data(tmp_path / "data")


def contents(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in REPORTS]


def judged(prompt: str, number: int) -> Answer:
    """Answer by what is asked, and only now and then: one edit's answers cannot be read."""
    if number % 5 == 0:
        return 503, {"retry-after-ms": "1"}
    if "change 2" in prompt:
        return "It is fine."
    return f'{{"success": {next(n for n in range(4) if f"change {n}" in prompt)}, "overedit": 7}}'


@FORKS
def test_a_run_that_is_killed_continues_to_the_same_report(
    data: Path, tmp_path: Path, no_flushing: None
) -> None:
    """Also with a judge: what it answered is not asked again, and its totals are the same."""
    with serving(judged) as server:

        def judged_run(run: Path) -> None:
            judge = {"judge": server.url, "judge_model": "m", "judge_price": (1.0, 2.0)}
            evaluated(data, run, **judge, judge_repeat=2)

        judged_run(tmp_path / "whole")
        whole = contents(tmp_path / "whole")
        count = uses(partial(judged_run, tmp_path / "counted"))
        for number in range(10):
            run = tmp_path / f"killed-{number}"
            assert killed_at(number * (count - 16) // 9, partial(judged_run, run))
            judged_run(run)
            assert contents(run) == whole
    (used,) = json.loads(whole[0])["judges"]
    assert (used["answers"], used["unread"], used["repeated"], used["agreed"]) == (6, 6, 3, 3)


def test_a_finished_run_makes_nothing_again(data: Path, tmp_path: Path) -> None:
    first, second = Shifted(), Shifted()
    evaluated(data, tmp_path / "run", first)
    lines = (tmp_path / "run/scores.jsonl").read_bytes()
    evaluated(data, tmp_path / "run", second)
    assert first.made == [0, 1, 2, 3] and second.made == []
    assert (tmp_path / "run/scores.jsonl").read_bytes() == lines


def test_a_picture_that_was_changed_is_made_and_scored_again(data: Path, tmp_path: Path) -> None:
    evaluated(data, tmp_path / "run")
    whole = contents(tmp_path / "run")
    first, second, *_ = sorted((tmp_path / "run/pictures").iterdir())
    first.write_bytes(b"no picture")
    second.unlink()
    again = Shifted()
    evaluated(data, tmp_path / "run", again)
    assert again.made == [0, 1] and contents(tmp_path / "run") == whole


@pytest.mark.parametrize("torn", [b'{"id": "1", "se', b"\xff\xfe", b"[[[[", b'{"id": 3}\n'])
def test_a_line_that_was_cut_off_counts_for_nothing(
    torn: bytes, data: Path, tmp_path: Path
) -> None:
    evaluated(data, tmp_path / "run")
    whole = contents(tmp_path / "run")
    for name in ("edits.jsonl", "scores.jsonl"):
        lines = (tmp_path / "run" / name).read_bytes().splitlines(keepends=True)
        (tmp_path / "run" / name).write_bytes(b"".join(lines[:2]) + torn)
    evaluated(data, tmp_path / "run")
    assert contents(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("told", "more"),
    [("shift", {"edits": Shifted(11)}), ("seed", {"seed": 3}), ("cases", {"data": "other"})],
)
def test_another_evaluation_in_the_same_folder_is_refused(
    told: str, more: dict[str, object], data: Path, tmp_path: Path
) -> None:
    evaluated(data, tmp_path / "run")
    if "data" in more:
        more["data"] = own_data(tmp_path / "other", 5)
    with pytest.raises(ConfigError, match=f"is a run with {told} .*name another folder"):
        evaluated(**{"data": data, "output": tmp_path / "run", **more})  # pyright: ignore


def test_folders_that_are_no_run_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds other things than a run"):
        evaluated(data, data)
    with (
        open_run(tmp_path / "run", {}),
        pytest.raises(ConfigError, match="another process"),
        open_run(tmp_path / "run", {}),
    ):
        pass
    for content in ("[]", "{", "[" * 100_000):
        (tmp_path / "run/run.json").write_text(content)
        with pytest.raises(ConfigError, match="is not the folder of a run"):
            Run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        evaluated(data, tmp_path / "file")


@pytest.mark.parametrize("size", [50, 500, 1000, 3000])
def test_a_full_disk_is_one_error_and_the_run_continues(
    size: int, data: Path, tmp_path: Path
) -> None:
    """The files that are too large: run.json, a picture, a list of lines, the report."""
    evaluated(data, tmp_path / "whole")
    with file_size_limit(size), pytest.raises(VareditError, match="cannot be written: File too"):
        evaluated(data, tmp_path / "run")
    evaluated(data, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_lines_are_not_written_through_a_link(data: Path, tmp_path: Path) -> None:
    evaluated(data, tmp_path / "run", limit=1)
    (tmp_path / "run/edits.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "run/edits.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be written"):
        evaluated(data, tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "null", "[" * 10**5, '{"seed": NaN}', "{}"])
def test_a_run_that_says_something_else_is_refused(text: str, data: Path, tmp_path: Path) -> None:
    evaluated(data, tmp_path / "run")
    (tmp_path / "run/run.json").write_text(text)
    with pytest.raises(ConfigError, match="name another"):
        evaluated(data, tmp_path / "run")


@pytest.mark.parametrize("name", ["run.json", "edits.jsonl", "scores.jsonl"])
def test_a_pipe_in_a_run_is_not_waited_for(name: str, data: Path, tmp_path: Path) -> None:
    evaluated(data, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(ConfigError, match="is not"):
        evaluated(data, tmp_path / "run")


@pytest.mark.parametrize("wrong", [{"output": "a" * 5000}, {"output": ".."}, {"output": None}])
def test_an_edit_whose_line_was_edited_is_made_again(
    wrong: dict[str, object], data: Path, tmp_path: Path
) -> None:
    evaluated(data, tmp_path / "run")
    whole, path = contents(tmp_path / "run"), tmp_path / "run/edits.jsonl"
    lines = [json.loads(line) | wrong for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    evaluated(data, tmp_path / "run")
    assert contents(tmp_path / "run") == whole


def test_a_type_cannot_move_the_terminal(data: Path, tmp_path: Path) -> None:
    row = {"image": "0.png", "instruction": "x", "type": "\x1b[2J\n" + "long" * 1000}
    lines = table(evaluated(write_lines(data, [row]), tmp_path / "run")).split("\n")
    assert len(lines) == 3 and max(map(len, lines)) < 200
    assert all(line.isprintable() for line in lines)


def test_an_instruction_that_cannot_be_followed_is_counted(data: Path, tmp_path: Path) -> None:
    report = evaluated(data, tmp_path / "run", Shifted(refused="change 1"))
    assert [row.failed for row in report.edits] == [None, "not understood", None, None]
    assert report.groups["odd"].edits == 2 and report.groups["odd"].means["l1"].count == 1


def test_a_limit_takes_all_types_alike_and_each_edit_keeps_its_seed(tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", 6)
    rows: list[dict[str, str]] = [
        json.loads(line) for line in (data / "edits.jsonl").read_text().splitlines()
    ]
    rows.sort(key=lambda row: row["type"])  # even ones first
    write_lines(data, rows)
    report = evaluated(data, tmp_path / "run", limit=2)
    assert [(row.id, row.seed) for row in report.edits] == [("1", 0), ("4", 3)]
    assert len(evaluated(data, tmp_path / "run").edits) == 6


def test_a_copy_is_equal_and_a_worse_one_is_told(data: Path, tmp_path: Path) -> None:
    few = evaluated(data, tmp_path / "few", Shifted(), Shifted(128))
    assert few.comparisons["overall"]["l1"].verdict == "too few edits to tell"
    alike = compare([1.0] * 9, [1.0] * 9, 1, 2)
    assert alike is not None and alike.verdict == "too few edits to tell"
    data = own_data(tmp_path / "more", 10)
    same = evaluated(data, tmp_path / "same", Shifted(), Shifted())
    assert {one.verdict for one in same.comparisons["overall"].values()} == {"equal"}
    worse = evaluated(data, tmp_path / "worse", Shifted(128), Run(tmp_path / "same"))
    assert worse.comparisons["overall"]["l1_source"].verdict.startswith("worse by 0.")
    edits = Shifted()
    with pytest.raises(ConfigError, match="has another seed"):
        evaluated(data, tmp_path / "seed", edits, Run(tmp_path / "same"), seed=1)
    lines = (tmp_path / "same/scores.jsonl").read_text().replace('"by":"1"', '"by":"2"')
    (tmp_path / "same/scores.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match="lacks scores of pixels by the same model"):
        evaluated(data, tmp_path / "by", edits, Run(tmp_path / "same"))
    assert not edits.made


def test_a_gate_fails_on_worse_and_on_missing_scores(data: Path, tmp_path: Path) -> None:
    report = evaluated(data, tmp_path / "run", fail_below=("psnr=99", "l1_source=0.9"))
    assert len(report.failures) == 1 and report.failures[0].startswith("psnr is ")
    refused = Shifted(refused="change 1")
    few = evaluated(data, tmp_path / "few", refused, fail_below=("psnr=1",))
    assert few.failures == ["1 edits could not be made, such as 2"]
    with pytest.raises(ConfigError, match="no score is called 'clip'; there are psnr"):
        evaluated(data, tmp_path / "run", fail_below=("clip=1",))
    for wrong in ("psnr", "psnr=nan", "l1=inf", "psnr=-inf"):
        with pytest.raises(ConfigError, match="give SCORE=NUMBER"):
            evaluated(data, tmp_path / "run", fail_below=(wrong,))
    write_lines(data, [{"image": "0.png", "instruction": "change it"}])
    unmasked = evaluated(data, tmp_path / "unmasked", fail_below=("psnr=1",))
    assert unmasked.failures == ["psnr: no edit has this score"]


def test_the_page_escapes_what_it_shows_and_asks_for_nothing(tmp_path: Path) -> None:
    """Instructions, ids and types are of strangers, and so is why an edit failed."""
    data, evil = own_data(tmp_path / "data"), "\"><script src=//e.org>'</td><img src=http://e.org>"
    row = {"image": "0.png", "instruction": evil, "id": evil, "type": evil, "target": "0.png"}
    write_lines(data, [row, {"image": "1.png", "instruction": "x"}])
    evaluated(data, tmp_path / "run", Shifted(refused="x"), Shifted(11))
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert evil not in page and "&lt;script src=//e.org&gt;" in page
    assert page.count("<script") == 1 and "not understood" in page
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in page
    loaded = re.findall(r"""(?:src|href|url|action|@import)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert all(
        place.startswith("data:image/jpeg;base64,") for place in loaded if "e.org" not in place
    )
    assert page.count("<img ") == 3 + 1


def test_the_page_shows_the_failed_and_the_worst_first(data: Path, tmp_path: Path) -> None:
    report = evaluated(data, tmp_path / "run", Shifted(refused="change 2"))
    page = (tmp_path / "run/report.html").read_text("utf-8")
    shown = [int(number) for number in re.findall(r"change (\d)<small>", page)]
    values = [report.edits[number].scores.get("psnr", 0) or 0 for number in shown]
    assert shown[0] == 2 and len(values) == 4 and values == sorted(values)


def test_a_score_that_is_not_finite_is_missing(data: Path, tmp_path: Path) -> None:
    class Broken:
        identity, at_once = "broken", 3

        def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
            return [{"psnr": float("nan"), "ssim": float("inf"), "mse": 1.0} for _ in edited]

    options = EvaluateOptions(benchmark="folder", data=data, output=tmp_path / "run")
    report = evaluate(Shifted(), options, metrics={"pixels": Broken()})
    assert report.edits[0].scores == {"psnr": None, "ssim": None, "mse": 1.0}
    assert [score.name for score in report.scores] == ["mse"]


def test_ctrl_c_says_that_the_same_command_continues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("varedit_export.evaluate", interrupted)
    words = ["evaluate", "nano", "--benchmark", "folder", "--data", str(data)]
    done = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "run")])
    assert done.exit_code == 130
    assert done.stderr.endswith("Interrupted. The same command continues this run.\n")


def test_progress_ends_with_all(data: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    options = EvaluateOptions(benchmark="folder", data=data, output=tmp_path / "run")
    evaluate(Shifted(), options, on_step=lambda *step: steps.append(step))
    assert steps[4] == ("editing", 4, 4) and steps[-1] == ("scoring, pixels", 4, 4)


def test_intervals_are_those_of_the_bootstrap() -> None:
    assert mean_of([]) is None
    few = mean_of([3.0] * 9)  # of which a bootstrap would be certain
    assert few is not None and (few.mean, few.low, few.high, few.count) == (3, None, None, 9)
    ten = mean_of([0.0, 1.0] * 5)
    assert ten is not None and ten.low is not None and ten.high is not None
    assert 0.1 < ten.low < 0.3 and 0.7 < ten.high < 0.9
    many = mean_of([0.0, 1.0] * 200)  # the standard error is 0.5 / sqrt(400)
    assert many is not None and many == mean_of([0.0, 1.0] * 200)
    assert many.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert many.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_a_mean_of_few_edits_has_no_interval_and_tells_of_how_many_it_is(tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", 3)
    lines = (data / "edits.jsonl").read_text().splitlines()
    write_lines(data, [*lines, {"image": "0.png", "instruction": "no mask", "type": "odd"}])
    report = evaluated(data, tmp_path / "run", Shifted(), Shifted(20))
    odd = json.loads((tmp_path / "run/report.json").read_bytes())["groups"]["odd"]
    assert odd["edits"] == 2 and odd["means"]["psnr"]["count"] == 1
    assert odd["means"]["psnr"]["low"] is None and odd["means"]["psnr"]["high"] is None
    psnr = f"{odd['means']['psnr']['mean']:.2f}"
    assert f"{psnr} (1 edit)" in table(report)
    assert f"<td>{psnr}<small>1 edit</small></td>" in (tmp_path / "run/report.html").read_text()
    assert " (3 edits)" in table(report).splitlines()[-1]


def test_differences_are_paired_and_oriented() -> None:
    ours, theirs = [1.0, 2.0, None, 4.0] * 9, [0.5, 1.5, 9.0, 3.5] * 9
    better, worse = compare(ours, theirs, 1, 2), compare(ours, theirs, -1, 2)
    assert better is not None and better.verdict == "better by 0.50 to 0.50"
    assert better.difference.count == 27
    assert worse is not None and worse.verdict == "worse by 0.50 to 0.50"
    unsure = compare([0.0, 1.0] * 50, [1.0, 0.0] * 50, 1, 2)
    assert unsure is not None and unsure.verdict == "no worse by more than 0.20"
    assert unsure.beside("copy") == "no worse than copy by more than 0.20"
    assert compare([None], [1.0], 1, 2) is None

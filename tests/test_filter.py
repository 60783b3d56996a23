"""Pairs filtered by a judge: what is kept and why, what is asked, and how a run goes on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from evaluating import drawn
from judging import Answer, Server, serving
from killing import FORKS, killed_at
from pairing import pictures, shard, shows, write_list, write_parquet, write_tar
from test_pairs_published import magicbrush

from varedit_export.cli import main
from varedit_export.errors import JudgeError
from varedit_export.options import FilterOptions
from varedit_export.pairs import filter as filtering
from varedit_export.pairs.filter import filter_pairs
from varedit_export.pairs.read import read_pairs
from varedit_export.resumable.locked import locked
from varedit_runtime.errors import ConfigError


def says(match: float, source: float = 9, target: float = 9) -> str:
    return f'Well. {{"match": {match}, "source": {source}, "target": {target}}}'


def by_instruction(answers: Mapping[str, Answer]) -> Callable[[str, int], Answer]:
    """Return what answers by the instruction in a prompt, and well about others."""
    return lambda prompt, _: next((a for k, a in answers.items() if f"\n{k}\n" in prompt), says(9))


def data(folder: Path, *instructions: str) -> Path:
    """Write a list of pairs, the n-th from drawn(n) to drawn(n + 1)."""
    pictures(folder, *(f"in/{n}.png" for n in range(len(instructions) + 1)))
    rows = [
        {"source": f"in/{n}.png", "target": f"in/{n + 1}.png", "instruction": instruction}
        for n, instruction in enumerate(instructions)
    ]
    return write_list(folder / "pairs.jsonl", rows)


def options(server: Server, place: Path | str, output: Path, **more: Any) -> FilterOptions:
    return FilterOptions((place,), output, judge=server.url, judge_model="m", **more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_pairs_are_kept_or_dropped_with_reasons(tmp_path: Path) -> None:
    place = data(tmp_path, "good", "wrong", "blurred", "加一顶帽子", "good")
    (tmp_path / "in/4.png").write_bytes(b"no picture")  # the target of the fourth
    output = tmp_path / "kept.jsonl"
    answers = {"wrong": says(3), "blurred": says(8, 6.5, 2)}
    with serving(by_instruction(answers)) as server:
        filtered = filter_pairs(options(server, place, output))
    assert (filtered.kept, filtered.dropped) == (1, 4)
    good, wrong, blurred, unread, also = rows(output)
    assert good == {
        "source": "in/0.png",
        "target": "in/1.png",
        "instruction": "good",
        "kept": True,
        "scores": {"match": 9, "source": 9, "target": 9},
    }
    assert (wrong["kept"], wrong["why"]) == (False, "match is 3, below 7")
    assert blurred["why"] == "source is 6.5 and target is 2, below 7"
    assert "pairs.jsonl, line 4: " in unread["why"] and "cannot be read" in unread["why"]
    assert not also["kept"] and "line 5" in also["why"]  # its source is the same picture
    assert list(map(shows, read_pairs([output]))) == [("good", 0, 1)]
    assert len(server.asked) == 3
    text, *shown = server.asked[0]["messages"][0]["content"]
    assert len(shown) == 2 and "source" in text["text"] and "{instruction}" not in text["text"]
    assert "3 answers" in str(filtered)


def test_a_run_that_was_ended_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    place, output = data(tmp_path, *"abcde", "a"), tmp_path / "kept.jsonl"

    def answer(prompt: str, number: int) -> Answer:
        return 401 if number == 3 else says(9)

    with serving(answer) as server:
        asked = options(server, place, output, judge_at_once=1)
        with pytest.raises(JudgeError, match="401"):
            filter_pairs(asked)
        assert not output.exists()
        verdicts = tmp_path / "kept.jsonl.answers/verdicts.jsonl"
        verdicts.write_bytes(verdicts.read_bytes()[:-5])  # killed in the middle of a line
        filtered = filter_pairs(asked)
        assert (filtered.kept, len(server.asked)) == (6, 7)
        whole = output.read_bytes()
        filter_pairs(asked)
        assert output.read_bytes() == whole and len(server.asked) == 7
        # Another limit, and more pairs in another order, ask for what is new alone.
        filter_pairs(replace(asked, least=9.5))
        assert not any(row["kept"] for row in rows(output)) and len(server.asked) == 7
        lines = [json.dumps(row) for row in reversed(rows(place))]
        write_list(place, [lines[1].replace('"e"', '"new"'), *lines])
        filter_pairs(asked)
        assert len(server.asked) == 8 and rows(output)[0]["instruction"] == "new"
        # Another model, and another prompt, are asked about all.
        filter_pairs(replace(asked, judge_model="other"))
        assert len(server.asked) == 8 + 7
        (tmp_path / "own").mkdir()
        (tmp_path / "own/pairs.txt").write_text("Is it {instruction}?")
        filter_pairs(replace(asked, judge_prompts=tmp_path / "own"))
        assert len(server.asked) == 8 + 7 + 7
        assert server.asked[-1]["messages"][0]["content"][0]["text"] == "Is it a?"


@FORKS
def test_a_run_that_is_killed_anywhere_goes_on(tmp_path: Path, no_flushing: None) -> None:
    """It loses no more than the answers that were under way."""
    place, output, kills = data(tmp_path, *"abcdef"), tmp_path / "kept.jsonl", 0
    with serving(by_instruction({"b": says(2)})) as server:
        asked = options(server, place, output, judge_at_once=1)
        filter_pairs(replace(asked, output=tmp_path / "whole.jsonl"))  # imports what it needs
        before = len(server.asked)
        while killed_at(12 + 6 * kills, lambda: filter_pairs(asked)):
            kills += 1
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert kills > 2 and 6 <= len(server.asked) - before <= 6 + kills


def test_busy_broken_and_odd_judges(tmp_path: Path) -> None:
    place, output = data(tmp_path, "busy", "prose", "odd", "refused"), tmp_path / "kept.jsonl"
    seen = list[str]()

    def answer(prompt: str, number: int) -> Answer:
        name = next(name for name in ("busy", "prose", "odd", "refused") if f"\n{name}\n" in prompt)
        seen.append(name)
        soon = {"retry-after-ms": "1"}
        first: list[Answer] = [(429, soon), (500, soon), says(8)]
        answers: dict[str, list[Answer]] = {
            "busy": first,
            "prose": ["It is fine.", "Really.", says(9)],
            "odd": ['{"match": 11, "source": 9, "target": 9}'],
            "refused": [400],
        }
        given = answers[name]
        return given[min(seen.count(name), len(given)) - 1]

    with serving(answer) as server:
        asked = options(server, place, output, judge_at_once=1)
        filter_pairs(asked)
        filter_pairs(asked)
    busy, prose, odd, refused = rows(output)
    assert busy["kept"] and prose["kept"]
    assert odd["why"] == refused["why"] == "the judge gave no answer that can be read"
    assert [seen.count(name) for name in ("busy", "prose", "odd", "refused")] == [3, 3, 3, 1]


def test_other_kinds_of_data_are_filtered_where_they_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/0.tar", shard(0, 2))
    brush = [magicbrush(4, drawn(9, mode="RGBA")), magicbrush(5, weight=0.5)]
    brush[0]["weight"] = 2.0
    write_parquet(tmp_path / "brush/train-0.parquet", brush)
    output = tmp_path / "kept.jsonl"
    with serving(by_instruction({"change 1": says(1)})) as server:
        one = options(server, tmp_path / "shards", output)
        filter_pairs(replace(one, data=(*one.data, tmp_path / "brush")))
    kept = read_pairs([output])
    assert list(map(shows, kept)) == [(f"change {n}", n, n + 1) for n in (0, 4, 5)]
    assert [pair.weight for pair in kept] == [1, 2, 0.5]
    assert kept[1].mask() is not None and kept[2].mask() is None


def test_pairs_that_cannot_be_read_are_dropped_with_their_row(tmp_path: Path) -> None:
    place, output = data(tmp_path, "a", "b"), tmp_path / "kept.jsonl"
    (tmp_path / "in/0.png").unlink()
    with serving(by_instruction({})) as server:
        filter_pairs(options(server, place, output))
    lost, kept = rows(output)
    assert lost == {"kept": False, "why": f"{place}, line 1: there is no file 'in/0.png'"}
    assert kept["kept"] and len(read_pairs([output])) == 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"judge": None}, "--judge"),
        ({"judge_model": None}, "--judge-model"),
        ({"judge_at_once": 0}, "1 to 64"),
        ({"output": "{0}/kept.txt"}, r"must end in \.jsonl"),
        ({"output": "{0}/pairs.jsonl"}, "exists: choose another name"),
        ({"output": "{0}/none/kept.jsonl"}, "there is no folder"),
        ({"output": "{0}/in/kept.jsonl"}, "names files in its own folder and below: write it into"),
        ({"least": 11.0}, "--least is 11; give 0 to 10"),
    ],
)
def test_wrong_options_are_told_before_anything_is_asked(
    more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    place = data(tmp_path, "a")
    more = {k: v.format(tmp_path) if k == "output" else v for k, v in more.items()}
    with serving(by_instruction({})) as server:
        with pytest.raises(ConfigError, match=told):
            filter_pairs(replace(options(server, place, tmp_path / "kept.jsonl"), **more))
        assert not server.asked


def test_two_processes_do_not_filter_into_one_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, output = data(tmp_path, "a"), tmp_path / "kept.jsonl"
    with serving(by_instruction({})) as server, locked(Path(f"{output}.answers")):
        with pytest.raises(ConfigError, match="another process works in"):
            filter_pairs(options(server, place, output))
        monkeypatch.setattr(filtering, "MOST", 0)
        with pytest.raises(ConfigError, match="1 pairs are too many at once"):
            filter_pairs(options(server, place, output))


def test_the_command_filters(tmp_path: Path) -> None:
    place, output = data(tmp_path, "good", "wrong"), tmp_path / "kept.jsonl"
    with serving(by_instruction({"wrong": says(2)})) as server:
        judge = ["--judge", server.url, "--judge-model", "m"]
        line = ["filter", str(place), "-o", str(output), *judge, "--least", "5"]
        result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert "1 pairs kept, 1 dropped" in result.stderr and str(output) in result.stdout

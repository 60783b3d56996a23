"""The judge: what is asked of it, how its answers are read and kept, and what it may do wrong.

A server on the loopback answers well, badly, late, or not at all.
"""

import gzip
import itertools
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from evaluating import Shifted, own_data
from judging import GOOD, Answer, Late, Never, Server, serving
from PIL import Image

from varedit_export.errors import JudgeError
from varedit_export.evaluation.case import Case, Edited
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.judge import reading
from varedit_export.evaluation.judge.endpoint import Endpoint
from varedit_export.evaluation.judge.judge import ANSWERS, Judge
from varedit_export.evaluation.judge.protocols import PROTOCOLS, balance
from varedit_export.evaluation.judge.replies import read_reply
from varedit_export.options import EvaluateOptions, JudgedOptions
from varedit_runtime.errors import ConfigError

ASKED = {"messages": [{"content": [{"text": "score it"}]}]}


def edit(number: int = 0, instruction: str = "add a hat") -> Edited:
    source, result = (Image.new("RGB", (8, 8), (number, blue, 0)) for blue in (0, 200))
    case = Case(str(number), (), instruction, lambda: source)
    return Edited(case, source, result)


def ignored(_: str) -> None:
    """Show nothing."""


def judge(
    server: Server,
    folder: Path,
    timeout: float = 10,
    notice: Callable[[str], None] = ignored,
    protocol: str = "paper",
    **options: Any,
) -> Judge:
    endpoint = Endpoint(server.url, "m", notice, timeout=timeout, retries=2)
    folder.mkdir(exist_ok=True)
    return Judge(endpoint, protocol, JudgedOptions(**options), folder)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (GOOD, (8, 6)),
        ('{"success": 0, "overedit": 10}', (0, 10)),
        ('```json\n{"reason": "a { b", "success": 7.5, "overedit": 1}\n``` Done.', (7.5, 1)),
        ('{"scores": {"success": 1, "overedit": 2}} {"success": 3, "overedit": 4}', (3, 4)),
        (f"I first thought {{this}}: {GOOD} and again {GOOD}", (8, 6)),
        ("success 8, overedit 6", None),
        ('{"success": 8}', None),
        ('{"success": 11, "overedit": 6}', None),
        ('{"success": -1, "overedit": 6}', None),
        ('{"success": "8", "overedit": 6}', None),
        ('{"success": true, "overedit": 6}', None),
        ('{"success": NaN, "overedit": 6}', None),
        ('{"success": 8, "overedit": 6} or {"success": 2, "overedit": 6}', None),
        ('{"success": 8, "overedit": 6', None),
        ("{" * 5000, None),
        ('{"a":' * 5000, None),
        ("", None),
    ],
)
def test_replies_are_read_strictly(text: str, read: tuple[float, float] | None) -> None:
    names = "success", "overedit"
    expected = None if read is None else dict(zip(names, read, strict=True))
    assert read_reply(text, names, 0, 10) == expected


def test_scores_are_what_the_protocols_say() -> None:
    assert balance(8, 6) == pytest.approx(2 / (1 / 8 + 1 / 6))
    assert balance(0, 10) == balance(10, 0) == balance(0, 0) == 0
    paper = PROTOCOLS["paper"].score({"success": 9, "overedit": 0})
    assert paper == {"judge_success": 9, "judge_overedit": 0, "judge_balance": 0}
    imgedit = PROTOCOLS["imgedit"].score({"compliance": 5, "naturalness": 4, "detail": 3})
    assert imgedit["judge_imgedit"] == 4
    assert PROTOCOLS["uge"].score({"score": 3}) == {"judge_uge": 3}
    gedit = PROTOCOLS["gedit"].score(
        {"success": 9, "overedit": 4, "naturalness": 8, "artifacts": 9}
    )
    assert gedit == {"judge_sc": 4, "judge_pq": 8, "judge_overall": math.sqrt(32)}
    for protocol in PROTOCOLS.values():
        for question in protocol.questions:
            assert all(f'"{name}": NUMBER' in question.text(None) for name in question.names)


def test_it_is_shown_source_and_result_and_its_key_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAREDIT_JUDGE_KEY", "secret-key")
    with serving(lambda *_: GOOD) as server:
        one = judge(server, tmp_path / "run")
        (scores,) = one.measure([edit(instruction="add {a} hat")])
    assert scores == {
        "judge_success": 8,
        "judge_overedit": 6,
        "judge_balance": balance(8, 6),
        "judge_balance_apart": None,
    }
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "m"
    text, source, result = asked["messages"][0]["content"]
    assert "add {a} hat" in text["text"]
    assert source["image_url"]["url"].startswith("data:image/png;base64,")
    assert source != result
    assert asked["key"] == "Bearer secret-key"
    used = str(one.use((), (2000.0, 30000.0)))
    assert used == "judge m, paper: 1 answers; 100 tokens in, 10 out; cost 0.50"
    assert b"secret" not in (tmp_path / "run" / ANSWERS).read_bytes() + used.encode()


def test_two_questions_are_two_requests_and_quality_sees_the_result_alone(tmp_path: Path) -> None:
    def answer(prompt: str, _: int) -> str:
        return GOOD if "success" in prompt else '{"naturalness": 9, "artifacts": 5}'

    with serving(answer) as server:
        (scores,) = judge(server, tmp_path, protocol="gedit").measure([edit()])
    assert scores["judge_overall"] == math.sqrt(30)
    assert [len(asked["messages"][0]["content"]) for asked in server.asked] == [3, 2]


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    """Neither in this run nor in one that continues it after it was killed in the middle."""
    edits = [edit(number) for number in range(4)]
    with serving(lambda *_: GOOD) as server:
        judge(server, tmp_path).measure(edits[:2])
        file = tmp_path / ANSWERS
        file.write_bytes(file.read_bytes()[:-9])  # the last line was cut off
        again = judge(server, tmp_path)
        first = again.measure(edits)
        assert len(server.asked) == 2 + 3
        assert judge(server, tmp_path).measure(edits) == first
        assert len(server.asked) == 5
        assert judge(server, tmp_path).identity == again.identity
        assert judge(server, tmp_path, judge_repeat=2).identity != again.identity
        judge(server, tmp_path).measure([edit(0, "remove the hat")])
        assert len(server.asked) == 6


def test_busy_broken_and_late_servers_are_asked_again(tmp_path: Path) -> None:
    answers: list[Answer] = [(429, {"retry-after-ms": "1"}), (500, {"retry-after-ms": "1"}), GOOD]
    with serving(lambda _, number: answers[number]) as server:
        told = list[str]()
        one = judge(server, tmp_path / "busy", notice=told.append)
        (scores,) = one.measure([edit()])
    assert scores["judge_success"] == 8 and len(server.asked) == 3
    host = server.url.split("/")[2]
    again = f"the judge at {host} is busy or does not answer: asking again"
    assert told == [f"{again}, 1 of 2", f"{again}, 2 of 2"]
    with serving(lambda _, number: GOOD if number else Late(GOOD)) as server:
        (scores,) = judge(server, tmp_path / "late", timeout=0.3).measure([edit()])
    assert scores["judge_success"] == 8 and len(server.asked) == 2


def test_what_cannot_be_read_is_missing_and_never_zero(tmp_path: Path) -> None:
    def answer(prompt: str, number: int) -> Answer:
        if "refused" in prompt:
            return 400
        return '{"success": 12, "overedit": 3}' if "odd" in prompt or number == 0 else GOOD

    with serving(answer) as server:
        one = judge(server, tmp_path, judge_at_once=1)
        texts = "well", "odd", "refused"
        good, odd, refused = one.measure([edit(instruction=text) for text in texts])
        assert good["judge_success"] == 8  # at the second time
        assert set(odd.values()) == set(refused.values()) == {None}
        assert len(server.asked) == 2 + 3 + 1
        again = judge(server, tmp_path)
        assert again.measure([edit(instruction=text) for text in texts]) == [good, odd, refused]
    assert len(server.asked) == 6 and again.use(()) == one.use(())
    assert str(one.use(())) == (
        "judge m, paper: 1 answers, 4 that could not be read, 1 requests refused; "
        "500 tokens in, 50 out"
    )


def test_a_refused_edit_does_not_stop_a_run_that_continues(tmp_path: Path) -> None:
    """Its judge has answered before, in a process that has ended."""
    with serving(lambda prompt, _: 400 if "refused" in prompt else GOOD) as server:
        judge(server, tmp_path).measure([edit()])
        (refused,) = judge(server, tmp_path).measure([edit(instruction="refused")])
        assert set(refused.values()) == {None}
        other = Judge(Endpoint(server.url, "other"), "paper", JudgedOptions(), tmp_path)
        with pytest.raises(JudgeError, match="does the model take pictures"):
            other.measure([edit(instruction="refused")])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (401, "VAREDIT_JUDGE_KEY"),
        (404, "ends in /v1"),
        (400, "does the model take pictures"),
        ((503, {"retry-after-ms": "1"}), "continue the run later"),
    ],
)
def test_a_judge_that_cannot_be_asked_ends_the_run(
    answer: Answer, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAREDIT_JUDGE_KEY", "secret-key")
    with (
        serving(lambda *_: answer) as server,
        pytest.raises(JudgeError, match=said) as caught,
    ):
        judge(server, tmp_path).measure([edit(number) for number in range(20)])
    assert len(server.asked) < 20 * 3
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        *(b"null", b"{}", b"[" * 10**5, b"\xff", b'{"choices": {"0": 1}}', b'{"choices": [null]}'),
        *(b'{"choices": [{"message": {"content": %s}}]}' % c for c in (b"5", b"[1]", b'{"a": 1}')),
        b'{"choices": [{"message": {}}], "usage": "much"}',
        b'{"choices": [{"message": {}}], "usage": {"prompt_tokens": "many"}}',
    ],
)
def test_a_reply_of_another_form_is_told(body: bytes, tmp_path: Path) -> None:
    with serving(lambda *_: body) as server, pytest.raises(JudgeError, match="does not answer as"):
        judge(server, tmp_path).measure([edit()])


def test_a_judge_cannot_send_pictures_elsewhere(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as other:
        for status in (301, 302, 303, 307, 308):
            moved = (status, {"Location": f"{other.url}/chat/completions"})
            with (
                serving(lambda *_, moved=moved: moved) as server,
                pytest.raises(JudgeError, match=f"{status}: it is elsewhere"),
            ):
                judge(server, tmp_path).measure([edit()])
        assert other.asked == []


def test_a_judge_cannot_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST", 1000)
    packed = gzip.compress(GOOD.encode() + b" " * 10**5)
    whole = (b" " * 10**4, (200, {"Content-Encoding": "gzip"}, packed))
    for answer in whole:  # it would be read, were it read as a whole
        with serving(lambda *_, answer=answer: answer) as server:
            with reading.client(1) as client, client.stream("POST", server.url, json=ASKED) as got:
                assert sum(map(len, got.iter_bytes())) <= 1000
            with pytest.raises(JudgeError, match="does not answer as"):
                judge(server, tmp_path).measure([edit()])


def test_an_answer_that_trickles_is_late() -> None:
    class Trickle(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return itertools.repeat(b" ")

    with pytest.raises(httpx2.ReadTimeout):
        list(reading.Bounded(Trickle(), seconds=0))


def test_an_interrupted_run_waits_for_no_answer(tmp_path: Path) -> None:
    def answer(_: str, number: int) -> Answer:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return Never(GOOD)

    with serving(answer) as server:
        endpoint = Endpoint(server.url, "m", retries=0)
        one = Judge(endpoint, "paper", JudgedOptions(judge_at_once=2), tmp_path)
        with pytest.raises(KeyboardInterrupt):
            one.measure([edit(number) for number in range(4)])
        assert server.at_once == len(server.asked) == 2


def test_kept_answers_that_were_edited_are_asked_for_again(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as server:
        judge(server, tmp_path).measure([edit()])
        for wrong in ('{"success":8.0}', '{"success":8.0,"overedit":1e300}'):
            text = (tmp_path / ANSWERS).read_text("utf-8")
            (tmp_path / ANSWERS).write_text(
                text.replace('{"success":8.0,"overedit":6.0}', wrong), "utf-8"
            )
            (scores,) = judge(server, tmp_path).measure([edit()])
            assert scores["judge_overedit"] == 6
    assert len(server.asked) == 3


def test_no_server_and_no_address_are_told(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as server:
        url = server.url
    with pytest.raises(JudgeError, match=r"at 127.* cannot be reached.* check the address"):
        endpoint = Endpoint(url, "m", retries=0)
        Judge(endpoint, "paper", JudgedOptions(), tmp_path).measure([edit()])
    for wrong in (
        *("", "localhost:8000", "file:///v1", "http://user:secret@host/v1"),
        *("http://[", "http://host:port/v1", "http://host:99999/v1", "http://\u0661/v1"),
    ):
        with pytest.raises(ConfigError, match="give an address such as"):
            Endpoint(wrong, "m")


def test_an_openai_key_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    monkeypatch.delenv("VAREDIT_JUDGE_KEY", raising=False)
    here, there = (Endpoint(f"https://{h}/v1", "m") for h in ("example.com", "api.openai.com"))
    assert (here._client.api_key, there._client.api_key) == ("none", "theirs")


def test_repeats_are_averaged_and_compared(tmp_path: Path) -> None:
    given = ['{"success": 10, "overedit": 10}', '{"success": 4, "overedit": 4}', "no"]
    with serving(lambda _, number: given[min(number, 2)]) as server:
        (scores,) = judge(server, tmp_path, judge_repeat=3).measure([edit()])
    assert scores["judge_balance"] == 7 and scores["judge_balance_apart"] == 6
    assert len(server.asked) == 2 + 3


def test_no_more_are_asked_at_once_than_wanted(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as server:
        judge(server, tmp_path, judge_at_once=3).measure([edit(number) for number in range(20)])
    assert len(server.asked) == 20 and server.most_at_once <= 3


def test_prompts_can_be_replaced(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "paper.txt").write_text("Is this {instruction}?", "utf-8")
    with serving(lambda *_: GOOD) as server:
        mine = judge(server, tmp_path / "run", judge_prompts=own)
        mine.measure([edit()])
        assert mine.identity != judge(server, tmp_path / "run").identity
    assert server.asked[0]["messages"][0]["content"][0]["text"] == "Is this add a hat?"
    (own / "paper.txt").write_text("Is this good?", "utf-8")
    with serving(lambda *_: GOOD) as server, pytest.raises(ConfigError, match="must contain"):
        judge(server, tmp_path / "run", judge_prompts=own)


def test_a_run_is_judged_and_continued(tmp_path: Path) -> None:
    data, run = own_data(tmp_path / "data"), tmp_path / "run"

    def options(server: Server, **more: Any) -> EvaluateOptions:
        asked = {"judge": server.url, "judge_model": "m", **more}
        return EvaluateOptions("folder", run, data, **asked)

    def answer(prompt: str, number: int) -> Answer:
        return 401 if number == 2 else GOOD

    with serving(answer) as server:
        with pytest.raises(JudgeError, match="401"):
            evaluate(Shifted(), options(server, judge_at_once=1))
        report = evaluate(Shifted(), options(server, judge_price=(1e3, 0)))
        assert len(server.asked) == 5  # four edits, and the one that was not answered
        again = evaluate(Shifted(), options(server, judge_price=(1e3, 0)))
        assert len(server.asked) == 5 and again == report
    assert report.groups["odd"].means["judge_balance"].mean == pytest.approx(balance(8, 6))
    told = "judge m, paper: 4 answers; 400 tokens in, 40 out; cost 0.40"
    assert str(*report.judges) == told and told in (run / "report.html").read_text("utf-8")
    (used,) = json.loads((run / "report.json").read_bytes())["judges"]
    assert used["tokens_in"] == 400 and used["tokens_out"] == 40 and used["cost"] == 0.4


def test_two_protocols_have_totals_of_their_own_also_in_a_run_that_continues(
    tmp_path: Path,
) -> None:
    def answer(prompt: str, _: int) -> str:
        rated = '{"compliance": 5, "naturalness": 4, "detail": 3}'
        return rated if "compliance" in prompt else GOOD

    data, run = own_data(tmp_path / "data"), tmp_path / "run"
    with serving(answer) as server:
        options = EvaluateOptions(
            *("folder", run, data, ("judge-paper", "judge-imgedit")),
            judge=server.url,
            judge_model="m",
        )
        report = evaluate(Shifted(), options)
        told = ["judge m, paper: 4 answers", "judge m, imgedit: 4 answers"]
        assert [str(one).split(";")[0] for one in report.judges] == told
        assert evaluate(Shifted(), options) == report


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"judge": "http://127.0.0.1:9/v1"}, "--judge-model"),
        ({"metrics": ("judge-gedit",)}, "--judge URL and --judge-model NAME"),
        ({"judge": "http://127.0.0.1:9/v1", "judge_model": "m", "judge_repeat": 0}, "1 to 64"),
    ],
)
def test_a_judge_that_is_not_named_is_told_before_anything_is_edited(
    asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    data, edits = own_data(tmp_path / "data"), Shifted()
    with pytest.raises(ConfigError, match=said):
        evaluate(edits, EvaluateOptions("folder", tmp_path / "run", data, **asked))
    assert not edits.made

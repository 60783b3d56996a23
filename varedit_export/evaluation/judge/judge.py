"""The metric: asks a judge about edits, several at a time, and makes scores of its answers.

An answer that cannot be read is asked for again, and at last counted as missing: the edit then has
no score, which is not a score of 0. Answers are kept in the run's folder by what was asked, so that
nothing is asked, or paid, twice.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from itertools import combinations
from math import inf
from operator import mul
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import msgspec

from varedit_export.evaluation.case import Edited, Values
from varedit_export.evaluation.judge.endpoint import Endpoint
from varedit_export.evaluation.judge.protocols import (
    INSTRUCTION,
    PROTOCOLS,
    Answer,
    Question,
)
from varedit_export.evaluation.judge.replies import numbers, read_reply
from varedit_export.evaluation.report import JudgeUse, Row
from varedit_export.options import JudgedOptions
from varedit_export.resumable.journal import Journal
from varedit_runtime.errors import ConfigError
from varedit_runtime.pictures import encode_picture

ASKS = 3  # times that an answer is asked for before it is missing
ANSWERS = "judge.jsonl"
MOST = 64  # times that a judge is asked, or that it is asked at once


class AnswerLine(msgspec.Struct):
    """A reply. key: of what was asked. answer: its numbers, None if it has none that can be read.

    refused: whether the server refused these pictures or this text. model, protocol: what was
    asked, by which the totals are told.
    """

    key: str
    answer: dict[str, float] | None
    tokens_in: int = 0
    tokens_out: int = 0
    refused: bool = False
    model: str = ""
    protocol: str = ""


class Judge:
    """The metric of a protocol."""

    def __init__(
        self, endpoint: Endpoint, protocol: str, options: JudgedOptions, folder: Path
    ) -> None:
        """protocol: a name of PROTOCOLS. folder: the run's, which keeps answers.

        Raises ConfigError on files it cannot read.
        """
        self._endpoint, self._name, self._repeat = endpoint, protocol, options.judge_repeat
        self._protocol = PROTOCOLS[protocol]
        prompts = None if options.judge_prompts is None else Path(options.judge_prompts)
        self._prompts = {q: q.text(prompts) for q in self._protocol.questions}
        self._journal, self._lock = Journal(folder / ANSWERS, AnswerLine), Lock()
        self._known = {line.key: line.answer for line in self._journal.lines if line.answer}
        failed = [line for line in self._journal.lines if line.answer is None]
        self._refused = {line.key for line in failed if line.refused}
        self._missed = Counter(line.key for line in failed)  # answers that could not be read
        endpoint.answered |= any(
            line.answer is not None for line in self._journal.lines if line.model == endpoint.model
        )
        self.at_once = options.judge_at_once
        told = [endpoint.model, protocol, self._repeat, *self._prompts.values()]
        self.identity = _digest(told)

    def use(self, rows: Iterable[Row], prices: tuple[float, float] | None = None) -> JudgeUse:
        """Return what was asked and used, also by the runs that this one continues.

        rows: the report's edits. prices: of a million tokens in and out.
        """
        asked = self._endpoint.model, self._name
        lines = [line for line in self._journal.lines if (line.model, line.protocol) == asked]
        tokens = sum(line.tokens_in for line in lines), sum(line.tokens_out for line in lines)
        read = sum(line.answer is not None for line in lines)
        refused = sum(line.refused for line in lines)
        apart = [row.scores.get(self._protocol.apart) for row in rows]
        return JudgeUse(
            *asked,
            read,
            len(lines) - read - refused,
            refused,
            *tokens,
            None if prices is None else sum(map(mul, tokens, prices)) / 1e6,
            sum(one is not None for one in apart),
            apart.count(0),
        )

    def measure(self, edited: Sequence[Edited]) -> Sequence[Values]:
        """Return the scores of each edit. Raises JudgeError if the judge cannot be asked."""
        futures = [Future[Values]() for _ in edited]
        queue = SimpleQueue[tuple[Future[Values], Edited]]()
        for pair in zip(futures, edited, strict=True):
            queue.put(pair)
        for _ in range(min(self.at_once, len(edited))):
            # Ctrl-C waits for no daemon, and so for no answer, which may take minutes.
            Thread(target=self._work, args=(queue,), daemon=True).start()
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
        wait(futures)  # what was asked is paid, and is kept
        return [future.result() for future in futures]

    def _work(self, queue: "SimpleQueue[tuple[Future[Values], Edited]]") -> None:
        with suppress(Empty):
            while True:
                future, edited = queue.get_nowait()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self._scores(edited))
                    except Exception as error:
                        future.set_exception(error)

    def _scores(self, edited: Edited) -> Values:
        pictures = [encode_picture(one) for one in (edited.source, edited.result)]
        answers = [self._answer(edited, pictures, turn) for turn in range(self._repeat)]
        scored = [self._protocol.score(answer) for answer in answers if answer is not None]
        found: dict[str, float | None] = {score.name: None for score in self._protocol.scores}
        for name in scored[0] if scored else ():
            found[name] = sum(one[name] for one in scored) / len(scored)
        pairs = list(combinations([one[self._protocol.main] for one in scored], 2))
        if pairs:
            found[self._protocol.apart] = sum(abs(one - other) for one, other in pairs) / len(pairs)
        return found

    def _answer(self, edited: Edited, pictures: Sequence[bytes], turn: int) -> Answer | None:
        """Return the numbers of the answers to all questions; None if any is missing."""
        answer: dict[str, float] = {}
        for question, prompt in self._prompts.items():
            text = prompt.replace(INSTRUCTION, edited.case.instruction)
            shown = pictures if question.source else pictures[1:]
            part = self._ask(question, text, shown, turn)
            if part is None:
                return None
            answer |= part
        return answer

    def _ask(
        self, question: Question, text: str, pictures: Sequence[bytes], turn: int
    ) -> Answer | None:
        key = _digest([self._endpoint.model, text, turn], pictures)
        kept = numbers(self._known.get(key, {}), question.names, question.low, question.high)
        if kept is not None:  # the file may have been edited
            return kept
        while self._missed[key] < ASKS and key not in self._refused:
            reply = self._endpoint.ask(text, pictures)
            if reply is None:
                self._keep(AnswerLine(key, None, refused=True))
                return None
            answer = read_reply(reply.text, question.names, question.low, question.high)
            self._keep(AnswerLine(key, answer, reply.tokens_in, reply.tokens_out))
            if answer is not None:
                return answer
        return None

    def _keep(self, line: AnswerLine) -> None:
        line.model, line.protocol = self._endpoint.model, self._name
        with self._lock:
            self._journal.append(line)
            if line.answer is not None:
                self._known[line.key] = line.answer
            elif line.refused:
                self._refused.add(line.key)
            else:
                self._missed[line.key] += 1


def open_judges(
    options: JudgedOptions,
    protocols: Sequence[str],
    folder: Path,
    notice: Callable[[str], None],
) -> dict[str, Judge]:
    """Open a judge, if one is named, for each of some protocols. Raises ConfigError.

    folder: keeps the answers. notice: see `Endpoint`.
    """
    if options.judge is None:
        return {}
    if options.judge_model is None:
        raise ConfigError("--judge: name the model to ask with --judge-model")
    if not (1 <= options.judge_repeat <= MOST and 1 <= options.judge_at_once <= MOST):
        raise ConfigError(f"--judge-repeat and --judge-at-once are 1 to {MOST}")
    if not all(0 <= price < inf for price in options.judge_price or ()):
        raise ConfigError("--judge-price: give two prices, 0 or more")
    endpoint = Endpoint(options.judge, options.judge_model, notice)
    return {name: Judge(endpoint, name, options, folder) for name in protocols}


def _digest(told: Sequence[object], pictures: Sequence[bytes] = ()) -> str:
    digest = hashlib.sha256(json.dumps(told).encode())
    for picture in pictures:
        digest.update(hashlib.sha256(picture).digest())
    return digest.hexdigest()

"""The protocols of judges: what is asked about an edit, and the scores made of the answers.

- **paper**: VAREdit's (arXiv 2508.15772), which it has of OmniEdit and VIEScore: success and
  over-editing from 0 to 10 in one answer. GPT-Balance of an edit is their harmonic mean, 0 where
  either is 0.
- **imgedit**: ImgEdit-Bench's (arXiv 2505.20275; PKU-YuanGroup/ImgEdit, Benchmark/Basic): three
  aspects from 1 to 5; an edit's score is their mean. The original has a prompt for each type.
- **uge**: that of ImgEdit-Bench's UGE (Benchmark/UGE): one score from 1 to 5, at most 3 where
  anything else was changed.
- **gedit**: GEdit-Bench's (arXiv 2504.17761), which is VIEScore (arXiv 2312.14867) for edits: two
  scores of semantic consistency, two of perceptual quality; SC and PQ are the lower of each two,
  and the overall score is the root of SC·PQ. Its own totals are means over the types'.
- **pairs**: that of VAREdit's filter of pairs to learn from (its Figure 8), of no evaluation:
  whether a pair matches its instruction, and whether both pictures are clear.

The prompts are in our own words, so that scores are not exactly those of the originals. They are
files, of which a folder of one's own may replace any.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from varedit_export.evaluation.case import Score
from varedit_runtime.errors import ConfigError, reason

PROMPTS = Path(__file__).with_name("prompts")
INSTRUCTION = "{instruction}"  # where a prompt has the edit's
PAIRS, PAIR_SCORES = "pairs", ("match", "source", "target")

Answer = Mapping[str, float]  # the numbers of an answer by name


@dataclass(frozen=True)
class Question:
    """A prompt, by its file's name, and the numbers that an answer must have.

    names: of the numbers. low, high: their range. source: whether the source is shown, before the
    result.
    """

    prompt: str
    names: tuple[str, ...]
    low: float = 0
    high: float = 10
    source: bool = True

    def text(self, folder: Path | None) -> str:
        """Return the prompt: that of a folder of one's own, if it is there, else ours."""
        own = None if folder is None else folder / f"{self.prompt}.txt"
        try:
            chosen = own if own is not None and own.is_file() else PROMPTS / f"{self.prompt}.txt"
            text = chosen.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the prompt {own} cannot be read: {reason(error)}") from error
        if self.source and INSTRUCTION not in text:
            raise ConfigError(f"the prompt {chosen} must contain {INSTRUCTION}")
        return text


@dataclass(frozen=True)
class Protocol:
    """The questions about an edit, and the scores that are made of the answers to all of them.

    main: the score whose repeats are compared.
    """

    questions: tuple[Question, ...]
    scores: tuple[Score, ...]
    score: Callable[[Answer], Mapping[str, float]]
    main: str

    @property
    def apart(self) -> str:
        """Return the name of the score that tells how far apart repeats are."""
        return _apart(self.main)


def balance(success: float, overedit: float) -> float:
    """Return the harmonic mean of two scores, 0 where either is 0."""
    return 2 * success * overedit / (success + overedit) if success and overedit else 0.0


def _paper(answer: Answer) -> Mapping[str, float]:
    success, overedit = answer["success"], answer["overedit"]
    return {
        "judge_success": success,
        "judge_overedit": overedit,
        "judge_balance": balance(success, overedit),
    }


def _imgedit(answer: Answer) -> Mapping[str, float]:
    aspects = {f"judge_{name}": answer[name] for name in ("compliance", "naturalness", "detail")}
    return {"judge_imgedit": sum(aspects.values()) / len(aspects), **aspects}


def _uge(answer: Answer) -> Mapping[str, float]:
    return {"judge_uge": answer["score"]}


def _gedit(answer: Answer) -> Mapping[str, float]:
    consistency = min(answer["success"], answer["overedit"])
    quality = min(answer["naturalness"], answer["artifacts"])
    return {
        "judge_sc": consistency,
        "judge_pq": quality,
        "judge_overall": sqrt(consistency * quality),
    }


def _scores(main: str, labels: Mapping[str, str]) -> tuple[Score, ...]:
    apart = Score(_apart(main), "repeats differ by", better=-1, digits=2)
    return (*(Score(name, label, digits=2) for name, label in labels.items()), apart)


def _apart(main: str) -> str:
    return f"{main}_apart"


PROTOCOLS = {
    "paper": Protocol(
        (Question("paper", ("success", "overedit")),),
        _scores(
            "judge_balance",
            {
                "judge_success": "success",
                "judge_overedit": "over-edit",
                "judge_balance": "balance",
            },
        ),
        _paper,
        "judge_balance",
    ),
    "imgedit": Protocol(
        (Question("imgedit", ("compliance", "naturalness", "detail"), 1, 5),),
        _scores(
            "judge_imgedit",
            {
                "judge_imgedit": "ImgEdit",
                "judge_compliance": "compliance",
                "judge_naturalness": "naturalness",
                "judge_detail": "detail",
            },
        ),
        _imgedit,
        "judge_imgedit",
    ),
    "uge": Protocol(
        (Question("uge", ("score",), 1, 5),),
        _scores("judge_uge", {"judge_uge": "UGE"}),
        _uge,
        "judge_uge",
    ),
    "gedit": Protocol(
        (
            Question("gedit-consistency", ("success", "overedit")),
            Question("gedit-quality", ("naturalness", "artifacts"), source=False),
        ),
        _scores("judge_overall", {"judge_sc": "SC", "judge_pq": "PQ", "judge_overall": "overall"}),
        _gedit,
        "judge_overall",
    ),
    PAIRS: Protocol(
        (Question(PAIRS, PAIR_SCORES),),
        _scores(PAIR_SCORES[0], {name: name for name in PAIR_SCORES}),
        dict,
        PAIR_SCORES[0],
    ),
}

"""Score nano on edits of scenes that it never saw: `python -m varedit_nano.evaluate`.

- Accuracy: an edit is accurate if its result is closer to the right target than to any other
  candidate: a dozen alternative edits of the scene, and the unchanged source. Closer means a
  smaller mean squared error inside the union of the two edits' masks.
- Preservation: PSNR to the source outside the right mask. Only local edits count: styles,
  backgrounds and masks of more than half of the picture are left out.
- Tokenizer: PSNR of the source's reconstruction.
- Ceiling: the accuracy of the right target's reconstruction. No transformer can do better.

With `--bundle` ONNX Runtime edits with a bundle of nano, in whatever precision it is. `--against`
compares the accuracy with that of earlier scores, edit by edit: both had the same noise, so that
the difference is known better than either.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from varedit_nano.data import EVALUATION_SEEDS, to_model, to_pixels
from varedit_nano.model import WEIGHTS, load_nano
from varedit_nano.scenes import KINDS, EditSample, draw_alternatives, draw_edit
from varedit_nano.sheets import contact_sheet
from varedit_nano.training import tokenizer_options
from varedit_reference.config import Conditioning, TokenizerConfig
from varedit_reference.pipeline import VAREdit
from varedit_reference.quantisation import quantise
from varedit_runtime.editing.arguments import fast_guidance
from varedit_runtime.editing.editor import Editor

ALTERNATIVES = 12
GLOBAL_KINDS = ("background", "style")
LARGEST_LOCAL_MASK = 0.5
SHEET_ROWS = 12


@dataclass(frozen=True)
class Question:
    """An edit to make, and the alternative edits that its result is compared with."""

    seed: int
    right: EditSample
    alternatives: list[EditSample]


@dataclass(frozen=True)
class EditScore:
    """The scores of one edit.

    margin: see `margin`; the edit is accurate if > 0. preservation, tokenizer: in dB; preservation
    is None for edits that are not local. reachable: the target's reconstruction is accurate.
    """

    kind: str
    seed: int
    instruction: str
    accurate: bool
    margin: float
    preservation: float | None
    tokenizer: float
    reachable: bool


@dataclass(frozen=True)
class Scores:
    """Means over edits; accuracy and ceiling in percent, the others in dB."""

    edits: int
    accuracy: float
    ceiling: float
    preservation: float | None
    tokenizer: float

    @classmethod
    def of(cls, scores: Sequence[EditScore]) -> "Scores":
        kept = [score.preservation for score in scores if score.preservation is not None]
        return cls(
            edits=len(scores),
            accuracy=100 * _mean(score.accurate for score in scores),
            ceiling=100 * _mean(score.reachable for score in scores),
            preservation=_mean(kept) if kept else None,
            tokenizer=_mean(score.tokenizer for score in scores),
        )


def draw_questions(count: int, size: int) -> list[Question]:
    """Draw the edits of the reserved seeds, all kinds in turn."""
    return [
        _draw_question(seed, KINDS[seed % len(KINDS)], size) for seed in EVALUATION_SEEDS[:count]
    ]


def _draw_question(seed: int, kind: str, size: int) -> Question:
    alternatives = draw_alternatives(seed, size, ALTERNATIVES, kind)
    return Question(seed, draw_edit(seed, size, kind), alternatives)


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling; None is the model's own."""

    guidance_scale: float | tuple[float, ...] | None = None
    temperature: float | None = None


def answer(
    model: VAREdit | Editor, questions: Sequence[Question], sampling: SamplingSettings
) -> list[np.ndarray]:
    """Return the model's edits, uint8 [S, S, 3], each with the noise of its question's seed."""
    results = model.edit(
        [Image.fromarray(question.right.source) for question in questions],
        [question.right.instruction for question in questions],
        seed=[question.seed for question in questions],
        guidance_scale=sampling.guidance_scale,
        temperature=sampling.temperature,
    )
    return [np.asarray(getattr(result, "image", result)) for result in results]


@torch.inference_mode()
def reconstruct(model: VAREdit, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode pictures to the tokenizer's bits and decode them, uint8 [S, S, 3]."""
    device = next(model.tokenizer.parameters()).device
    batch: Tensor = torch.from_numpy(np.stack(pictures)).to(device)
    grids, patch = model.config.transformer.grids, model.config.tokenizer.patch
    positions = [(rows * patch, columns * patch) for rows, columns in grids]
    *_, last = quantise(model.tokenizer.encode(to_model(batch)), positions)
    return list(to_pixels(model.tokenizer.decode(last.sum)))


def score(
    question: Question, result: np.ndarray, source_again: np.ndarray, target_again: np.ndarray
) -> EditScore:
    """Score a result, given the tokenizer's reconstructions of source and target."""
    right = question.right
    narrowest = margin(question, result)
    local = right.kind not in GLOBAL_KINDS and right.mask.mean() <= LARGEST_LOCAL_MASK
    return EditScore(
        kind=right.kind,
        seed=question.seed,
        instruction=right.instruction,
        accurate=narrowest > 0,
        margin=narrowest,
        preservation=psnr(result, right.source, ~right.mask) if local else None,
        tokenizer=psnr(source_again, right.source),
        reachable=margin(question, target_again) > 0,
    )


def margin(question: Question, result: np.ndarray) -> float:
    """Return the smallest margin of an edit over its candidates, in [-1, 1]; accurate if > 0.

    A margin is (e - r) / (e + r), with the squared errors r to the right target and e to the
    candidate, inside the union of the masks. NaN counts as -1.
    """
    right = question.right
    others = [(other.target, right.mask | other.mask) for other in question.alternatives]
    others.append((right.source, right.mask))
    margins = []
    for other, region in others:
        to_right = squared_error(result, right.target, region)
        to_other = squared_error(result, other, region)
        margins.append((to_other - to_right) / (to_other + to_right))
    return float(np.nan_to_num(min(margins, key=lambda m: -np.inf if np.isnan(m) else m), nan=-1.0))


def squared_error(a: np.ndarray, b: np.ndarray, region: np.ndarray | None = None) -> float:
    """Return the mean squared difference of pictures [S, S, 3] (0 .. 255) in a region [S, S]."""
    difference = a.astype(np.float64) - b
    return float(np.mean(np.square(difference if region is None else difference[region])))


def psnr(a: np.ndarray, b: np.ndarray, region: np.ndarray | None = None) -> float:
    """Return the PSNR in dB, 10·log10(255² / error); 100 for equal pictures."""
    error = squared_error(a, b, region)
    return float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10)))


def evaluate(
    model: VAREdit,
    questions: Sequence[Question],
    batch: int,
    sampling: SamplingSettings,
    editor: Editor | None = None,
) -> tuple[list[EditScore], list[np.ndarray]]:
    """Return the scores and the resulting pictures of all questions.

    editor: edits in place of the model; the model's tokenizer makes the reconstructions.
    """
    scores, results = [], []
    for start in tqdm(range(0, len(questions), batch), unit="batch", disable=None):
        asked = questions[start : start + batch]
        edited = answer(editor or model, asked, sampling)
        sources = reconstruct(model, [question.right.source for question in asked])
        targets = reconstruct(model, [question.right.target for question in asked])
        scores += map(score, asked, edited, sources, targets)
        results += edited
    return scores, results


def compared(scores: Sequence[EditScore], others: Sequence[Mapping[str, Any]]) -> str:
    """Say how much more accurate scores are than others of the same edits, in percentage points.

    The interval holds the difference of all edits with 95 % confidence. Raises ClickException if
    the edits are others.
    """
    if [score.seed for score in scores] != [other["seed"] for other in others]:
        raise click.ClickException("--against: these are scores of other edits; give --count alike")
    differences = [
        100.0 * (s.accurate - o["accurate"]) for s, o in zip(scores, others, strict=True)
    ]
    mean, error = _mean(differences), float(np.std(differences)) / len(differences) ** 0.5
    return f"accuracy {mean:+.1f} ({mean - 1.96 * error:+.1f} to {mean + 1.96 * error:+.1f}) points"


def by_kind(scores: Sequence[EditScore]) -> dict[str, Scores]:
    """Average the scores over each kind of edit that occurs, and over all edits."""
    kinds = [kind for kind in KINDS if any(score.kind == kind for score in scores)]
    grouped = {kind: Scores.of([s for s in scores if s.kind == kind]) for kind in kinds}
    return grouped | {"overall": Scores.of(scores)}


def score_table(scores: dict[str, Scores]) -> str:
    """Format scores as a table: accuracy and ceiling in percent, the others in dB."""
    lines = [
        f"{'kind':<11}{'edits':>6}{'accurate %':>12}{'ceiling %':>11}{'kept dB':>9}{'tok. dB':>9}"
    ]
    for kind, row in scores.items():
        kept = "-" if row.preservation is None else f"{row.preservation:.2f}"
        lines.append(
            f"{kind:<11}{row.edits:>6}{row.accuracy:>12.1f}{row.ceiling:>11.1f}{kept:>9}"
            f"{row.tokenizer:>9.2f}"
        )
    return "\n".join(lines)


def draw_result_sheet(
    questions: Sequence[Question], results: Sequence[np.ndarray], scores: Sequence[EditScore]
) -> Image.Image:
    """Draw source, result and target: random edits on the left, the worst ones on the right."""
    random = np.random.default_rng(0).permutation(len(questions))[:SHEET_ROWS]
    worst = np.argsort([score.margin for score in scores], kind="stable")[:SHEET_ROWS]
    shown = [index for pair in zip(random, worst, strict=True) for index in pair]
    rows = [(questions[i].right.source, results[i], questions[i].right.target) for i in shown]
    captions = [
        f"{'ok' if scores[i].accurate else 'WRONG'}: {questions[i].right.instruction}"
        for i in shown
    ]
    return contact_sheet(rows, captions, columns=2)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


@click.command()
@click.option("--weights", type=click.Path(exists=True, path_type=Path), default=WEIGHTS)
@click.option("--count", default=540, show_default=True, help="Edits, all kinds in turn.")
@click.option("--guidance-scale", type=float, help="Default: the model's own.")
@click.option("--fast", is_flag=True, help="No guidance at the last two scales.")
@click.option("--temperature", type=float, help="Default: the model's own.")
@click.option("--conditioning", type=click.Choice(["sar", "finest", "full"]), default="sar")
@click.option("--batch", default=20, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle of nano that edits.")
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="Other scores.json.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("nano-scores"))
@tokenizer_options
def main(
    size: TokenizerConfig,
    weights: Path,
    count: int,
    guidance_scale: float | None,
    fast: bool,
    temperature: float | None,
    conditioning: Conditioning,
    batch: int,
    device: str,
    bundle: Path | None,
    against: Path | None,
    out: Path,
) -> None:
    """Score nano; write OUT/scores.json and OUT/sheet.png, and print a table."""
    model = load_nano(weights, conditioning, device, size)
    guidance = model.config.guidance_scale if guidance_scale is None else guidance_scale
    scales = len(model.config.transformer.grids)
    sampling = SamplingSettings(
        fast_guidance((guidance,) * scales) if fast else guidance,
        model.config.temperature if temperature is None else temperature,
    )
    questions = draw_questions(count, model.config.picture_size[0])
    # Read now, as it may be the file that is written.
    others = None if against is None else json.loads(against.read_text())["edits"]
    with nullcontext() if bundle is None else Editor.open(bundle, backend="onnxruntime") as editor:
        scores, results = evaluate(model, questions, batch, sampling, editor)
    summary = by_kind(scores)
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "conditioning": conditioning,
        **asdict(sampling),
        "scores": {kind: asdict(row) for kind, row in summary.items()},
        "edits": [asdict(one) for one in scores],
    }
    (out / "scores.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_result_sheet(questions, results, scores).save(out / "sheet.png")
    click.echo(score_table(summary))
    if others is not None:
        click.echo(f"{compared(scores, others)} against {against}")


if __name__ == "__main__":
    main()

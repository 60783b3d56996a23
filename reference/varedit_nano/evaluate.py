"""Score nano's weights before they are exported: `python -m varedit_nano.evaluate`.

It is `varedit-export evaluate` on nano's benchmarks with the reference in place of a bundle, for
weights that are being trained and for the paper's other conditionings.
"""

from collections.abc import Iterable
from pathlib import Path

import click

from varedit_export.commands.evaluate import show
from varedit_export.console import progress
from varedit_export.evaluation.case import Made, Wanted, batches
from varedit_export.evaluation.evaluate import evaluate
from varedit_export.evaluation.run import Run
from varedit_export.options import EvaluateOptions
from varedit_nano.benchmark import SceneScores
from varedit_nano.model import TOKENIZER_FILE, TRANSFORMER_FILE, WEIGHTS, load_nano
from varedit_nano.training import tokenizer_options
from varedit_reference.config import Conditioning, TokenizerConfig
from varedit_reference.pipeline import VAREdit
from varedit_runtime.bundle import file_digest
from varedit_runtime.editing.arguments import fast_guidance


class ReferenceEdits:
    """Edits that the reference makes. guidance_scale: one, or one per scale."""

    def __init__(
        self,
        model: VAREdit,
        weights: Path,
        guidance_scale: float | tuple[float, ...],
        temperature: float,
        batch: int,
    ) -> None:
        self._model, self._dials, self._batch = model, (guidance_scale, temperature), batch
        self.name = weights.name
        self.identity = {
            **{name: file_digest(weights / name) for name in (TOKENIZER_FILE, TRANSFORMER_FILE)},
            "conditioning": model.config.transformer.conditioning,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
        }

    def edit(self, wanted: Iterable[Wanted]) -> Made:
        guidance_scale, temperature = self._dials
        for batch in batches(wanted, self._batch):
            results = self._model.edit(
                [one.source for one in batch],
                [one.instruction for one in batch],
                seed=[one.seed for one in batch],
                guidance_scale=guidance_scale,
                temperature=temperature,
            )
            yield from zip(batch, results, strict=True)


@click.command()
@click.option("--weights", type=click.Path(exists=True, path_type=Path), default=WEIGHTS)
@click.option("--benchmark", type=click.Choice(["nano", "nano-turns"]), default="nano")
@click.option("--limit", type=int, help="Edits, all kinds alike; by default all.")
@click.option("--guidance-scale", type=float, help="Default: the model's own.")
@click.option("--fast", is_flag=True, help="No guidance at the last two scales.")
@click.option("--temperature", type=float, help="Default: the model's own.")
@click.option("--conditioning", type=click.Choice(["sar", "finest", "full"]), default="sar")
@click.option("--batch", default=20, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="Another run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("nano-scores"))
@tokenizer_options
def main(
    size: TokenizerConfig,
    weights: Path,
    benchmark: str,
    limit: int | None,
    guidance_scale: float | None,
    fast: bool,
    temperature: float | None,
    conditioning: Conditioning,
    batch: int,
    device: str,
    against: Path | None,
    out: Path,
) -> None:
    """Score nano's weights; OUT is the run's folder, as of `varedit-export evaluate`."""
    model = load_nano(weights, conditioning, device, size)
    config = model.config
    guidance = config.guidance_scale if guidance_scale is None else guidance_scale
    edits = ReferenceEdits(
        model,
        weights,
        fast_guidance((guidance,) * len(config.transformer.grids)) if fast else guidance,
        config.temperature if temperature is None else temperature,
        batch,
    )
    options = EvaluateOptions(benchmark=benchmark, output=out, limit=limit)
    other = None if against is None else Run(against)
    with progress() as on_step:
        metrics = {"nano": SceneScores(weights, model)} if benchmark == "nano" else {}
        report = evaluate(edits, options, other, metrics, on_step)
    show(report, out)


if __name__ == "__main__":
    main()

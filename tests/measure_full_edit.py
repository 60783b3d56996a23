"""Edit with a bundle of any size, then let the reference predict the same scales: time and memory.

    varedit-export build --size 2b --res 256 --random-weights 0 -o bundles/2b-256
    python tests/measure_full_edit.py bundles/2b-256 --scales 4

The runtime edits in a process of its own, whose memory is measured. The reference, in fp32 with the
bundle's own weights, is given the text's features, the source's tokens and the bits that the
runtime drew, scale by scale. Exits with 1 if a bit differs that is no tie.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

SEED = 1
RECORDED = ("encode_text", "encode_pictures", "predict")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a full-size edit with the reference.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scales", type=int, default=4, help="that the reference predicts")
    given = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        told, calls = pool.apply(edit, (given.bundle,))
    scales = compare(given.bundle, calls, given.scales)
    print(json.dumps({**told, "scales": scales}, indent=1))
    sys.exit(any(scale["bits that differ and are no ties"] for scale in scales))


def edit(bundle: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Edit as a user does; return time and memory, and (inputs, result) of the backend's calls."""
    from varedit_runtime.bench import INSTRUCTION, peak_memory, synthetic_picture
    from varedit_runtime.editing.editor import Editor

    calls: dict[str, list[Any]] = {name: [] for name in RECORDED}
    with peak_memory() as samples:
        start = perf_counter()
        with Editor.open(bundle) as editor:
            opened = perf_counter()
            for name, kept in calls.items():
                setattr(editor.backend, name, _recorded(getattr(editor.backend, name), kept))
            editor.edit(synthetic_picture(editor.variant), INSTRUCTION, seed=SEED)
            edited = perf_counter()
    told = {
        "seconds to open": round(opened - start, 1),
        "seconds to edit": round(edited - opened, 1),
        "peak memory GB": round(max(samples) / 1e9, 2),
    }
    return told, calls


def _recorded(call: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    def record(*given: Any) -> Any:
        result = call(*given)
        kept.append((given, result))
        return result

    return record


def compare(path: Path, calls: dict[str, list[Any]], count: int) -> list[dict[str, float]]:
    """Compare the reference's first scales, teacher-forced, with the runtime's."""
    import torch

    from varedit_export.manifest_model import sources_of
    from varedit_export.parity.reference_backend import Reference
    from varedit_reference.sampling import TIE, tie_margin
    from varedit_reference.scale_loop import forced, predict_scales
    from varedit_runtime.bundle import Bundle

    bundle = Bundle.open(path)
    variant = bundle.manifest.variant(None)
    reference = Reference.from_sources(*sources_of(bundle)).of(variant)
    model, config = reference.transformer, reference.config
    (((_, mask), features),) = calls["encode_text"]
    (source,) = (torch.from_numpy(result) for _, result in calls["encode_pictures"])
    predicted = [(sampling, output) for (_, sampling), output in calls["predict"]]
    bits = [torch.from_numpy(output.bits).flatten(1, 2) for _, output in predicted]
    scales = []
    with torch.inference_mode():
        text = model.condition(model.text_rows([torch.from_numpy(features[mask])], variant.guided))
        steps = predict_scales(
            model,
            config,
            source.flatten(1, 2),
            text,
            forced(bits),
            [sampling.guidance_scale for sampling, _ in predicted],
            [sampling.temperature for sampling, _ in predicted],
        )
        for step, (sampling, output) in islice(zip(steps, predicted, strict=False), count):
            noise = torch.from_numpy(np.asarray(sampling.noise)).reshape(step.probability.shape)
            differs = (noise < step.probability) != step.bits
            logits = torch.from_numpy(output.logits).reshape(step.logits.shape)
            scales.append(
                {
                    "scale": step.scale,
                    "bits": step.bits.numel(),
                    "bits that differ": int(differs.sum()),
                    "bits that differ and are no ties": int(
                        (differs & (tie_margin(step.logits, noise) > TIE)).sum()
                    ),
                    "largest error of logits": float((logits - step.logits).abs().max()),
                }
            )
    return scales


if __name__ == "__main__":
    main()

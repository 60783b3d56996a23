"""nano is taught a kind of edit that it does not know, by LoRA; what it knew, it still knows."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import varedit_export
from varedit_export import BuildOptions, TrainOptions
from varedit_nano.benchmark import psnr
from varedit_nano.data import EVALUATION_SEEDS, FIRST_TRAINING_SEED
from varedit_nano.scenes import draw_edit
from varedit_runtime import Editor
from varedit_runtime.locate import embedded

NEW = "tint it green"
GREEN = np.array([0.35, 1.1, 0.45]) * np.array([[0.299], [0.587], [0.114]])
PAIRS, UNSEEN = 45, 18  # unseen: two of each kind
KNOWN = 3  # edits of nano's own with each new one, so that it forgets less of them

Edit = tuple[np.ndarray, np.ndarray, str]


def tinted(seed: int) -> Edit:
    source = draw_edit(seed, 128).source
    return source, np.rint(np.clip(source @ GREEN, 0, 255)).astype(np.uint8), NEW


def known(seed: int) -> Edit:
    edit = draw_edit(seed, 128)
    return edit.source, edit.target, edit.instruction


def write_pairs(folder: Path, edits: Sequence[Edit]) -> Path:
    lines = []
    for number, (source, target, instruction) in enumerate(edits):
        names = [f"{number}-source.png", f"{number}-target.png"]
        for name, picture in zip(names, (source, target), strict=True):
            Image.fromarray(picture).save(folder / name)
        lines.append({"source": names[0], "target": names[1], "instruction": instruction})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scores(editor: Editor, edits: Sequence[Edit]) -> float:
    """Return the mean PSNR of a bundle's edits to the right results."""
    everywhere = np.ones((128, 128), bool)
    total = 0.0
    for seed, (source, target, instruction) in enumerate(edits):
        result = editor.edit(Image.fromarray(source), instruction, seed=seed)
        total += psnr(target, np.asarray(result.image), everywhere)
    return total / len(edits)


def test_nano_learns_a_new_edit_and_forgets_little(tmp_path: Path) -> None:
    first = FIRST_TRAINING_SEED
    taught = [tinted(seed) for seed in range(first, first + PAIRS)]
    taught += [known(seed) for seed in range(first, first + KNOWN * PAIRS)]
    pairs = write_pairs(tmp_path, taught)
    options = TrainOptions(
        size="nano",
        data=(pairs,),
        output=tmp_path / "run",
        lora=16,
        steps=45,
        batch=4,
        learning_rate=2e-3,
        at_once=4,
        keep_activations=True,
    )
    with torch.enable_grad():
        adapter = varedit_export.train(options)
    built = varedit_export.build(
        BuildOptions(
            size="nano",
            loras=(adapter.parent,),
            precision="fp32",
            graphs_from=embedded(),
            output=tmp_path / "bundle",
        )
    )
    assert [lora.file for lora in built.manifest.model.loras or ()] == ["run/adapter.safetensors"]
    unseen = EVALUATION_SEEDS[:UNSEEN]
    new, old = [tinted(seed) for seed in unseen], [known(seed) for seed in unseen]
    measured = {}
    for name, path in {"before": embedded(), "after": built.path}.items():
        with Editor.open(path, threads=1) as editor:
            measured[name] = scores(editor, new), scores(editor, old)
    (new_before, old_before), (new_after, old_after) = measured["before"], measured["after"]
    print(measured)
    assert old_before > 24  # dB: the weights that ship draw most of these edits right
    assert new_after > new_before + 8
    assert old_after > old_before - 2

"""Write recordings in the format of `tests/golden`, of models that no recording there has.

What they hold is this reference's own results, so they prove what the check reads and covers, not
the arithmetic.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from released import write_released_tokenizer, write_released_transformer
from safetensors.torch import save_file
from torch import Tensor

from varedit_reference.checkpoint import load_tokenizer, load_transformer
from varedit_reference.golden.recordings import recorded_config
from varedit_reference.quantisation import from_tokens, positions, quantise, source_tokens
from varedit_reference.scale_loop import forced, predict_scales
from varedit_runtime.pictures import from_decoder, restore, to_square


def record(folder: Path, **changes: Any) -> Path:
    """Record an edit of a random model; changes are those of its config.json."""
    folder.mkdir()
    settings = {
        **{"codebook_dim": 8, "patch": 16, "base_ch": 32, "ch_mult": [1, 1, 1, 1, 2]},
        **{"text_channels": 128, "patchify": 0, "depth": 4, "embed_dim": 64, "num_heads": 2},
        **{"block_chunks": 2, "pn": "0.06M", "seed": 1, "text_len": 6, "cfg": 4.0, "tau": 0.5},
        **{"image_hw": [90, 120]},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    config = recorded_config(folder.name, settings)
    chunks = settings["block_chunks"]
    write_released_transformer(config, 1, folder / "var.pth", torch.float32, chunks)
    write_released_tokenizer(config, 2, folder / "vae.pth", torch.float32)
    with torch.inference_mode():
        tensors = _run(folder, settings)
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, _file(folder))
    return folder


def _file(folder: Path) -> Path:
    return folder / "golden.safetensors"


def _run(folder: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    config = recorded_config(folder.name, settings)
    grids, patch = config.transformer.grids, config.tokenizer.patch
    generator = torch.Generator().manual_seed(settings["seed"])
    tokenizer = load_tokenizer(folder / "vae.pth", config.tokenizer)
    model = load_transformer(folder / "var.pth", config.transformer)

    height, width = settings["image_hw"]
    image = torch.randint(256, (height // 8, width // 8, 3), generator=generator).byte()
    picture = Image.fromarray(image.numpy()).resize((width, height))
    text = torch.randn(settings["text_len"], settings["text_channels"], generator=generator)
    tensors = {"in.image_rgb_u8": torch.tensor(np.asarray(picture)), "in.text_features": text}
    negatives = None
    if "neg_len" in settings:
        shape = (settings["neg_len"], settings["text_channels"])
        negatives = [torch.randn(shape, generator=generator)]
        tensors["in.negative_text_features"] = negatives[0]

    square = torch.from_numpy(to_square(picture, config.picture_size))
    features = tokenizer.encode(square[None])
    tensors |= {"out.preprocessed_image": square, "out.encoder_features": features}
    for k, scale in enumerate(quantise(features, [positions(grid, patch) for grid in grids])):
        tensors[f"out.quantizer_bits.{k}"] = scale.bits.permute(0, 2, 3, 1)[:, None].byte()
        tensors["out.quantized_sum"] = scale.sum

    source = source_tokens(features, grids, patch, "sar")
    condition = model.condition(model.text_rows([text], settings["cfg"] != 1, negatives))
    tensors |= {"out.source_tokens": source, "out.text_pooled": condition.pooled}
    shapes = [(1, rows * columns, config.tokenizer.token_channels) for rows, columns in grids]
    bits = [torch.rand(shape, generator=generator) < 0.5 for shape in shapes]
    steps = predict_scales(
        model, config, source, condition, forced(bits), settings["cfg"], settings["tau"]
    )
    total = features
    for k, step in enumerate(steps):
        on_grid = from_tokens(bits[k].float(), grids[k], patch)[0]
        tensors[f"in.forced_bits.{k}"] = on_grid.permute(1, 2, 0).byte()
        if step.tokens is not None:
            tensors[f"out.scale_input_tokens.{k}"] = step.tokens[0]
        tensors[f"out.guided_logits.{k}"] = step.logits[0]
        tensors[f"out.bit1_probability.{k}"] = step.probability[0]
        total = step.sum
    decoded = from_decoder(tokenizer.decode(total)[0].numpy())
    restored = np.asarray(restore(decoded, (width, height)))
    tensors["out.image_rgb_u8"] = torch.from_numpy(decoded)
    tensors["out.restored_image_rgb_u8"] = torch.tensor(restored)
    return tensors

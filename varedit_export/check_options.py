"""Check the options of a build by themselves, before PyTorch is imported or weights are looked for.

What is wrong with them is so told at once, also where the extra `export` is not installed.
"""

import os
from collections.abc import Collection
from functools import cache
from pathlib import Path

from varedit_export.options import BuildOptions
from varedit_export.weights.names import NANO_SIZE, PUBLISHED, parse
from varedit_reference.config import PRESETS, preset
from varedit_runtime.backends.auto import AUTO
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import CheckpointError, ConfigError, shown
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import LARGEST_BATCH
from varedit_runtime.precision import Precision, named

TEXT_TOKENS = 128


def check_build(options: BuildOptions) -> None:
    """Refuse options that are impossible or contradict each other.

    Raises ConfigError, and CheckpointError if weights are missing among them.
    """
    _check_model(options)
    _check_conditioning(options)
    policy = None if options.precision == AUTO else named(options.precision)
    check_limits(policy, options.batch, text_tokens(options), options.fused_attention)
    for lora in options.loras:
        parse(os.fspath(lora))
    _check_weights(options)


def check_limits(policy: Precision | None, batch: int, tokens: int, fused: bool) -> None:
    """Raise ConfigError on what no variant of a bundle can have.

    policy: None where it is not chosen yet. tokens: of an instruction. fused: with the twin for
    ONNX Runtime's CUDA provider.
    """
    if not (1 <= batch <= LARGEST_BATCH and 1 < tokens <= 512):
        raise ConfigError(
            f"a bundle takes a batch of 1 to {LARGEST_BATCH} and 2 to 512 text tokens, not "
            f"{batch} and {tokens}"
        )
    if fused and policy and (not policy.onnxruntime or policy.no_cuda):
        raise ConfigError(
            f"ONNX Runtime runs no {policy.name} on a GPU: build with --precision fp16, or "
            "without --fused-attention"
        )


def text_tokens(options: BuildOptions) -> int:
    """Return the most tokens of an instruction."""
    if options.text_tokens is not None:
        return options.text_tokens
    return nano().manifest.variant(None).text_tokens if options.size == NANO_SIZE else TEXT_TOKENS


@cache
def nano() -> Bundle:
    """Open the embedded bundle, which a wheel has too; nano's fp32 weights come back exactly."""
    return Bundle.open(embedded())


def _check_model(options: BuildOptions) -> None:
    size, resolutions = options.size, options.resolutions
    if options.config is not None:
        if size is not None or resolutions:
            raise ConfigError("--config says the size and resolution: leave out --size and --res")
        if not os.path.isfile(options.config):
            raise ConfigError(f"there is no file {options.config}: give a recording's config.json")
    elif size == NANO_SIZE:
        _check_nano(options)
    elif size is not None and size not in PRESETS:
        raise ConfigError(
            f"no size is called {shown(size)}; there are {NANO_SIZE}, {', '.join(PRESETS)}"
        )
    elif size is None or not resolutions:
        raise ConfigError("give both --size and --res, such as --size 2b --res 512, or --config")
    else:
        for resolution in resolutions:
            preset(size, resolution, options.aspect)


def _check_nano(options: BuildOptions) -> None:
    own = nano().manifest.variant(None).resolution
    if not {own}.issuperset(options.resolutions) or options.aspect != "1:1":
        asked = ", ".join(map(str, options.resolutions)) or own
        raise ConfigError(
            f"nano was trained at {own} px and 1:1 alone, not at {asked} px and {options.aspect}: "
            "leave out --res and --aspect"
        )


def _check_conditioning(options: BuildOptions) -> None:
    """Refuse a conditioning that the weights were not trained with."""
    chosen = options.checkpoint is not None or options.random_weights is not None
    if options.conditioning != "sar" and not chosen:
        raise ConfigError(
            f"--conditioning {options.conditioning}: weights that come with a size were trained "
            "with sar; give the --checkpoint that was trained with it, or leave it out"
        )
    if options.conditioning != "sar" and options.config is not None:
        raise ConfigError("--config: recordings are of models with sar; leave out --conditioning")


def _check_weights(options: BuildOptions) -> None:
    places = {
        "--checkpoint": options.checkpoint,
        "--tokenizer": options.tokenizer,
        "--text-encoder": options.text_encoder,
    }
    missing = [name for name, place in places.items() if place is None]
    own = len(missing) == len(places) and options.source is None
    if options.random_weights is not None or (options.size == NANO_SIZE and own):
        if not own:
            raise ConfigError("--random-weights replaces all checkpoints: give it or them")
        if options.prefer_ema:
            raise ConfigError("--prefer-ema chooses in a checkpoint: give one, or leave it out")
        return
    if options.size in PUBLISHED:
        return
    if options.source is not None:
        raise ConfigError(f"--from: only {' and '.join(PUBLISHED)} are published")
    if options.config is not None and "--text-encoder" in missing:  # it starts at text features
        missing.remove("--text-encoder")
    if missing:
        size = options.size or Path(options.config or "").resolve().parent.name
        raise CheckpointError(_missing_weights(size, missing))


def _missing_weights(size: str, missing: Collection[str]) -> str:
    """Say which weights a build of this size must still be given. missing: names of options."""
    if size == NANO_SIZE:
        return (
            "size nano has its own weights: give none, or all of --checkpoint, --tokenizer and "
            "--text-encoder"
        )
    return (
        f"size {size} needs {' and '.join(missing)}, each a path or hf://OWNER/REPOSITORY/PATH; or "
        "--random-weights SEED for structure and speed alone"
    )

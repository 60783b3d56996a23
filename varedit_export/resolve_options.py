"""Turn the options of a build into its plan: model, grids, weights, names, folder."""

import json
from functools import cache
from pathlib import Path

from varedit_export.manifest_model import sources_of
from varedit_export.options import BuildOptions
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import (
    NANO_SIZE,
    Sources,
    checkpoint_sources,
    missing_weights,
    random_sources,
)
from varedit_reference.config import PRESETS, ModelConfig, preset
from varedit_reference.golden import PIXEL_BUDGETS, recorded_config
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import CheckpointError, ConfigError, shown
from varedit_runtime.locate import default_root, embedded

TEXT_TOKENS = 128


def plan_of(options: BuildOptions) -> BundlePlan:
    """Return the plan of a build.

    Raises ConfigError on options that are impossible or contradict each other, CheckpointError on
    weights that are missing, cannot be read or do not fit.
    """
    options.check_types()
    models = _models(options)
    (config, _), *_ = models
    sources = _sources(config, options)
    target = default_root() / _name(config, options, [resolution for _, resolution in models])
    requests = [
        VariantRequest(
            config=config,
            resolution=resolution,
            aspect=options.aspect,
            precision=options.precision,
            batch=options.batch,
            guided=options.guided,
            text_tokens=_text_tokens(options),
            target=target if options.output is None else Path(options.output),
        )
        for config, resolution in models
    ]
    return BundlePlan(requests, sources)


def _models(options: BuildOptions) -> list[tuple[ModelConfig, int]]:
    """Return the model with the grids of every resolution, and that resolution."""
    size, resolutions = options.size, options.resolutions
    if options.config is not None:
        if size is not None or resolutions:
            raise ConfigError("--config says the size and resolution: leave out --size and --res")
        return [_recorded(Path(options.config))]
    if size == NANO_SIZE:
        return [_nano_model(options)]
    if size is not None and size not in PRESETS:
        raise ConfigError(
            f"no size is called {shown(size)}; there are {NANO_SIZE}, {', '.join(PRESETS)}"
        )
    if size is None or not resolutions:
        raise ConfigError("give both --size and --res, such as --size 2b --res 512, or --config")
    return [(preset(size, resolution, options.aspect), resolution) for resolution in resolutions]


def _recorded(config: Path) -> tuple[ModelConfig, int]:
    try:
        settings = json.loads(config.read_text())
        model = recorded_config(config.resolve().parent.name, settings)
        return model, PIXEL_BUDGETS[settings["pn"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{config} does not describe a recording: give its config.json"
        ) from error


def _nano_model(options: BuildOptions) -> tuple[ModelConfig, int]:
    own = _nano().manifest.variant(None).resolution
    if not {own}.issuperset(options.resolutions) or options.aspect != "1:1":
        asked = ", ".join(map(str, options.resolutions)) or own
        raise ConfigError(
            f"nano was trained at {own} px and 1:1 alone, not at {asked} px and {options.aspect}: "
            "leave out --res and --aspect"
        )
    return sources_of(_nano())[0], own


@cache
def _nano() -> Bundle:
    """Open the embedded bundle, which a wheel has too; nano's fp32 weights come back exactly."""
    return Bundle.open(embedded())


def _text_tokens(options: BuildOptions) -> int:
    if options.text_tokens is not None:
        return options.text_tokens
    return _nano().manifest.variant(None).text_tokens if options.size == NANO_SIZE else TEXT_TOKENS


def _sources(config: ModelConfig, options: BuildOptions) -> Sources:
    checkpoint, tokenizer, text_encoder = (
        None if path is None else Path(path)
        for path in (options.checkpoint, options.tokenizer, options.text_encoder)
    )
    if options.random_weights is not None:
        if checkpoint or tokenizer or text_encoder:
            raise ConfigError("--random-weights replaces all checkpoints: give it or them")
        return random_sources(config, options.random_weights)
    if options.size == NANO_SIZE and not (checkpoint or tokenizer or text_encoder):
        return sources_of(_nano())[1]
    needed = {"--checkpoint": checkpoint, "--tokenizer": tokenizer}
    if options.config is None:
        needed["--text-encoder"] = text_encoder
    missing = [name for name, path in needed.items() if path is None]
    if checkpoint is None or tokenizer is None or missing:
        raise CheckpointError(missing_weights(config.name, missing))
    return checkpoint_sources(config, checkpoint, tokenizer, text_encoder)


def _name(config: ModelConfig, options: BuildOptions, resolutions: list[int]) -> str:
    """Return the name of a bundle's default folder, such as 2b-256-512-fp16."""
    precision = [] if options.precision == "fp32" else [options.precision]
    random = [] if options.random_weights is None else ["random"]  # never in the real one's place
    return "-".join([config.name, *map(str, resolutions), *precision, *random])

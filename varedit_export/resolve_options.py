"""Turn the options of a build into its plan: model, grids, weights, names, folder."""

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from varedit_export.check_options import nano, text_tokens
from varedit_export.estimate import check_memory, needs
from varedit_export.graphs_from import check_requests, check_weights_fit
from varedit_export.manifest_model import sources_of
from varedit_export.options import BuildOptions
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import (
    Sources,
    checkpoint_sources,
    random_sources,
)
from varedit_export.weights.download import Download, Further
from varedit_export.weights.lora import merge_loras, short_name
from varedit_export.weights.names import NANO_SIZE, PUBLISHED, parse
from varedit_export.weights.published import Places, bring_weights, find_weights
from varedit_reference.config import ModelConfig, preset
from varedit_reference.golden.recordings import PIXEL_BUDGETS, recorded_config
from varedit_reference.weights_file import open_weights, read_header_file
from varedit_runtime.backends.auto import AUTO, best, best_precision
from varedit_runtime.backends.detect import detect_machine
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, reason
from varedit_runtime.locate import default_root

MOST_NAMED = 3  # LoRA adapters in the name of a folder


def plan_of(
    options: BuildOptions, accept: Callable[[Download], None] = lambda download: None
) -> BundlePlan:
    """Return the plan of a build, after downloading the weights that it needs from the hub.

    options: that `check_build` lets pass. accept: called before that, if anything has to be
    downloaded; it raises to refuse.

    Raises ConfigError on a model, or graphs to take, that the options do not fit, CheckpointError
    on weights that cannot be fetched or read, or do not fit, BundleError on a bundle to take graphs
    from that cannot be read, ExportError if memory is too small for what would be downloaded.
    """
    return _plan(options, partial(_sources, accept=accept))


def plan_without_weights(options: BuildOptions) -> BundlePlan:
    """Return the plan of a build whose weights are neither fetched nor read; see `plan_of`."""
    return _plan(options, _unread)


def model_and_weights(
    options: BuildOptions, accept: Callable[[Download], None] | None = None
) -> tuple[ModelConfig, Sources]:
    """Return the model that options name, of one resolution, and its weights.

    options, accept: see `plan_of`; without accept weights are neither fetched nor read.
    Raises ConfigError and CheckpointError as `plan_of`.
    """
    [(config, _), *_] = _models(options)
    if accept is None:
        return config, _unread(config)
    return config, _sources(config, options, lambda: None, accept)


def _plan(options: BuildOptions, sources_of_build: "_FindSources") -> BundlePlan:
    options = options.for_graphs
    if options.precision == AUTO:
        options = replace(options, precision=best_precision(best(detect_machine())))
    other = None if options.graphs_from is None else Bundle.open(options.graphs_from)
    models = _models(options)
    (config, _), *_ = models
    target = default_root() / _name(config, options, [resolution for _, resolution in models])
    requests = [
        VariantRequest(
            config=config,
            resolution=resolution,
            aspect=options.aspect,
            precision=options.precision,
            batch=options.batch,
            guided=options.guided,
            text_tokens=text_tokens(options),
            fused_attention=options.fused_attention,
            target=target if options.output is None else Path(options.output),
        )
        for config, resolution in models
    ]
    if other is not None:
        check_requests(other, requests)
    further = partial(_further, requests, other)
    plan = BundlePlan(requests, sources_of_build(config, options, further), other)
    if other is not None:
        check_weights_fit(other, plan)
    return plan


def _further(requests: list[VariantRequest], other: Bundle | None) -> Further:
    """Return what a build will take of its disk, before its weights are there.

    Raises ConfigError on impossible requests, ExportError if memory is too small.
    """
    plan = BundlePlan(requests, random_sources(requests[0].config, seed=0), other)
    needed = needs(plan)
    check_memory(needed.memory)
    return Further(plan.request.target, needed.disk, f"the build needs {needed}")


def _models(options: BuildOptions) -> list[tuple[ModelConfig, int]]:
    """Return the model with the grids of every resolution, and that resolution."""
    size, resolutions = options.size, options.resolutions
    if options.config is not None:
        return [_recorded(Path(options.config))]
    if size == NANO_SIZE:
        own = _conditioned(sources_of(nano())[0], options)
        return [(own, nano().manifest.variant(None).resolution)]
    assert size is not None
    return [
        (_conditioned(preset(size, resolution, options.aspect), options), resolution)
        for resolution in resolutions
    ]


def _conditioned(config: ModelConfig, options: BuildOptions) -> ModelConfig:
    transformer = replace(config.transformer, conditioning=options.conditioning)
    return replace(config, transformer=transformer)


def _recorded(config: Path) -> tuple[ModelConfig, int]:
    try:
        settings = json.loads(read_header_file(config))
        model = recorded_config(config.resolve().parent.name, settings)
        return model, PIXEL_BUDGETS[settings["pn"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{config} does not describe a recording ({reason(error)}): give its config.json"
        ) from error


_FindSources = Callable[[ModelConfig, BuildOptions, Callable[[], Further | None]], Sources]


def _unread(config: ModelConfig, *_: object) -> Sources:
    return replace(random_sources(config, seed=0), description="not read")


def _sources(
    config: ModelConfig,
    options: BuildOptions,
    further: Callable[[], Further | None],
    accept: Callable[[Download], None],
) -> Sources:
    loras = [parse(os.fspath(lora)) for lora in options.loras]
    places = _places(options)
    files = bring_weights(places, accept, [place for place, _ in loras], further)
    stored: Collection[str] = ()
    if places:
        transformer, tokenizer, *text_encoder = files.paths
        sources = checkpoint_sources(
            config,
            transformer,
            tokenizer,
            *text_encoder,
            names=files.names,
            prefer_ema=options.prefer_ema,
        )
        stored = open_weights(transformer, options.prefer_ema) if loras else ()
    elif options.random_weights is not None:
        sources = random_sources(config, options.random_weights)
    else:
        sources = sources_of(nano())[1]
    scaled = [(path, scale) for path, (_, scale) in zip(files.adapters, loras, strict=True)]
    merged = merge_loras(sources, scaled, config.transformer, stored)
    return replace(merged, origins=files.origins)


def _places(options: BuildOptions) -> list[str]:
    """Return where the weights are; nothing for random ones and nano's own."""
    given = Places(
        *(
            None if place is None else os.fspath(place)
            for place in (options.checkpoint, options.tokenizer, options.text_encoder)
        )
    )
    if options.random_weights is not None or (options.size == NANO_SIZE and given == Places()):
        return []
    if options.size in PUBLISHED:
        given = find_weights(options.size, options.resolutions, given, options.source)
    places = (given.transformer, given.tokenizer, given.text_encoder)
    return [place for place in places if place is not None]


def _name(config: ModelConfig, options: BuildOptions, resolutions: list[int]) -> str:
    """Return the name of a bundle's default folder, such as 2b-256-512-fp16-lora-style."""
    conditioning = [] if options.conditioning == "sar" else [options.conditioning]
    precision = [] if options.precision == "fp32" else [options.precision]
    random = [] if options.random_weights is None else ["random"]  # never in the real one's place
    loras = [short_name(parse(os.fspath(lora))[0]) for lora in options.loras]
    named = ["lora", *loras][: 1 + MOST_NAMED] if loras else []
    sizes = map(str, resolutions)
    return "-".join([config.name, *sizes, *conditioning, *precision, *random, *named])

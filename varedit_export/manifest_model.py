"""Write the model that a bundle is built from into its manifest, and read it back.

Two directions of one mapping, side by side: `manifest_of` and its `_model_of` say in the manifest
what was built; `sources_of` and its `_model_config` make of a bundle the model and the weights that
it could be built from again, so that it is compared with a reference of its own weights.
"""

from collections.abc import Mapping
from importlib.metadata import version
from math import log2

from msgspec import UNSET
from torch import Tensor

from varedit_export.graphs.layout import Restored, Unpacked, transformer_layout
from varedit_export.graphs.text import restore_text_encoder
from varedit_export.plan import BundlePlan
from varedit_export.sources import Sources, TextSource
from varedit_reference.config import ModelConfig, TokenizerConfig, TransformerConfig
from varedit_reference.weights_file import open_weights
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import printable
from varedit_runtime.grids import scale_grids
from varedit_runtime.manifest import FileEntry, Manifest, Model, ParityLine, Variant

TOOLS = ("varedit-export", "torch", "onnx-ir", "onnxscript", "onnxruntime")


def tool_versions() -> dict[str, str]:
    """Return the installed version of every tool that a bundle's files depend on."""
    return {tool: version(tool) for tool in TOOLS}


def manifest_of(
    plan: BundlePlan,
    variants: tuple[Variant, ...],
    files: Mapping[str, FileEntry],
    parity: tuple[ParityLine, ...],
) -> Manifest:
    """Return the manifest of a bundle that was made as planned."""
    request = plan.request
    return Manifest(
        name=_label(request.target.name),
        model=_model_of(request.config, plan.sources),
        precision=request.precision,
        fp32_exceptions=request.policy.fp32_exceptions,
        guidance_scale=request.config.guidance_scale,
        temperature=request.config.temperature,
        variants=variants,
        files=dict(files),
        tools=tool_versions(),
        parity=parity,
    )


def _label(text: str) -> str:
    """Return names of files as a manifest can hold them, whatever characters they have."""
    return printable(text)[:1000]


def _model_of(whole: ModelConfig, sources: Sources) -> Model:
    config, tokenizer = whole.transformer, whole.tokenizer
    text = sources.text and sources.text.config
    return Model(
        size=whole.name,
        bits=tokenizer.bits,
        downsampling=tokenizer.downsampling,
        patch=tokenizer.patch,
        token_channels=tokenizer.token_channels,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        text_channels=config.text_channels,
        conditioning=config.conditioning,
        rotary=config.rotary,
        weights=_label(sources.description),
        norm_groups=tokenizer.groups,
        text_distance=text and text.max_distance,
        text_epsilon=text and text.epsilon,
        origins=sources.origins or UNSET,
        loras=sources.loras or UNSET,
        random=sources.random or UNSET,
        trained_on=sources.trained_on,
    )


def sources_of(bundle: Bundle) -> tuple[ModelConfig, Sources]:
    """Return the model and the weights that a bundle was built from.

    Every tensor is restored from the bundle's own files when it is asked for.
    """
    files = {
        name: Unpacked(open_weights(bundle.weights_path(name)), bundle.manifest.policy, name)
        for name in ("transformer", "tokenizer", "text_encoder")
        if name in bundle.components
    }
    config = _model_config(bundle, files["tokenizer"])
    layout, model = transformer_layout(config.transformer), bundle.manifest.model
    text = None
    if "text_encoder" in files:
        assert model.text_distance and model.text_epsilon
        encoder, state = restore_text_encoder(
            files["text_encoder"], model.text_distance, model.text_epsilon
        )
        text = TextSource(encoder, state, bundle.tokenizer_json())
    transformer = Restored(layout, files["transformer"])
    return config, Sources(
        transformer,
        files["tokenizer"],
        text,
        model.weights,
        bundle.digest,
        random=bool(model.random),
        trained_on=model.trained_on,
    )


def _model_config(bundle: Bundle, tokenizer: Mapping[str, Tensor]) -> ModelConfig:
    """Return the model that `_model_of` wrote into the manifest.

    The tokenizer's widths are not in the manifest: they are read off its weights.
    """
    model, (variant, *_) = bundle.manifest.model, bundle.manifest.variants
    levels = int(log2(model.downsampling)) + 1
    widths = [len(tokenizer[f"encoder.levels.{i}.blocks.0.conv1.weight"]) for i in range(levels)]
    channels = len(tokenizer["encoder.conv_in.weight"])
    return ModelConfig(
        model.size,
        TokenizerConfig(
            bits=model.bits,
            downsampling=model.downsampling,
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            patchify=model.patch == 2,
            groups=model.norm_groups,
        ),
        TransformerConfig(
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            token_channels=model.token_channels,
            text_channels=model.text_channels,
            grids=variant.grids,
            table_grids=scale_grids(1024, variant.aspect),
            conditioning=model.conditioning,
            rotary=model.rotary,
        ),
        bundle.manifest.guidance_scale,
        bundle.manifest.temperature,
    )

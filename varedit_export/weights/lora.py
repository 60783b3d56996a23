"""LoRA adapters: read as strangers' files, and merged into a transformer's weights one by one.

    W' = W + scale · alpha / rank · B · A       W [out, in], B [out, rank], A [rank, in]

Adapters of PEFT keep rank and alpha in adapter_config.json; those of kohya's scripts and of
diffusers keep alpha beside the factors, or take the rank for it. Modules are named as in the
released checkpoints, or as in the reference. Whatever else a file holds is an error: a part of an
adapter that is left out would edit wrongly without a sign of it.

    base_model.model.block_chunks.0.module.1.sa.mat_qkv.lora_A.weight     PEFT
    lora_unet_block_chunks_0_module_1_sa_mat_qkv.lora_down.weight         kohya
    transformer.block_chunks.0.module.1.sa.mat_qkv.lora.down.weight       diffusers

PEFT's fan_in_fan_out tells how the adapted model stored W, and changes neither A nor B.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest, sha256
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from msgspec import Meta, Struct
from safetensors import safe_open
from torch import Tensor, nn

from varedit_export.sources import Sources
from varedit_export.weights.digest import weights_digest
from varedit_export.weights.names import SUFFIX
from varedit_reference.checkpoint import (
    NamedShape,
    empty_transformer,
    listed,
    own_layout,
    recognise_transformer_layout,
    released_transformer,
)
from varedit_reference.config import TransformerConfig
from varedit_reference.weights_file import check_finite, check_float, open_weights, read_header_file
from varedit_runtime.errors import CheckpointError, one_line, printable, shown
from varedit_runtime.manifest import MergedLora
from varedit_runtime.values import LARGEST

SETTINGS = "adapter_config.json"
TRAINED = "adapter.safetensors"  # in the folder of a run of `varedit-export train`
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", TRAINED)  # in a folder
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in the file itself
BASE = "base_digest"  # where `varedit-export train` keeps that of the weights under an adapter
PEFT = "base_model.model."
COMPONENTS = ("transformer.", "unet.")
PREFIXES = (PEFT, *COMPONENTS, "diffusion_model.", "lora_unet_", "lora_transformer_", "")
PARTS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up"), "up"),
    "alpha": "alpha",
}
_ENTRY = re.compile(
    r"(?P<module>.+)\.(?:(?P<alpha>alpha)"
    r"|(?P<factor>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)?\.weight)"
)
# What marks the tensors of other kinds of adapters.
KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon",
    "oft_": "OFT",
    "ia3_": "IA3",
    "vera_": "VeRA",
    "lora_embedding_": "LoRA of embeddings",
    "modules_to_save": "whole modules",
    ".bias": "biases",
}
# Settings of PEFT with which an adapter is more than B · A, and the ways of starting its training
# that leave the weights under it as they are.
REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_NAME = re.compile(r"\^?(?:[\w.-]|\\\.)+\$?")  # of modules; a dot may be escaped
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)  # that an alpha may be stored as

Value = TypeVar("Value")
Rank = Annotated[int, Meta(ge=0, lt=2**31)]
Alpha = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]


class _Settings(Struct, frozen=True, dict=True):
    """The settings of PEFT that say how much of B · A is added."""

    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool = False

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return _of(self._ranks, module, self.r)

    def factor(self, module: str) -> float:
        """Return what B · A of a module is multiplied with."""
        rank = self.rank(module)
        alpha = _of(self._alphas, module, self.lora_alpha)
        return alpha / ((sqrt(rank) if self.use_rslora else rank) or 1)

    @cached_property
    def _ranks(self) -> dict[str, tuple[int, int]]:
        return _by_name(self.rank_pattern)

    @cached_property
    def _alphas(self) -> dict[str, tuple[int, float]]:
        return _by_name(self.alpha_pattern)


@dataclass(frozen=True)
class Change:
    """What an adapter adds to a weight: factor · up [out, rank] · down [rank, in]."""

    down: Tensor
    up: Tensor
    factor: float

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the changed weight in fp32; the weight itself if nothing would change."""
        if not (self.factor and self.down.any() and self.up.any()):
            return weight  # adding a zero would change the sign of another
        return torch.addmm(weight.float(), self.up.float(), self.down.float(), alpha=self.factor)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read: what the manifest says of it, and its changes by parameter.

    base: `weights_digest` of the weights that it was trained on, if it says so.
    """

    record: MergedLora
    changes: Mapping[str, Change]
    base: str | None = None


class Merged(Mapping[str, Tensor]):
    """A transformer's weights with adapters merged; each is made when it is looked up."""

    def __init__(self, weights: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> None:
        self._weights, self._adapters = weights, adapters

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        for adapter in self._adapters:
            if name in adapter.changes:
                weight = adapter.changes[name].added_to(weight)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def short_name(place: str) -> str:
    """Return what to call an adapter in the name of a folder."""
    path = Path(place.partition("@")[0])
    name = path.parent.name if path.name in FILES else path.name.removesuffix(SUFFIX)
    return re.sub(r"[^A-Za-z0-9_+-]", "-", name)[:24]


def merge_loras(
    sources: Sources,
    loras: Sequence[tuple[Path, float]],
    config: TransformerConfig,
    stored: Collection[str],
) -> Sources:
    """Return a build's weights with adapters merged into the transformer, in their order.

    loras: files or folders of adapters, with their scales. stored: names in the transformer's file;
    they tell in how many chunks its blocks are. Raises CheckpointError if an adapter cannot be
    read, is of another kind than LoRA, or does not fit the transformer.
    """
    if not loras:
        return sources
    products = product_names(config, stored)
    adapters = [read_adapter(path, scale, products) for path, scale in loras]
    factors = [[(n, c.factor) for n, c in sorted(a.changes.items())] for a in adapters]
    records = tuple(adapter.record for adapter in adapters)
    return replace(
        sources,
        transformer=Merged(sources.transformer, adapters),
        description=f"{sources.description}{_foreign(sources, adapters)}",
        identity=sha256(repr((sources.identity, records, factors)).encode()).hexdigest(),
        loras=records,
    )


def _foreign(sources: Sources, adapters: Sequence[Adapter]) -> str:
    """Say which adapters were trained on other weights than these, for people."""
    if not any(adapter.base for adapter in adapters):
        return ""
    own = weights_digest(sources.transformer)
    foreign = [a.record.file for a in adapters if a.base not in (None, own)]
    return f" ({', '.join(foreign)} was trained on other weights)" if foreign else ""


def product_names(config: TransformerConfig, stored: Collection[str] = ()) -> dict[str, NamedShape]:
    """Return the weights of a transformer's products by all names that adapters have for them.

    stored: see `merge_loras`; without chunks in it they are taken to be those of 2b and 8b.
    """
    chunked = released_transformer(config.depth)
    if any(name.startswith("block_chunks.") for name in stored):
        chunked = recognise_transformer_layout(stored, config)
    names = {}
    for module, layer in empty_transformer(config).named_modules():
        if isinstance(layer, nn.Linear):
            own = NamedShape(f"{module}.weight", tuple(layer.weight.shape))
            for layout in (own_layout, released_transformer(config.depth, None), chunked):
                name = layout(own).name.removesuffix(".weight")
                names[name] = names[name.replace(".", "_")] = own
    return names


def read_adapter(path: Path, scale: float, products: Mapping[str, NamedShape]) -> Adapter:
    """Read a safetensors file, or PEFT's folder, as an adapter of these products.

    products: of `product_names`. Raises CheckpointError as `merge_loras`.
    """
    file = _file(path)
    weights = open_weights(file)
    settings = _settings(file, weights)
    modules = _modules(file, weights)
    if settings is None and any(name.startswith(PEFT) for name in modules):
        raise CheckpointError(f"{file} is PEFT's and lacks {SETTINGS} beside it: copy it there")
    found = _matched(file, modules, settings, products)
    changes = {
        own: _change(f"{shown(module)} of {file.name}", module, modules[module], settings, scale)
        for own, module in found.items()
    }
    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    name = printable(file.relative_to(path.parent).as_posix())[:1000]
    return Adapter(MergedLora(name, digest, scale), changes, _metadata(file).get(BASE))


def _matched(
    file: Path,
    modules: Mapping[str, Mapping[str, Tensor]],
    settings: _Settings | None,
    products: Mapping[str, NamedShape],
) -> dict[str, str]:
    """Return which module changes each parameter. Reads names and shapes alone.

    Raises CheckpointError unless every module fits a product, each product once.
    """
    found: dict[str, str] = {}
    problems: dict[str, list[str]] = {"unmatched": [], "misshapen": [], "repeated": []}
    for module, parts in modules.items():
        own = _find(module, products)
        if own is None:
            problems["unmatched"].append(shown(module))
        elif own.name in found:
            problems["repeated"].append(shown(module))
        elif (rank := _rank(own, parts)) is None or (settings and settings.rank(module) != rank):
            shapes = (f"{part} {[*tensor.shape]}" for part, tensor in sorted(parts.items()))
            problems["misshapen"].append(f"{shown(module)} {', '.join(shapes)} for {[*own.shape]}")
        else:
            found[own.name] = module
    if told := listed(problems, most=10):
        raise CheckpointError(
            f"{file} does not fit: {told}; expected up [out, rank] and down [rank, in] of products "
            "of the transformer that is built"
        )
    return found


def _change(
    told: str, module: str, parts: Mapping[str, Tensor], settings: _Settings | None, scale: float
) -> Change:
    """Return what a module adds. Raises CheckpointError on a type or number that is refused.

    told: what to call the module in a message.
    """
    for part, tensor in parts.items():
        if part != "alpha" or tensor.dtype not in INTEGERS:
            check_finite(f"{part} of {told}", check_float(f"{part} of {told}", tensor))
    rank = len(parts["down"])
    if "alpha" in parts or settings is None:
        factor = (parts["alpha"].item() if "alpha" in parts else rank) / (rank or 1)
    else:
        factor = settings.factor(module)
    if not abs(scale * factor) <= torch.finfo(torch.float32).max:
        raise CheckpointError(
            f"{told} is multiplied with {scale:g} times {factor:g}, past the range of float32: "
            "give a smaller scale, or use another adapter"
        )
    return Change(parts["down"], parts["up"], scale * factor)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} holds no adapter: expected {' or '.join(FILES)} in it")
        return found[0]
    if path.suffix != SUFFIX:
        raise CheckpointError(
            f"{path} is no {SUFFIX} file: adapters are read from that format alone; save it so"
        )
    return path


def _modules(file: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each adapted module by what they are: down, up, alpha."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in weights.items():
        match = _ENTRY.fullmatch(name)
        part = match and PARTS[match["alpha"] or match["factor"]]
        if match is None or part is None or part in modules.setdefault(match["module"], {}):
            unknown.append(name)
            continue
        modules[match["module"]][part] = tensor
    kind = next((kind for mark, kind in KINDS.items() if any(mark in n for n in unknown)), None)
    if unknown or not modules:
        told = ", ".join(map(shown, unknown[:10])) or "nothing"
        raise CheckpointError(
            f"{file} holds {kind or 'other things than LoRA'} ({len(unknown)}: {told}): expected "
            "lora_A and lora_B, or lora_down and lora_up, of each module, once"
        )
    return modules


def _settings(file: Path, weights: Mapping[str, Tensor]) -> _Settings | None:
    """Return PEFT's settings: beside the file, or in its header; None for other adapters."""
    if file.name != FILES[0] and not any(".lora_A." in name for name in weights):
        return None
    beside = file.parent / SETTINGS
    inside = _metadata(file).get(METADATA)
    source = beside if beside.is_file() else file
    try:
        if source == beside:
            text = read_header_file(beside).decode("utf-8-sig")  # some editors write such a mark
            content = msgspec.json.decode(text, type=dict[str, Any])
        elif inside is not None:
            content = msgspec.json.decode(inside, type=dict[str, Any])
            prefix = next((p for p in COMPONENTS if any(n.startswith(p) for n in content)), "")
            content = {n.removeprefix(prefix): v for n, v in content.items()}
        else:
            return None
        _check_kind(source, content)
        settings = msgspec.convert(content, _Settings)
    except (msgspec.MsgspecError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{source} has no settings of a LoRA ({one_line(error)}): copy it again"
        ) from error
    for pattern in [*(settings.rank_pattern or ()), *(settings.alpha_pattern or ())]:
        if not _NAME.fullmatch(pattern):
            raise CheckpointError(
                f"{source}: the pattern {shown(pattern)} is a regular expression, and such from "
                "strangers can take for ever: write the modules' names in its place"
            )
    return settings


def _metadata(file: Path) -> Mapping[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _check_kind(source: Path, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the kind, unless an adapter is plain LoRA."""
    kind, bias = content.get("peft_type", "LORA"), content.get("bias", "none")
    start = content.get("init_lora_weights", True)
    other = [f"{name} {shown(content[name])}" for name in REFUSED if content.get(name)]
    if kind != "LORA":
        other.append(f"peft_type {shown(kind)}")
    if bias != "none":
        other.append(f"bias {shown(bias)}")
    if start not in STARTS:  # the training started from weights that were changed as well
        other.append(f"init_lora_weights {shown(start)}, which changes the weights under it")
    if other:
        raise CheckpointError(
            f"{source} asks for {', '.join(other)}: only plain LoRA is merged; convert the adapter "
            "to that, or merge it before and give the whole checkpoint"
        )


def _by_name(pattern: Mapping[str, Value] | None) -> dict[str, tuple[int, Value]]:
    """Return settings with their place in the pattern by name; a whole name begins with ^."""
    named: dict[str, tuple[int, Value]] = {}
    for place, (name, value) in enumerate((pattern or {}).items()):
        named.setdefault(name.removesuffix("$").replace("\\.", "."), (place, value))
    return named


def _of(named: Mapping[str, tuple[int, Value]], module: str, default: Value) -> Value:
    """Return a module's own setting: of the first name that is its own or ends its own.

    named: of `_by_name`. Looks the module's endings up: a file can hold very many names.
    """
    module = module.removeprefix(PEFT)
    parts = module.split(".")
    names = [f"^{module}", *(".".join(parts[start:]) for start in range(len(parts)))]
    return min((named[name] for name in names if name in named), default=(0, default))[1]


def _find(module: str, products: Mapping[str, NamedShape]) -> NamedShape | None:
    names = (module.removeprefix(prefix) for prefix in PREFIXES if module.startswith(prefix))
    return next((products[name] for name in names if name in products), None)


def _rank(own: NamedShape, parts: Mapping[str, Tensor]) -> int | None:
    """Return the rank of a module's factors; None if they are not a change of this weight."""
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None or parts.get("alpha", torch.ones(1)).numel() != 1:
        return None
    rank = len(down) if down.ndim else 0
    fits = down.shape == (rank, own.shape[1]) and up.shape == (own.shape[0], rank)
    return rank if fits else None

"""The weights as the graphs use them: what the exporter folds, fuses, transposes and casts.

A graph's weight is named as in `model.py`; this file says how each is made from the
reference's parameters. What changes on the way, so that no graph has to do it at run time:

- matrices are stored [in, out], as ONNX MatMul reads them;
- the biases of fused projections are whole, the zero key biases included;
- the channels of every query and key head go from interleaved pairs to halves (first elements,
  then second ones), in which a rotation needs no shuffling: their products do not change;
- a self-attention's learned scale is exp(min(s, ln 100)), an AdaLN scale is 1 + scale.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varedit_reference.config import TransformerConfig
from varedit_reference.transformer import MAX_LOG_SCALE
from varedit_reference.weights_file import check_finite, torch_dtype
from varedit_runtime.errors import ConfigError
from varedit_runtime.precision import Precision, Storage, product_of


@dataclass(frozen=True)
class GraphWeight:
    """A graph's weight: the reference's parameters that it is made from, and both directions.

    make: makes it from those parameters; restore: makes them from it. Both are in fp32.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    restore: Callable[[Tensor], Sequence[Tensor]]


def transformer_layout(config: TransformerConfig) -> dict[str, GraphWeight]:
    """Return every weight of the transformer's graphs, by name."""
    weights = {
        "unconditional_text": same("unconditional_text"),
        "start_token": same("start_token"),
        "level_embedding": same("level_embedding.weight"),
        "text_norm": same("text_norm.weight"),
        "text_pool.query": same("text_pool.query"),
        "text_pool.kv.weight": transposed("text_pool.kv.weight"),
        "text_pool.kv.bias": _after_zeros("text_pool.value_bias"),
        **_linear("token_embedding"),
        **_linear("text_pool.projection"),
        **_linear("text_memory.0"),
        **_linear("text_memory.2"),
        **_linear("head"),
        "shared_modulation.weight": transposed("shared_modulation.weight"),
        "shared_modulation.bias": same("shared_modulation.bias"),
        "head_modulation.weight": transposed("head_modulation.weight"),
        "head_modulation.bias": GraphWeight(
            ("head_modulation.bias",),
            lambda bias: _first_half_plus(1, bias),
            lambda made: [_first_half_plus(-1, made)],
        ),
    }
    for i in range(config.depth):
        block = f"blocks.{i}"
        weights |= _block(block, config)
    return weights


def _block(block: str, config: TransformerConfig) -> dict[str, GraphWeight]:
    attention = f"{block}.self_attention"
    cross = f"{block}.cross_attention"
    halves = _pairs_to_halves(config)
    pairs = halves.argsort()

    def qkv(weight: Tensor) -> Tensor:
        query, key, value = weight.chunk(3)
        return torch.cat((query[halves], key[halves], value)).T

    def restore_qkv(made: Tensor) -> list[Tensor]:
        query, key, value = made.T.chunk(3)
        return [torch.cat((query[pairs], key[pairs], value))]

    def qkv_bias(query: Tensor, value: Tensor) -> Tensor:
        return torch.cat((query[halves], torch.zeros_like(value), value))

    def restore_biases(made: Tensor) -> list[Tensor]:
        query, _, value = made.chunk(3)
        return [query[pairs], value]

    return {
        f"{block}.modulation": GraphWeight(
            (f"{block}.modulation",),
            lambda modulation: _scales_plus(1, modulation),
            lambda made: [_scales_plus(-1, made)],
        ),
        f"{block}.qkv.weight": GraphWeight((f"{attention}.qkv.weight",), qkv, restore_qkv),
        f"{block}.qkv.bias": GraphWeight(
            (f"{attention}.query_bias", f"{attention}.value_bias"), qkv_bias, restore_biases
        ),
        f"{block}.attention_scale": GraphWeight(
            (f"{attention}.log_scale",), _attention_scale, lambda made: [made.log()]
        ),
        **_linear(f"{attention}.projection", f"{block}.projection"),
        f"{block}.cross_norm.weight": same(f"{block}.cross_norm.weight"),
        f"{block}.cross_norm.bias": same(f"{block}.cross_norm.bias"),
        **_linear(f"{cross}.query", f"{block}.cross_query"),
        f"{block}.cross_kv.weight": transposed(f"{cross}.kv.weight"),
        f"{block}.cross_kv.bias": _after_zeros(f"{cross}.value_bias"),
        **_linear(f"{cross}.projection", f"{block}.cross_projection"),
        **_linear(f"{block}.mlp.0", f"{block}.mlp_up"),
        **_linear(f"{block}.mlp.2", f"{block}.mlp_down"),
    }


def make_weight(weight: GraphWeight, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Make one weight from the reference's parameters, which may be views of a memory map.

    It is made in fp32, whatever the checkpoint's type, and rounded once. Raises CheckpointError,
    naming the parameter, on numbers that are not finite in the checkpoint or once rounded.
    """
    parameters = (check_finite(source, state[source], dtype) for source in weight.sources)
    return weight.make(*(parameter.float() for parameter in parameters)).to(dtype)


def pack(storage: Storage, weight: Tensor) -> dict[str, Tensor]:
    """Store a weight [in, out] as several tensors, in the types that they are to have.

    Raises ConfigError if they are not those that the storage announced.
    """
    parts, packed = storage.parts(weight.shape), storage.pack(weight)
    if {n: (*part.shape,) for n, part in packed.items()} != {
        n: (*s,) for n, (_, s) in parts.items()
    }:
        raise ConfigError(f"{type(storage).__name__} packs other tensors than its parts say")
    return {name: packed[name].to(torch_dtype(kind)) for name, (kind, _) in parts.items()}


class Unpacked(dict[str, Tensor]):
    """The tensors in a component's file; a weight kept as several is made whole when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], precision: Precision, component: str) -> None:
        super().__init__(tensors)
        self._precision, self._component = precision, component

    def __missing__(self, name: str) -> Tensor:
        storage = self._precision.format(self._component, product_of(name)).storage
        parts = {n.removeprefix(f"{name}."): x for n, x in self.items() if n.startswith(f"{name}.")}
        if storage is None or not parts:
            raise KeyError(name)
        return storage.unpack(parts)


def same(source: str) -> GraphWeight:
    return GraphWeight((source,), lambda x: x, lambda x: [x])


def transposed(source: str) -> GraphWeight:
    return GraphWeight((source,), lambda x: x.T, lambda x: [x.T])


def _linear(source: str, name: str | None = None) -> dict[str, GraphWeight]:
    name = name or source
    return {
        f"{name}.weight": transposed(f"{source}.weight"),
        f"{name}.bias": same(f"{source}.bias"),
    }


def _after_zeros(source: str) -> GraphWeight:
    return GraphWeight(
        (source,),
        lambda bias: torch.cat((torch.zeros_like(bias), bias)),
        lambda made: [made.chunk(2)[1]],
    )


def _first_half_plus(one: int, bias: Tensor) -> Tensor:
    scale, shift = bias.chunk(2)
    return torch.cat((scale + one, shift))


def _scales_plus(one: int, modulation: Tensor) -> Tensor:
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
    return torch.stack((gamma1, gamma2, scale1 + one, scale2 + one, shift1, shift2))


def _attention_scale(log_scale: Tensor) -> Tensor:
    """Return the scale as it acts; it is restored clamped."""
    return log_scale.clamp(max=MAX_LOG_SCALE).exp()


def _pairs_to_halves(config: TransformerConfig) -> Tensor:
    """Return the order of channels [C] that splits each head's interleaved pairs into halves."""
    return torch.arange(config.width).view(config.heads, -1, 2).transpose(1, 2).flatten()


class Restored(Mapping[str, Tensor]):
    """The parameters that a bundle's weights were made from, each restored when looked up."""

    def __init__(self, layout: Mapping[str, GraphWeight], weights: Mapping[str, Tensor]) -> None:
        self._layout, self._weights = layout, weights
        self._made = {source: name for name, w in layout.items() for source in w.sources}

    def __getitem__(self, source: str) -> Tensor:
        name = self._made[source]
        weight = self._layout[name]
        return weight.restore(self._weights[name].float())[weight.sources.index(source)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

"""Round the reference's products and weights as a precision rounds those of the graphs."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from varedit_export.graphs.layout import pack, transformer_layout
from varedit_reference.config import TransformerConfig
from varedit_reference.transformer import Linear
from varedit_reference.weights_file import torch_dtype
from varedit_runtime.precision import Format, Precision, Storage, product_of


def reference_formats(config: TransformerConfig, precision: Precision) -> dict[str, Format]:
    """Return how each product of the reference is computed and stored, by its module's name."""
    return {
        source.removesuffix(".weight"): precision.format("transformer", product_of(name))
        for name, weight in transformer_layout(config).items()
        for source in weight.sources
        if name.endswith(".weight")
    }


def formatted(
    model: nn.Module, formats: Mapping[str, Format], prefix: str = ""
) -> Iterator[tuple[Linear, Format]]:
    """Yield the products of the reference, or of a part of it, with their formats.

    prefix: what the part's names begin with in formats, such as "blocks.0.".
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield module, formats[prefix + name]


def round_products(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Compute the reference's products in their formats, weights rounded as they are stored."""
    for product, format in formatted(model, formats):
        product.compute_dtype = torch_dtype(format.type)
        if format.storage is not None:
            product.round_input = format.storage.round_input
            rounded = round_weight(format.storage, product.weight)
            product.weight = nn.Parameter(rounded, requires_grad=False)


def round_weight(storage: Storage, weight: Tensor) -> Tensor:
    """Return a weight of the reference [out, in] with the values that it has once it is stored."""
    return storage.unpack(pack(storage, weight.float().T)).T

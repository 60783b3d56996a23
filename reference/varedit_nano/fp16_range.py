"""Find the matrix products that exceed fp16's range, by running the reference on real inputs.

    python -m varedit_nano.fp16_range                            all parts of nano, editing scenes
    python -m varedit_nano.fp16_range --text-encoder flan-t5-xl  the encoder of a T5 folder

Operands and results of every product are inspected in fp32: of linear layers, convolutions, and the
two products of an attention. A product is over if an absolute value exceeds `LIMIT`, fp16's largest
number divided by `MARGIN`, as other inputs than these samples may give larger values.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from varedit_nano.model import load_nano
from varedit_reference.pipeline import VAREdit
from varedit_reference.text_encoder import T5_PRODUCTS, TextEncoder
from varedit_runtime.errors import VareditError, needs_extra
from varedit_runtime.precision import FLOAT32, named

if TYPE_CHECKING:
    from varedit_nano.scenes import EditSample

LARGEST = 65504.0  # fp16's largest number
MARGIN = 4
LIMIT = LARGEST / MARGIN
EDITS = 9  # one of each kind
INSTRUCTIONS = 64

_PRODUCTS = (F.linear, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
_ATTENTION = F.scaled_dot_product_attention


@dataclass(frozen=True)
class ProductRange:
    """A measured product. name: its module's. largest: absolute value of operands and results."""

    component: str
    name: str
    largest: float

    @property
    def over(self) -> bool:
        return not self.largest <= LIMIT  # NaN is over

    @property
    def in_fp32(self) -> bool:
        """Whether an fp16 bundle computes it in fp32."""
        product = T5_PRODUCTS.get(self.name.rpartition(".")[2], self.name)
        return named("fp16").format(self.component, product).type == FLOAT32


def measure_products(
    components: Mapping[str, nn.Module], run: Callable[[], object]
) -> list[ProductRange]:
    """Measure the products that `run` computes inside components, in the order of first use."""
    watch = _Watch()
    with ExitStack() as stack:
        for component, root in components.items():
            for name, module in root.named_modules():
                enter = partial(watch.enter, (component, name))
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(watch.leave))
        stack.enter_context(watch)
        run()
    return [ProductRange(*place, largest) for place, largest in watch.largest.items()]


def measure_model(model: VAREdit, edits: Sequence["EditSample"]) -> list[ProductRange]:
    """Measure all parts of a model while it makes these edits, with guidance."""
    components = {
        "text_encoder": model.text_encoder.model,
        "image_encoder": model.tokenizer.encoder,
        "transformer": model.transformer,
        "image_decoder": model.tokenizer.decoder,
    }
    pictures = [Image.fromarray(edit.source) for edit in edits]
    instructions = [edit.instruction for edit in edits]
    seeds = range(len(edits))
    return measure_products(components, lambda: model.edit(pictures, instructions, seed=seeds))


def measure_text_encoder(encoder: TextEncoder, instructions: Sequence[str]) -> list[ProductRange]:
    """Measure a text encoder while it reads instructions."""
    return measure_products({"text_encoder": encoder.model}, lambda: encoder.encode(instructions))


class _Watch(TorchFunctionMode):
    """A mode that intercepts every product and knows the module that computes it.

    largest: the largest absolute value, by component and module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[tuple[str, str], float] = {}
        self._inside: list[tuple[str, str]] = []

    def enter(self, place: tuple[str, str], *_: object) -> None:
        self._inside.append(place)

    def leave(self, *_: object) -> None:
        self._inside.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._inside and func in (*_PRODUCTS, _ATTENTION):
            self._note(result)
            for operand in args[:3]:  # queries, keys and values, or two factors and a bias
                self._note(operand)
            if func is _ATTENTION:
                self._note(_scores(args[0], args[1], (kwargs or {}).get("scale")))
        return result

    def _note(self, values: Tensor | None) -> None:
        place = self._inside[-1]
        size = 0.0 if values is None else values.abs().amax().nan_to_num(inf).item()
        self.largest[place] = max(self.largest.get(place, 0.0), size)


def _scores(queries: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """Compute an attention's scores before mask and softmax, [..., L, S]."""
    return queries @ keys.mT * (queries.shape[-1] ** -0.5 if scale is None else scale)


@click.command()
@click.option("--text-encoder", type=Path, help="A T5 folder, in place of nano.")
def main(text_encoder: Path | None) -> None:
    """Report the matrix products that exceed fp16's range.

    Exits with 1 if the exporter computes one of them in fp16.
    """
    try:
        products = _nano() if text_encoder is None else _text_encoder(text_encoder)
    except VareditError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"limit {LIMIT:.0f}: fp16's largest number, {LARGEST:.0f}, divided by {MARGIN}")
    for component in dict.fromkeys(product.component for product in products):
        click.echo(_summary([p for p in products if p.component == component]))
    if any(product.over and not product.in_fp32 for product in products):
        sys.exit(1)


def _nano() -> list[ProductRange]:
    model = load_nano()
    return measure_model(model, _edits(EDITS, model.config.picture_size[0]))


def _text_encoder(folder: Path) -> list[ProductRange]:
    encoder = TextEncoder.load(folder)
    return measure_text_encoder(encoder, [e.instruction for e in _edits(INSTRUCTIONS, size=16)])


def _edits(count: int, size: int) -> "list[EditSample]":
    """Draw edits of scenes that nano was not trained on."""
    with needs_extra("train"):
        from varedit_nano.data import EVALUATION_SEEDS
        from varedit_nano.scenes import draw_edit
    return [draw_edit(seed, size) for seed in EVALUATION_SEEDS[:count]]


def _summary(products: Sequence[ProductRange]) -> str:
    """Describe one component's largest value, and its products over the limit."""
    top = max(products, key=lambda product: product.largest)
    over = [product for product in products if product.over]
    lines = [
        f"{top.component}: {len(over)} of {len(products)} products over the limit; "
        f"largest {top.largest:.5g}, {top.name}"
    ]
    for product in over:
        kept = "fp32 in exported graphs" if product.in_fp32 else "FP16 IN EXPORTED GRAPHS"
        lines.append(f"  {product.name:<52} {product.largest:12.5g}  {kept}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What is computed in which type, and how weights are stored: one entry per precision.

An entry is data, and the only place that says so. From it the exporter casts in the graphs and
stores the weights, the manifest lists what stays in fp32, the reference is rounded in the same
places, and backends and `doctor` know where a bundle runs. It lies in the runtime, which has no
torch, since all packages read it: types are names, such as "float16".

Products are named as in the graphs, without the number of the block: `blocks.mlp_up`. What lies
between products (residual stream, norms, softmax, sampling) is fp32 in every precision.

To add a precision, add an entry to `PRECISIONS`. One whose weights take several tensors also needs
a `Storage`:

    Precision("int4", stored=(("transformer.blocks.*", ColumnsOfInt4()),))
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from varedit_runtime.errors import ConfigError, shown

FLOAT32 = "float32"
# Steps to either side of 0. A processor without VNNI adds two products at a time in 16 bits, and
# cuts off what is larger: 2 · 255 · 63 fits, 2 · 255 · 127 does not.
WHOLE_BYTE, SEVEN_BITS = 127, 63
LARGEST_FP8 = 448
UNIT = 2.0**-9  # see `EngineColumns`
SMALLEST = 1e-30  # of what a row or column is divided by, for those of zeros
_SIXTEEN_BITS = ("float16", "bfloat16")
Tensor = Any  # torch's, which the runtime does not import


class Storage(ABC):
    """Keep a product's weight W [in, out] as several tensors, such as values and scales.

    Each column of W, an output channel, must be kept independently of the others: channels are
    fused and reordered between the reference and the graphs. Subclasses are frozen dataclasses, so
    that a build that goes on after an interruption knows whether they changed.
    """

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the type and shape of each tensor, by name, for a W of this shape."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the tensors of an fp32 W; the caller casts them to the types of `parts`."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return W in fp32."""

    def round_input(self, x: Tensor) -> Tensor:
        """Return x with the values that the product takes."""
        return x

    def multiply(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return x·W in x's type, from operations that torch.onnx can export."""
        return self.round_input(x) @ self.unpack(parts).to(x.dtype)


@dataclass(frozen=True)
class ByteColumns(Storage):
    """Keep 8-bit values and a scale for each column, and multiply 8-bit values of both factors.

    A column of W is rounded by the largest value in it, when it is stored; a row of x by the
    largest value in that row, as it is multiplied. So no row depends on the others in its batch,
    and nothing has to be measured beforehand.

    largest: of the values of a column, to either side of 0.
    """

    largest: int
    type: ClassVar[str] = "int8"
    largest_input: ClassVar[int] = WHOLE_BYTE  # of the values of a row

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"values": (self.type, shape), "scales": (FLOAT32, shape[1:])}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scales = weight.abs().amax(0).clamp_min(SMALLEST) / self.largest
        return {"values": self.round(weight / scales), "scales": scales}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"].float() * parts["scales"]

    def steps(self, x: Tensor) -> Tensor:
        """Return the size of a step in each row of x [.., channels]: [.., 1]."""
        return x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) * (1 / self.largest_input)

    def round_input(self, x: Tensor) -> Tensor:
        steps = self.steps(x)
        return self.round(x / steps) * steps

    def round(self, steps: Tensor) -> Tensor:
        """Round numbers of steps to the values there are."""
        return steps.round()


class Int8Columns(ByteColumns):
    """Multiply integers as ONNX Runtime does on a CPU: their sums are exact in any order."""


class EngineColumns(ByteColumns):
    """Multiply integers as engines do, by products whose quantisation scales are constants.

    The constant is UNIT in every product, so plans do not depend on the weights. The scales that a
    product needs are multiplied around it:

        (x · UNIT / step, rounded) · (values · UNIT) · scales · step / UNIT²

    With a UNIT of a 512th no sum passes fp16's range.
    """


class Float8Columns(EngineColumns):
    """Multiply E4M3 values (4 bits of exponent, 3 of mantissa), which GPUs have since sm89."""

    type, largest_input = "float8_e4m3fn", LARGEST_FP8

    def round(self, steps: Tensor) -> Tensor:
        kept = steps.clamp(-LARGEST_FP8, LARGEST_FP8)
        exponent = kept.frexp()[1].clamp_min(-5) - 4  # below 2^-6, values are as far apart as there
        spacing = kept.new_ones(kept.shape).ldexp(exponent)
        return (kept / spacing).round() * spacing


@dataclass(frozen=True)
class Format:
    """How a product is computed and its weight stored.

    type: of its operands and its result; storage: None where the weight is one tensor of that type.
    """

    type: str
    storage: Storage | None = None


@dataclass(frozen=True)
class Kept:
    """What stays in fp32, in words for the manifest, and the products among it.

    what: empty for the whole component; products: patterns of their names.
    """

    component: str
    what: str = ""
    products: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.component}: {self.what}" if self.what else self.component


# The transformer's are those that the released code computes in fp32. The coders are small beside
# it, and which of their layers pass fp16's range has not been measured.
KEPT = (
    Kept(
        "transformer",
        "residual stream, norms, softmax, AdaLN, head, sampling",
        ("shared_modulation", "head_modulation", "head"),
    ),
    Kept("text_encoder", "residual stream, norms, softmax"),
    Kept("image_encoder", products=("*",)),
    Kept("image_decoder", products=("*",)),
)
# T5-XL's values pass fp16's largest number in this product: 66246 > 65504.
PAST_FP16 = Kept(
    "text_encoder", "MLP output projections (past fp16's range in T5-XL)", ("blocks.down",)
)


@dataclass(frozen=True)
class Gates:
    """How far a bundle may differ from the reference in fp32.

    features: rms of the error of the text's features, over their rms. logits: largest error of
    guided logits, over the largest of them. Both 0: as in fp32. bits: share of a scale's bits, each
    from the noise of the expected one; 0 where only ties may differ. few: bits that
    always may, as the first scales have few, of which one would be more than a share. blocks: error
    of one block, over the rms of what it adds, from the reference's block with the same roundings:
    fp32 arithmetic in another order gives under 1e-4 at full size, two swapped biases of a random
    model over 1e-2.
    """

    features: float = 0.0
    logits: float = 0.0
    bits: float = 0.0
    few: int = 2
    blocks: float = 1e-3


@dataclass(frozen=True)
class Precision:
    """A choice of `--precision`.

    type: of products, their weights, keys and values; gates: what a bundle of it has to pass;
    kept: what stays in fp32 besides `KEPT`; stored: how weights that are no single tensor are
    stored, by patterns of "component.product"; onnxruntime: whether ONNX Runtime computes it;
    cpu_growth: how many times the bytes of its weights a CPU holds, on which ONNX Runtime computes
    16 bits in fp32; oldest_gpu: the first architecture of GPUs that has its type, as the number in
    "sm89".
    """

    name: str
    type: str = FLOAT32
    gates: Gates = Gates()
    kept: tuple[Kept, ...] = ()
    stored: tuple[tuple[str, Storage], ...] = ()
    onnxruntime: bool = True
    cpu_growth: int = 1
    oldest_gpu: int = 0

    @property
    def exact(self) -> bool:
        """Whether all is fp32: graphs then agree with the reference but for ties."""
        return self.type == FLOAT32 and not self.stored

    @property
    def integers(self) -> bool:
        """Whether products are of integers, which ONNX Runtime computes on CPUs alone."""
        return bool(self._integers)

    @property
    def no_gpu(self) -> str | None:
        """Why no GPU computes it, and what helps; None where one does."""
        if not self.integers:
            return None
        return (
            f"{self.name} is for ONNX Runtime on CPUs alone: build with --precision fp16, or with "
            "fp8 or int8-gpu for engines"
        )

    @property
    def no_cuda(self) -> str | None:
        """Why ONNX Runtime does not compute it on a GPU, and what helps; None where it does."""
        if self.for_engines:
            return (
                f"{self.name} is for engines: compile them with varedit-export engines, "
                "or build with --precision fp16"
            )
        return self.no_gpu

    def not_on(self, gpu: str) -> str | None:
        """Why engines of it do not run on a GPU such as "sm86", and what does; None if they do.

        gpu: may name several, "sm86+sm89", and be followed by a model.
        """
        numbers = re.findall(r"sm(\d+)", gpu)
        old = [f"sm{number}" for number in numbers if int(number) < self.oldest_gpu]
        if self.no_gpu or not old:
            return self.no_gpu
        return (
            f"{old[0]} has no products in {self.name}, which GPUs have since sm{self.oldest_gpu}: "
            "build with --precision int8-gpu or fp16"
        )

    @property
    def for_engines(self) -> bool:
        """Whether its products are those of engines, which nothing else computes fast."""
        return any(isinstance(storage, EngineColumns) for _, storage in self.stored)

    @property
    def rounds_inputs(self) -> bool:
        """Whether what products read is rounded to steps."""
        return any(isinstance(storage, ByteColumns) for _, storage in self.stored)

    @property
    def whole_bytes(self) -> bool:
        """Whether only CPUs that add products of whole bytes exactly compute it: with VNNI, say."""
        return any(storage.largest > SEVEN_BITS for storage in self._integers)

    @property
    def _integers(self) -> list[Int8Columns]:
        return [storage for _, storage in self.stored if isinstance(storage, Int8Columns)]

    @property
    def fp32_exceptions(self) -> tuple[str, ...]:
        """What stays in fp32, as the manifest lists it; nothing where all is fp32."""
        return () if self.exact else tuple(map(str, (*KEPT, *self.kept)))

    def passes(self, dtype: str) -> bool:
        """Return whether graphs may hand on tensors of this type."""
        return dtype not in _SIXTEEN_BITS or dtype == self.type

    def stores(self, dtype: str) -> bool:
        """Return whether graphs may have weights of this type."""
        return dtype in (FLOAT32, self.type) or bool(self.stored)

    def format(self, component: str, product: str) -> Format:
        """Return how a component's product is computed and its weight stored."""
        for kept in (*KEPT, *self.kept):
            if kept.component == component and any(fnmatchcase(product, p) for p in kept.products):
                return Format(FLOAT32)
        name = f"{component}.{product}"
        stored = (s for pattern, s in self.stored if fnmatchcase(name, pattern))
        return Format(self.type, next(stored, None))


ROUNDED = Gates(features=0.01, logits=0.2, bits=0.02)


def _integers(name: str, largest: int) -> Precision:
    storage = Int8Columns(largest)
    return Precision(
        name,
        gates=Gates(features=0.2, logits=0.3, bits=0.05, few=4, blocks=5e-3),
        kept=(
            Kept("transformer", "attention, keys and values, text pooling and memory"),
            Kept("text_encoder", "attention, MLP output projections", ("blocks.down",)),
        ),
        stored=(("transformer.blocks.*", storage), ("text_encoder.blocks.*", storage)),
    )


def _engine_bytes(
    name: str, storage: EngineColumns, gates: Gates, oldest_gpu: int = 0
) -> Precision:
    return Precision(
        name,
        "float16",
        gates,
        kept=(PAST_FP16,),
        stored=(("transformer.blocks.*", storage),),
        cpu_growth=4,
        oldest_gpu=oldest_gpu,
    )


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32"),
        Precision("fp16", "float16", ROUNDED, kept=(PAST_FP16,), cpu_growth=2),
        Precision("bf16", "bfloat16", ROUNDED, onnxruntime=False, cpu_growth=2),
        _integers("int8", WHOLE_BYTE),
        _integers("int7", SEVEN_BITS),
        _engine_bytes(
            "fp8",
            Float8Columns(LARGEST_FP8),
            Gates(features=0.01, logits=0.5, bits=0.1, few=4, blocks=2e-2),
            oldest_gpu=89,
        ),
        _engine_bytes(
            "int8-gpu",
            EngineColumns(WHOLE_BYTE),
            Gates(features=0.01, logits=0.3, bits=0.05, few=4, blocks=5e-3),
        ),
    )
}

# What `build --precision auto` takes. On CPUs int8 is faster and its pictures are others: what that
# costs was measured with nano alone, so whoever wants it names it.
BEST_ON_GPU, BEST_ON_CPU = "fp16", "fp32"


def named(name: str) -> Precision:
    """Return the precision of a name. Raises ConfigError naming those that exist."""
    if name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ConfigError(f"no precision is called {shown(name)}; there are {known}")
    return PRECISIONS[name]


def product_of(weight: str) -> str:
    """Return the product that a graph's weight is of: `blocks.3.qkv.weight` -> `blocks.qkv`."""
    return re.sub(r"\.\d+(?=\.|$)", "", re.sub(r"\.(weight|bias)$", "", weight))

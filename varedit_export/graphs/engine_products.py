"""Products of 8-bit values, as engines compute them in one kernel.

    x · UNIT / step of the row              QuantizeLinear and DequantizeLinear, by UNIT
    rounded · (values · UNIT)               MatMul, of 8-bit values in an engine
    · scales of the columns · step / UNIT²  and back to the type of other products

A compiler takes a product for one of 8 bits if the scales of both factors are constants; what is
multiplied before and after it may be tensors. It fuses these, and the rounding, into the kernels
around the product. See `EngineColumns`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from varedit_export.graphs.integers import Quantised
from varedit_reference.weights_file import torch_dtype
from varedit_runtime.precision import UNIT, EngineColumns


def quantise(storage: EngineColumns, x: Tensor) -> Quantised:
    """Round rows: return their 8-bit values times UNIT, in x's type, and steps over UNIT²."""
    steps, zero = storage.steps(x.float()), torch.zeros((), dtype=torch_dtype(storage.type))
    values = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x.float() * (UNIT / steps), torch.tensor(UNIT), zero),
        dtype=zero.dtype,
        shape=x.shape,
    )
    return Quantised(_widened(values, x.dtype), steps * UNIT**-2)


def multiply(x: Quantised, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Compute rows times a weight that is kept as 8-bit values and scales of its columns."""
    product = x.values @ _widened(parts["values"], dtype)
    return (product.float() * parts["scales"] * x.steps).to(dtype)


def _widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (values, torch.tensor(UNIT, dtype=dtype), torch.zeros((), dtype=values.dtype)),
        dtype=dtype,
        shape=values.shape,
    )

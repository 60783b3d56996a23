"""Products of 8-bit integers, as ONNX Runtime's operator of its own computes them on a CPU.

    q = round(x / step of the row) + 128         QuantizeLinear
    (q - 128)·values · scales of the columns     com.microsoft.MatMulIntegerToFloat, one kernel
    · step of the row

The operator takes what it multiplies with one scale for all rows. That scale is 1, and rows are
scaled around it: so a row is rounded by its own largest value, whatever the others hold.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from varedit_runtime.precision import Int8Columns

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
ONE, MIDDLE = torch.tensor(1.0), torch.tensor(128, dtype=torch.uint8)


class Quantised(NamedTuple):
    """Rows x [.., channels] as values that a product takes, and what scales its result [.., 1]."""

    values: Tensor
    steps: Tensor


def quantise(storage: Int8Columns, x: Tensor) -> Quantised:
    """Round rows: return uint8 values around 128, and the step of each row."""
    steps = storage.steps(x)
    values = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x / steps, ONE, MIDDLE), dtype=torch.uint8, shape=x.shape
    )
    return Quantised(values, steps)


def multiply(x: Quantised, parts: Mapping[str, Tensor]) -> Tensor:
    """Compute rows times a weight that is kept as 8-bit values and scales of its columns."""
    product = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MatMulIntegerToFloat",
        (x.values, parts["values"], ONE, parts["scales"], MIDDLE),
        dtype=torch.float32,
        shape=(*x.values.shape[:-1], parts["values"].shape[1]),
        version=1,
    )
    return product * x.steps

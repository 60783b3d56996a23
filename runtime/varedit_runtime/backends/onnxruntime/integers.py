"""Whether ONNX Runtime multiplies 8-bit integers exactly on this processor.

Processors with VNNI, and those of Arm, add such products in 32 bits. Others with AVX2 or AVX-512
add two at a time in 16 bits, and cut off what is larger. ONNX Runtime is asked instead of the
processor: it chooses its kernels by more than the processor's name.
"""

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from varedit_runtime.errors import BackendError
from varedit_runtime.precision import WHOLE_BYTE, Precision

# ONNX: c = a @ b, a uint8 and b int8 of any size, c int32; tests/product_graph.py writes it.
PRODUCT = Path(__file__).with_name("integer_product.onnx")
ROWS, CHANNELS = (1, 8), 64  # a single row has a kernel of its own
LARGEST = 255  # of uint8
INEXACT = "this processor has no VNNI, and cuts off sums of 8-bit products"


@cache
def exact() -> bool:
    """Return whether the largest products come out whole."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(
        PRODUCT.read_bytes(), settings, providers=["CPUExecutionProvider"]
    )
    b = np.full((CHANNELS, CHANNELS), WHOLE_BYTE, np.int8)
    for rows in ROWS:
        (c,) = session.run(None, {"a": np.full((rows, CHANNELS), LARGEST, np.uint8), "b": b})
        if np.any(np.asarray(c) != LARGEST * WHOLE_BYTE * CHANNELS):
            return False
    return True


def check_exact(precision: Precision) -> None:
    """Raise BackendError if this processor would compute a bundle of the precision wrongly."""
    if precision.whole_bytes and not exact():
        raise BackendError(f"{INEXACT}: build with --precision int7")

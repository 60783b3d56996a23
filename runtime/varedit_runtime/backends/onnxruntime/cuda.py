"""What ONNX Runtime's CUDA provider needs: settings, libraries, and all of a graph's arithmetic.

The settings that it has without ours suit servers that run one network for days: fp32 in TF32, an
arena that doubles, and timing all of cuDNN's algorithms.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO

import onnxruntime as ort

from varedit_runtime.backends.onnxruntime.options import PROVIDERS
from varedit_runtime.errors import BackendError, one_line

# Before it, a captured graph copied pointers from memory that later runs had overwritten.
OLDEST = (1, 30)

_SETTINGS = {
    # TF32 rounds the factors of fp32 products and convolutions to 11 bits; fp32 stays fp32.
    "use_tf32": "0",
    # Each allocation takes what it asks for; by default the arena doubles.
    "arena_extend_strategy": "kSameAsRequested",
    # cuDNN estimates which algorithm is fastest. By default it times all of them in the first edit,
    # which takes as much scratch as the hungriest asks for, and may choose others in the next
    # process: the same seed would then draw another picture. No limit is set on the arena: nobody
    # has measured what these graphs need, and one that is too low fails an edit that would run.
    "cudnn_conv_algo_search": "HEURISTIC",
}

# What the provider leaves to the CPU on purpose, where it computes the shape of a tensor. It has
# kernels of its own for all other uses of these operators, so that no arithmetic hides among them.
SHAPES = {
    *("Shape", "Size", "Squeeze", "Unsqueeze", "Gather", "Slice", "Concat", "Cast", "Range"),
    *("Reshape", "Add", "Sub", "Mul", "Div"),
}


CUDART = "cudart64_13.dll" if sys.platform == "win32" else "libcudart.so.13"
ON_DEVICE = 3  # cudaMemcpyDeviceToDevice


def check_version() -> None:
    """Raise BackendError if the installed onnxruntime is too old for CUDA."""
    major, minor = ort.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        raise BackendError(
            f"onnxruntime-gpu is {ort.__version__}, and captured graphs need {OLDEST[0]}."
            f'{OLDEST[1]} or later: run `pip install --upgrade "onnxruntime-gpu[cuda,cudnn]"`'
        )


def provider_options(captured: bool) -> dict[str, str]:
    """Return the provider's options; captured: whether runs are captured as CUDA graphs."""
    return {**_SETTINGS, "enable_cuda_graph": str(int(captured))}


def preload_libraries() -> str:
    """Load the CUDA and cuDNN libraries that pip installed, which the linker does not find.

    Return which could not be loaded, in one line; "" where none is missing.
    """
    printed = StringIO()  # ONNX Runtime prints what is missing
    with redirect_stdout(printed):
        ort.preload_dlls()
    return one_line(printed.getvalue())


def copy_runs(target: int, source: int, width: int, count: int) -> None:
    """Copy runs of `width` bytes on the GPU, 2·width apart in the source, to one behind the other.

    ONNX Runtime, which has no such copy, loaded CUDA's library, and waits for the GPU after a run.
    Raises RuntimeError if CUDA refuses.
    """
    cuda = ctypes.CDLL(CUDART)
    pointers = ctypes.c_void_p(target), ctypes.c_size_t(width), ctypes.c_void_p(source)
    sizes = ctypes.c_size_t(2 * width), ctypes.c_size_t(width), ctypes.c_size_t(count)
    failed = cuda.cudaMemcpy2D(*pointers, *sizes, ON_DEVICE) or cuda.cudaDeviceSynchronize()
    if failed:
        raise RuntimeError(f"cudaMemcpy2D: error {failed}")


def check_placement(name: str, session: ort.InferenceSession) -> None:
    """Raise BackendError, naming them, if nodes of a graph would run on the CPU.

    The session must have been made with `session.record_ep_graph_assignment_info`.
    """
    if left := list(_left_to_cpu(session)):
        named = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        raise BackendError(
            f"{PROVIDERS['cuda']} would leave {len(left)} nodes of graph {name} to the CPU "
            f"({named}), and copy their tensors back and forth: install another version of "
            "onnxruntime-gpu, or use provider cpu"
        )


def _left_to_cpu(session: ort.InferenceSession) -> Iterator[str]:
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != PROVIDERS["cuda"]:
            for node in part.get_nodes():
                if node.op_type not in SHAPES:
                    yield f"{node.name} ({node.op_type})"

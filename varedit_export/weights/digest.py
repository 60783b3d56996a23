"""Tell one model's weights from another's."""

from collections.abc import Mapping
from hashlib import sha256

from torch import Tensor

SAMPLES = 64  # numbers of a weight that tell it from others


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a sha256 that tells a model's weights from others, by the reference's names.

    It is of all names and shapes, and of a few numbers of each weight: hashing tens of gigabytes
    would take as long as copying them.
    """
    digest = sha256()
    for name in sorted(weights):
        numbers = weights[name].flatten()
        few = numbers[:: max(1, numbers.numel() // SAMPLES)][:SAMPLES].float()
        digest.update(f"{name} {[*weights[name].shape]}".encode() + few.numpy().tobytes())
    return digest.hexdigest()

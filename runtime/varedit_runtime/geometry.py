"""Bilinear resizing of feature maps as matrices: what graphs and runtime must agree on."""

import numpy as np


def bilinear_matrix(size: int, size_in: int) -> np.ndarray:
    """Return the matrix that resizes one axis, float32 [size, size_in].

    Half-pixel centres, no antialias. rows @ map @ columns.T resizes a map, one matrix per axis.
    """
    scale = np.float32(size_in / size)
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    distances = np.abs(centres.clip(0, size_in - 1)[:, None] - np.arange(size_in, dtype=np.float32))
    return (1 - distances).clip(0)

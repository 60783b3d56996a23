"""Run the pieces that `cut.py` takes graphs apart into, in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from varedit_export.parity.cut import CutGraph, Piece, fed
from varedit_export.parity.weight_files import WeightFiles
from varedit_runtime.backends.onnxruntime.backend import load_graph

Arrays = dict[str, np.ndarray]


class Runner:
    """A runner of pieces, which keeps one session for all pieces with the same model."""

    def __init__(self, weights: WeightFiles) -> None:
        self._weights, self._threads = weights, torch.get_num_threads()
        self._sessions: dict[bytes, ort.InferenceSession] = {}

    def run(self, graph: CutGraph, piece: Piece, values: Mapping[str, np.ndarray]) -> Arrays:
        """Run a piece on values and weights; inputs and outputs have the graph's names."""
        if not piece.outputs:
            return {}
        session = self._session(piece)
        feeds = {}
        for alias, name in piece.inputs.items():
            place = graph.places.get(name)
            if place is None:
                feeds[alias] = np.ascontiguousarray(values[name])
            else:
                feeds[alias] = _given(self._weights.read(place))
        results = session.run(list(piece.outputs), feeds)
        return {
            name: np.asarray(x) for name, x in zip(piece.outputs.values(), results, strict=True)
        }

    def _session(self, piece: Piece) -> ort.InferenceSession:
        if piece.model not in self._sessions:
            # Pieces run in turn, with other weights each: memory must be returned after each run.
            self._sessions[piece.model] = load_graph(
                piece.model, Path(), threads=self._threads, arena=False
            )
        return self._sessions[piece.model]


def _given(weight: Tensor) -> np.ndarray | ort.OrtValue:
    """Return a weight as ONNX Runtime takes it; NumPy has no E4M3."""
    given = fed(weight)
    if given.dtype != torch.float8_e4m3fn:
        return given.numpy()
    values = given.contiguous().view(torch.uint8).numpy()
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, from_torch_dtype(given.dtype))

"""The static graphs as a backend: one loaded at a time, on ONNX Runtime and the CPU.

A bundle has a graph for every scale, of which engines are compiled. ONNX Runtime edits with their
symbolic twin instead, since each of its sessions would hold a packed copy of the weights; so the
static graphs are run here alone, to be compared. `wiring` says where their tensors lie, as it does
for engines: what is compared is the edit that engines will run.
"""

from collections.abc import Mapping

import numpy as np
from onnxruntime import InferenceSession

from varedit_export.errors import ParityError
from varedit_export.parity.measures import check_output
from varedit_runtime.backends.graph_backend import GraphBackend
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.onnxruntime.backend import load_graph
from varedit_runtime.backends.wiring import Step, View, crowded, values_of
from varedit_runtime.bundle import Bundle
from varedit_runtime.manifest import Variant


class StaticBackend(GraphBackend):
    """Loads a graph when it is run, and keeps it until another one is.

    Every output of every graph is checked: ParityError is raised on numbers that are not finite, or
    all the same.
    """

    def __init__(self, bundle: Bundle, variant: Variant) -> None:
        super().__init__(variant, bundle.manifest.model, "cpu", symbolic=False)
        self._bundle = bundle
        self._shapes = values_of(list(self.steps.values()))
        self._values: dict[str, np.ndarray] = {}
        self._loaded: tuple[str, InferenceSession] | None = None

    def _run(self, step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self._session(step.stage)
        for name, array in given.items():
            self._value(name)[...] = array
        inputs = {name: self._part(view) for name, view in step.inputs.items()}
        for name, array in zip(step.outputs, session.run(list(step.outputs), inputs), strict=True):
            output = np.asarray(array)
            check_output(step.stage, name, output)
            part = self._part(step.outputs[name])
            if (output.shape, output.dtype) != (part.shape, part.dtype):  # NumPy would convert it
                raise ParityError(
                    f"{step.stage}: {name} is {output.dtype} {output.shape}, and its graph's "
                    f"manifest says {part.dtype} {part.shape}"
                )
            part[...] = output
        return {name: self._values[name].copy() for name in step.read}

    def close(self) -> None:
        self._values, self._loaded = {}, None

    def _session(self, stage: str) -> InferenceSession:
        if self._loaded is None or self._loaded[0] != stage:
            self._loaded = None  # frees the last one before the next takes its memory
            graph = read_graph(self._bundle, self.variant, stage)
            self._loaded = stage, load_graph(graph, self._bundle.graphs_folder)
        return self._loaded[1]

    def _part(self, view: View) -> np.ndarray:
        """Return the part of a value that a tensor is."""
        part = self._value(view.value).reshape(-1).view(np.uint8)[view.offset :][: view.size]
        return part.view(view.dtype).reshape(view.shape)

    def _value(self, name: str) -> np.ndarray:
        """Return a value, zeros where nothing was written."""
        if name not in self._values:
            shape = self._shapes[name]
            self._values[name] = np.zeros(shape.shape, shape.dtype)
        return self._values[name]

    def _drop(self, scale: int) -> None:
        for cache in crowded(list(self.edit_steps.values()), scale):
            cache.move(self._values[cache.value].reshape(-1).view(np.uint8))

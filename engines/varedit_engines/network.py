"""ONNX graphs as engines with external weights need them: weights turned into inputs."""

import onnx
from onnx import helper

from varedit_runtime.engine_set import EngineWeight
from varedit_runtime.manifest import GRAPHS


def external_inputs(graph: bytes) -> tuple[bytes, tuple[EngineWeight, ...]]:
    """Make inputs of the weights that lie in files. -> the graph, and where their bytes lie."""
    model = onnx.load_model_from_string(graph)
    stored = [tensor for tensor in model.graph.initializer if _is_external(tensor)]
    kept = [tensor for tensor in model.graph.initializer if not _is_external(tensor)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in stored
    )
    return model.SerializeToString(), tuple(map(_place, stored))


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _place(tensor: onnx.TensorProto) -> EngineWeight:
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = f"{GRAPHS}/{place['location']}"
    return EngineWeight(tensor.name, file, int(place["offset"]), int(place["length"]))

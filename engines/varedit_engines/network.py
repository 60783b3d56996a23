"""ONNX graphs as engines with external weights need them: weights turned into inputs."""

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from varedit_runtime.backends.engines.engine_set import EngineWeight
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import GRAPHS


def external_inputs(graph: bytes) -> tuple[bytes, tuple[EngineWeight, ...]]:
    """Make inputs of the weights that lie in files. -> the graph, and where their bytes lie.

    Raises BundleError on what is no graph, or does not say where its weights lie.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError as error:
        raise BundleError("a graph is not ONNX: build the bundle again") from error
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
    try:
        file = f"{GRAPHS}/{place['location']}"
        return EngineWeight(tensor.name, file, int(place["offset"]), int(place["length"]))
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"a graph does not say where its weight {tensor.name[:80]!r} lies: build the bundle "
            "again"
        ) from error

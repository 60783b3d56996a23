"""ONNX graphs whose weights lie in files: where these are, and graphs that take them as inputs."""

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from varedit_runtime.errors import BundleError, shown
from varedit_runtime.manifest import GRAPHS, StoredWeight


def external_inputs(graph: bytes) -> tuple[bytes, tuple[StoredWeight, ...]]:
    """Turn the weights that lie in files into inputs, as engines with external weights have them.

    Returns the graph and where the weights lie, in the order of the new inputs. Raises BundleError
    on what is no graph, or does not say where its weights lie.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError as error:
        raise BundleError("a graph is not ONNX: build the bundle again") from error
    weights = external_weights(model.graph)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for tensor in tensors if tensor.name not in weights)
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in tensors
        if tensor.name in weights
    )
    return model.SerializeToString(), tuple(weights.values())


def external_weights(graph: onnx.GraphProto) -> dict[str, StoredWeight]:
    """Return where the weights lie that a graph of a bundle keeps in files, by name.

    Raises BundleError on a weight without a file, an offset and a length.
    """
    return {
        tensor.name: _stored(tensor)
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def _stored(tensor: onnx.TensorProto) -> StoredWeight:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        file = f"{GRAPHS}/{entries['location']}"
        return StoredWeight(tensor.name, file, int(entries["offset"]), int(entries["length"]))
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"a graph does not say where its weight {shown(tensor.name)} lies: build the bundle "
            "again"
        ) from error

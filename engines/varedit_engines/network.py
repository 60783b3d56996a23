"""ONNX graphs as engines need them: weights turned into inputs, a profile for every scale."""

import onnx
from onnx import helper

from varedit_runtime.engine_set import EngineWeight
from varedit_runtime.manifest import GRAPHS, Model, Variant

Sizes = dict[str, int]


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


def scale_profiles(variant: Variant, model: Model) -> list[Sizes]:
    """The symbolic lengths of the scale graph: as the prefill, then at every scale."""
    source = variant.grids[-1][0] * variant.grids[-1][1]
    targets_only = model.conditioning == "sar"  # block 0 then has no source in its past
    prefill = _grids(variant.grids[-1], (1, 1)) | {"reference": 0, "past_0": 0, "past": 0}
    profiles, before = [prefill], 0
    for grid, following in zip(variant.grids, (*variant.grids[1:], (1, 1)), strict=True):
        lengths = {"reference": grid[0] * grid[1], "past": source + before}
        lengths["past_0"] = before if targets_only else source + before
        profiles.append(_grids(grid, following) | lengths)
        before += grid[0] * grid[1]
    return profiles


def _grids(grid: tuple[int, int], following: tuple[int, int]) -> Sizes:
    return dict(zip(("h", "w", "next_h", "next_w"), (*grid, *following), strict=True))

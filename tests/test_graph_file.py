"""What a bundle's graphs may refer to, and that their types are those of the manifest."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest
from fake_bundles import rewrite_manifest
from google.protobuf.message import DecodeError
from msgspec import structs
from onnx import AttributeProto, ModelProto, TensorProto, helper

from varedit_runtime.backends import graph_file
from varedit_runtime.backends.graph_file import read_graph
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.backends.wiring import wire
from varedit_runtime.bundle import Bundle, file_digest
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, BundleError
from varedit_runtime.files import HeldFile
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import (
    FileEntry,
    Manifest,
    canonical_json,
    decode_manifest,
    scale_of,
    weights_file,
)

NANO = Bundle.open(embedded())
(VARIANT,) = NANO.manifest.variants
STAGE = "scale"
POSITIONS = weights_file(f"positions_{VARIANT.name}")


def model_of(stage: str) -> ModelProto:
    return onnx.load_model_from_string(NANO.graph_bytes(VARIANT.name, stage))


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], bytes]:
    """Return a function that reads bytes as if they were the bundle's graph of a stage."""

    def read(data: bytes, stage: str = STAGE) -> bytes:
        monkeypatch.setattr(Bundle, "graph_bytes", lambda *_: data)
        return read_graph(NANO, VARIANT, stage)

    return read


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as refused:
        action()
    return str(refused.value)


@pytest.mark.parametrize("stage", VARIANT.graphs)
def test_the_graphs_of_a_bundle_are_read_as_they_are(stage: str):
    assert read_graph(NANO, VARIANT, stage) == NANO.graph_bytes(VARIANT.name, stage)


# Where weights lie


def placed(location: str, *more: tuple[str, str], offset: int = 0, length: int = 64) -> TensorProto:
    """Return a tensor that lies in a file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length), *more):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


OWN = "weights/transformer.safetensors"
OUTSIDE = [
    *("other.bin", "weights/other.safetensors", "../manifest.json", "../tokenizer.json"),
    *("/etc/passwd", f"./{OWN}", OWN.upper(), f"{OWN}\0", "", "*/_ORT_MEM_ADDR_/*"),
    *(f"{VARIANT.name}.scale.onnx", "weights/../weights/transformer.safetensors"),
]


@pytest.mark.parametrize("location", OUTSIDE)
def test_weights_lie_in_the_bundles_weights_files(
    replaced: Callable[[bytes], bytes], location: str
):
    model = model_of(STAGE)
    model.graph.initializer.append(placed(location))
    said = refusal(lambda: replaced(model.SerializeToString()))
    assert "has its weight 'w' in" in said and "weights/positions" in said


def in_an_attribute(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


def in_a_list(model: ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="x", type=AttributeProto.TENSORS)
    attribute.tensors.append(tensor)


def in_an_inner_graph(model: ModelProto, tensor: TensorProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor])
    model.graph.node[0].attribute.append(helper.make_attribute("then_branch", inner))


def in_inner_graphs(model: ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="x", type=AttributeProto.GRAPHS)
    attribute.graphs.append(helper.make_graph([], "inner", [], [], [tensor]))


def in_a_sparse_tensor(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add().indices.CopyFrom(tensor)


def in_a_sparse_attribute(model: ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="x", type=AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().values.CopyFrom(tensor)


def in_a_function(model: ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.add(name="f", domain="d").node.append(node)


def in_training(model: ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


def without_saying_so(model: ModelProto, tensor: TensorProto) -> None:
    tensor.ClearField("data_location")
    model.graph.initializer.append(tensor)


@pytest.mark.parametrize(
    "hide",
    [
        *(in_an_attribute, in_a_list, in_an_inner_graph, in_inner_graphs, in_a_sparse_tensor),
        *(in_a_sparse_attribute, in_a_function, in_training, without_saying_so),
    ],
)
def test_files_are_found_wherever_a_graph_refers_to_them(
    replaced: Callable[[bytes], bytes], hide: Callable[[ModelProto, TensorProto], None]
):
    model = model_of(STAGE)
    hide(model, placed("other.bin"))
    assert "'graphs/other.bin'" in refusal(lambda: replaced(model.SerializeToString()))


def test_a_place_is_a_file_an_offset_and_a_length(replaced: Callable[[bytes], bytes]):
    first = placed(OWN)
    for spoil in (
        lambda t: t.external_data.pop(),
        lambda t: t.external_data.pop(0),
        lambda t: t.ClearField("external_data"),
        lambda t: t.external_data.add(key="location", value="other.bin"),
        lambda t: t.external_data.add(key="offset", value="0"),
        lambda t: t.external_data.add(key="prepacked_0", value="w|0;64;0"),
        *(
            lambda t, i=i, value=value: setattr(t.external_data[i], "value", value)
            for i in (1, 2)
            for value in ("-1", "", "0x10", "1e3", " 1", "9" * 5000)
        ),
    ):
        model, tensor = model_of(STAGE), TensorProto.FromString(first.SerializeToString())
        spoil(tensor)
        model.graph.initializer.append(tensor)
        said = refusal(lambda model=model: replaced(model.SerializeToString()))
        assert "does not say where its weight 'w' lies" in said


def table() -> tuple[int, int]:
    """Return where the first tensor of the positions' file begins and ends."""
    data = (embedded() / POSITIONS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    first, end = min(t["data_offsets"] for name, t in header.items() if name != "__metadata__")
    return start + first, start + end


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "INT32", "STRING", "UNDEFINED"])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (8, 8), (-1, 0), (0, -4)])
def test_a_weight_lies_in_one_tensor_of_its_type(
    replaced: Callable[[bytes], bytes], kind: str, before: int, after: int
):
    first, end = table()
    model = model_of(STAGE)
    tensor = placed(
        POSITIONS.removeprefix("graphs/"),
        offset=first + before,
        length=end - after - first - before,
    )
    tensor.data_type = TensorProto.DataType.Value(kind)
    model.graph.initializer.append(tensor)
    data = model.SerializeToString()
    if kind == "FLOAT" and min(before, after) >= 0:
        assert replaced(data) == data
    else:
        assert "whose header has no such tensor there" in refusal(lambda: replaced(data))


# Types


def renamed(model: ModelProto) -> None:
    model.graph.output[0].name = "renamed"


def of_another_type(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def of_another_shape(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7


def of_another_rank(model: ModelProto) -> None:
    model.graph.output[-1].type.tensor_type.shape.dim.add().dim_value = 1


def a_sequence(model: ModelProto) -> None:
    value = model.graph.input[0]
    value.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT


def exchanged(model: ModelProto) -> None:
    first, second = list(model.graph.input[:2])
    del model.graph.input[:2]
    model.graph.input.extend([second, first])


@pytest.mark.parametrize(
    "change", [renamed, of_another_type, of_another_shape, of_another_rank, a_sequence, exchanged]
)
def test_inputs_and_outputs_are_those_of_the_manifest(
    replaced: Callable[[bytes], bytes], change: Callable[[ModelProto], None]
):
    model = model_of(STAGE)
    change(model)
    said = refusal(lambda: replaced(model.SerializeToString()))
    assert "has among its" in said and "where the manifest has" in said


def test_no_input_or_output_is_missing_or_too_many(replaced: Callable[[bytes], bytes]):
    more, fewer = model_of(STAGE), model_of(STAGE)
    more.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))
    del fewer.graph.output[-1]
    assert "inputs, where the manifest has" in refusal(lambda: replaced(more.SerializeToString()))
    assert "outputs, where" in refusal(lambda: replaced(fewer.SerializeToString()))


@pytest.mark.parametrize("data", [b"", b"no graph", b"\x08"])
def test_what_is_no_graph_is_refused(replaced: Callable[[bytes], bytes], data: bytes):
    assert "build the bundle again" in refusal(lambda: replaced(data))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_manifest_of_another_precision_than_its_graphs_is_refused(precision: str):
    other = msgspec_json(NANO.manifest)
    other["precision"] = precision
    said = refusal(lambda: decode_manifest(json.dumps(other).encode(), Manifest))
    assert f"is float32, and the bundle's precision is {precision}" in said


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bits_are_refused_where_the_precision_has_none(kind: str):
    other = msgspec_json(NANO.manifest)
    (tensor,) = (t for t in tensors(other, "condition", "outputs") if t["name"] == "start")
    tensor["dtype"] = kind
    said = refusal(lambda: decode_manifest(json.dumps(other).encode(), Manifest))
    assert f"condition's start is {kind}, and the bundle's precision is fp32" in said


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
def test_weights_of_types_that_the_precision_has_not_are_refused(
    replaced: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, kind: str
):
    """The file's header says so too."""
    monkeypatch.setattr(graph_file._Weights, "_holds", lambda *_: True)
    model = model_of(STAGE)
    for tensor in model.graph.initializer:
        if tensor.name == "cos":
            tensor.data_type = TensorProto.DataType.Value(kind.upper())
    said = refusal(lambda: replaced(model.SerializeToString()))
    assert f"has {kind} 'cos', and fp32 has no such weights" in said


def msgspec_json(manifest: Manifest) -> Any:
    return json.loads(canonical_json(manifest))


def tensors(manifest: Any, stage: str, what: str) -> list[Any]:
    return manifest["variants"][0]["graphs"][stage][what]


def test_a_graph_is_read_as_onnx_alone():
    """These bytes are marked as ONNX Runtime's own format too, which no check reads."""
    graph = NANO.graph_bytes(VARIANT.name, "references")
    marked = b"\x7a\x84\x80\x00ORTM" + graph  # a field that ONNX does not know, of four bytes
    assert onnx_backend.load_graph(marked, NANO.graphs_folder).get_inputs()


# The whole bundle


def with_graph(folder: Path, stage: str, change: Callable[[ModelProto], None]) -> Path:
    """Copy nano with another graph, listed as it is."""
    bundle = Path(shutil.copytree(embedded(), folder / "bundle"))
    model, file = model_of(stage), VARIANT.graph(stage).file
    change(model)
    (bundle / file).write_bytes(model.SerializeToString())
    listed(bundle, file)
    return bundle


def listed(bundle: Path, file: str) -> None:
    """Make the manifest list a file as it is."""
    path = bundle / file
    entry = FileEntry(file_digest(path), path.stat().st_size)
    files = {**NANO.manifest.files, file: entry}
    rewrite_manifest(bundle, canonical_json(structs.replace(NANO.manifest, files=files)))


def test_a_digest_vouches_for_all_that_an_editor_reads(tmp_path: Path):
    """A graph may not refer to a file that the manifest does not list."""

    def elsewhere(model: ModelProto) -> None:
        (first, *_) = (t for t in model.graph.initializer if t.external_data)
        (location,) = (e for e in first.external_data if e.key == "location")
        shutil.copy(embedded() / "graphs" / location.value, tmp_path / "bundle/graphs/other.bin")
        location.value = "other.bin"

    bundle = with_graph(tmp_path, "text_encoder", elsewhere)
    for digest in (Bundle.open(bundle).digest, None):
        with pytest.raises(BundleError, match=r"in 'graphs/other\.bin', and the bundle's weights"):
            Editor.open(bundle, digest=digest, threads=1)


def test_no_session_is_made_before_all_graphs_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = with_graph(tmp_path, "image_decoder", renamed)
    monkeypatch.setattr(onnx_backend, "Session", None)
    with pytest.raises(BundleError, match="'renamed'"):
        Editor.open(bundle, threads=1)


@pytest.mark.parametrize("file", [VARIANT.graph("scale_00").file, "tokenizer.json", POSITIONS])
def test_a_digest_covers_files_that_are_not_used(tmp_path: Path, file: str):
    bundle = Path(shutil.copytree(embedded(), tmp_path / "bundle"))
    data = bytearray((bundle / file).read_bytes())
    data[-2] ^= 1
    (bundle / file).write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        Editor.open(bundle, digest=NANO.digest, threads=1)


# Random damage


def damaged(random: Random, data: bytes) -> bytes:
    """Flip bits, cut, repeat or exchange parts of a file."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 5, 30))):
        first, second = sorted(random.randrange(len(changed) + 1) for _ in range(2))
        length = random.randrange(1, 40)
        how = random.randrange(5)
        if how == 0 and changed:
            changed[min(first, len(changed) - 1)] ^= 1 << random.randrange(8)
        elif how == 1:
            changed[first : first + length] = random.randbytes(length)
        elif how == 2:
            del changed[first : random.choice((first + length, second))]
        elif how == 3:
            changed[first:first] = changed[second : second + length]
        else:
            part = changed[first : first + length]
            changed[first : first + length] = changed[second : second + length]
            changed[second : second + length] = part
    return bytes(changed)


def referred(data: bytes) -> Iterator[str]:
    """Yield all files that a graph refers to, as another library reads it."""
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:  # it reads all fields, and the check those that name files and types
        return
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield f"graphs/{entry.value}"


def test_fuzz_damaged_graphs_are_refused_or_refer_to_the_bundles_files(
    cases: Callable[[int], Iterator[Random]], replaced: Callable[..., bytes]
):
    whole = {stage: NANO.graph_bytes(VARIANT.name, stage) for stage in VARIANT.graphs}
    files, read = set(map(weights_file, NANO.components)), 0
    for random in cases(300):
        stage = random.choice(list(whole))
        data = damaged(random, whole[stage])
        try:
            replaced(data, stage)
        except BundleError:
            continue
        read += 1
        assert set(referred(data)) <= files
    assert read  # most damage of nodes is not seen: it is the digest that finds it


def test_fuzz_damaged_headers_of_weights_are_refused_or_agree_with_the_graph(
    cases: Callable[[int], Iterator[Random]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = (embedded() / POSITIONS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path, hold = tmp_path / "positions", Bundle.hold
    monkeypatch.setattr(
        Bundle, "hold", lambda b, name: HeldFile(path) if name == POSITIONS else hold(b, name)
    )
    refused = 0
    for random in cases(200):
        changed = damaged(random, data[:start])
        path.write_bytes(changed + data[len(changed) :])
        try:
            read_graph(NANO, VARIANT, STAGE)
        except BundleError:
            refused += 1
    assert refused > 100


def test_fuzz_a_strangers_bundle_is_refused_or_opened(
    cases: Callable[[int], Iterator[Random]], tmp_path: Path
):
    """Its files are damaged, and listed as they are: the checks of digests find nothing."""
    bundle = Path(shutil.copytree(embedded(), tmp_path / "bundle"))
    opened = [stage for stage in VARIANT.graphs if scale_of(stage) is None and stage != "prefill"]
    names = ["tokenizer.json", POSITIONS, *(VARIANT.graph(stage).file for stage in opened)]
    for random in cases(40):
        name = random.choice(names)
        whole = (embedded() / name).read_bytes()
        (bundle / name).write_bytes(damaged(random, whole))
        listed(bundle, name)
        with suppress(BundleError, BackendError):
            Editor.open(bundle, threads=1).close()
        (bundle / name).write_bytes(whole)


def place(random: Random, value: Any) -> tuple[Any, Any]:
    """Choose a list or mapping inside a JSON value, and one of its keys."""
    while True:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or random.random() < 0.2:
            return value, key
        value = value[key]


STRANGE = (None, True, -1, 0, 1, 2**31 - 1, 2**63, 0.5, 1e308, "", "x", "../x", [], {}, [[]], "é")


def test_fuzz_hostile_manifests_are_refused_or_describe_an_edit(
    cases: Callable[[int], Iterator[Random]],
):
    """Values are exchanged, dropped, repeated and replaced by strange ones."""
    read = 0
    for random in cases(300):
        manifest = msgspec_json(NANO.manifest)
        for _ in range(random.choice((1, 1, 2, 8))):
            (one, key), (other, its) = place(random, manifest), place(random, manifest)
            how = random.randrange(4)
            if how == 0:
                one[key] = random.choice(STRANGE)
            elif how == 1:
                del one[key]
            elif how == 2 and isinstance(one, list):
                one.append(one[key])
            else:
                value = json.loads(json.dumps(one[key]))
                one[key] = json.loads(json.dumps(other[its]))
                if how == 3:
                    other[its] = value
        try:
            decoded = decode_manifest(json.dumps(manifest).encode(), Manifest)
            for variant in decoded.variants:
                wire(variant, decoded.model, symbolic=random.random() < 0.5)
        except BundleError:
            continue
        read += 1
    assert read

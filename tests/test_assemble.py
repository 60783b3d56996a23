"""Building a bundle: graphs, weights, parity, interruption."""

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import bundle_config, half_bundle, quiet, random_weights, request, small_bundle

from varedit_engines.publish import Staging
from varedit_export import assemble as assemble_module
from varedit_export.assemble import assemble
from varedit_export.errors import ParityError
from varedit_export.manifest_model import manifest_of, sources_of
from varedit_export.parity.compare_bundle import compare_bundle
from varedit_export.parity.measures import gate
from varedit_export.plan import BundlePlan
from varedit_export.sources import Sources, random_sources
from varedit_reference.initialise import RandomWeights
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.manifest import Manifest, canonical_json, decode_manifest

SCALES = len(bundle_config().transformer.grids)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(small_bundle())


@pytest.fixture
def graphs(bundle: Bundle) -> dict[str, Path]:
    (variant,) = bundle.manifest.variants
    return {stage: bundle.path / spec.file for stage, spec in variant.graphs.items()}


def test_a_bundle_holds_every_stage_and_one_copy_of_the_weights(
    bundle: Bundle, graphs: dict[str, Path]
) -> None:
    stages = {"text_encoder", "image_encoder", "condition", "prefill", "references", "scale"}
    stages |= {"image_decoder", *(f"scale_{k:02}" for k in range(SCALES))}
    stages |= {"prefill_unguided", *(f"scale_{k:02}_unguided" for k in range(SCALES))}
    assert set(graphs) == stages
    assert set(bundle.components) == {
        "transformer",
        "tokenizer",
        "text_encoder",
        "positions_96-b1",
    }
    stored = sum(bundle.weights_path(name).stat().st_size for name in bundle.components)
    whole = sum(entry.size for entry in bundle.manifest.files.values())
    plan = BundlePlan([request(Path("unused"))], random_weights())
    assert plan.weight_bytes <= stored <= plan.weight_bytes + 100_000
    assert whole - stored < len(graphs) * 10**5


def test_a_manifest_takes_names_of_all_files(bundle: Bundle) -> None:
    odd = "a\nb\x1b\udcff" * 50
    plan = BundlePlan([request(Path(odd))], replace(random_weights(), description=odd))
    made = manifest_of(plan, bundle.manifest.variants, bundle.manifest.files, ())
    assert decode_manifest(canonical_json(made), Manifest) == made


def test_what_weights_are_for_is_kept_when_they_are_built_again(bundle: Bundle) -> None:
    assert bundle.manifest.model.random is True
    assert "trained_on" not in canonical_json(bundle.manifest.model).decode()
    drawn = msgspec.structs.replace(bundle.manifest.model, trained_on="drawn scenes")
    drawn = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, model=drawn), "")
    plan = BundlePlan([request(Path("unused"))], sources_of(drawn)[1])
    model = manifest_of(plan, bundle.manifest.variants, bundle.manifest.files, ()).model
    assert model.random is True and model.trained_on == "drawn scenes"


def test_graphs_are_valid_standard_and_load_without_a_warning(
    graphs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for path in graphs.values():
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == {""}
        assert path.stat().st_size < 2 * 10**6
        options = ort.SessionOptions()
        options.log_severity_level = 2
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert capfd.readouterr().err == ""


def test_graphs_are_static_but_for_the_twin_and_rows(graphs: dict[str, Path]) -> None:
    for stage, path in graphs.items():
        graph = onnx.load(path, load_external_data=False).graph
        values = [*graph.input, *graph.output, *graph.value_info]
        assert {o for node in graph.node for o in node.output} <= {v.name for v in values}
        dims = [d for v in values for d in v.type.tensor_type.shape.dim]
        assert all(v.type.tensor_type.HasField("shape") for v in values)
        static = all(d.HasField("dim_value") for d in dims)
        assert static == stage.startswith(("prefill", "scale_"))
        factors = {part for d in dims if d.dim_param for part in d.dim_param.split("*")}
        named = {part for part in factors if not part.isdigit()}
        assert stage == "scale" or named <= {"rows", "text_tokens", "batch"}


def test_the_twins_dimensions_have_names_that_say_what_they_are(graphs: dict[str, Path]) -> None:
    inputs = {i.name: i for i in onnx.load(graphs["scale"], load_external_data=False).graph.input}

    def shape(name: str) -> list[int | str]:
        dims = inputs[name].type.tensor_type.shape.dim
        return [d.dim_param or d.dim_value for d in dims]

    assert shape("tokens")[1:3] == ["h", "w"] and shape("noise")[1:3] == ["kept_h", "kept_w"]
    assert shape("start")[0] == shape("past_key.1")[1] == shape("picture_of_row")[0] == "rows"
    assert shape("tokens")[0] == shape("noise")[0] == shape("temperature")[0] == "batch"
    assert shape("past_key.1")[0] == "past"
    assert shape("past_value.0")[0] == "past_0"
    assert shape("reference_key")[0] == "reference"


def test_graphs_tell_nothing_of_where_they_were_made(graphs: dict[str, Path]) -> None:
    for path in graphs.values():
        content = path.read_bytes()
        for secret in (str(Path(__file__).parents[1]), str(Path.home()), socket.gethostname()):
            assert len(secret) < 3 or secret.encode() not in content
        assert b".py" not in content
        model = onnx.load(path, load_external_data=False)
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_nodes_are_named_for_the_part_they_belong_to(graphs: dict[str, Path]) -> None:
    names = {n.name for n in onnx.load(graphs["scale_03"], load_external_data=False).graph.node}
    assert {"blocks.0.mlp_up/MatMul", "blocks.1.qkv/MatMul", "head/MatMul"} <= names


def test_parity_was_proven_for_every_scale(bundle: Bundle) -> None:
    measured = {(line.stage, line.measure) for line in bundle.manifest.parity}
    for k in range(SCALES):
        assert (f"scale_{k:02}", "logits, largest error") in measured
        assert (f"scale_{k:02}", "bits that differ and are no ties") in measured
        assert ("scale", f"logits of scale {k}, largest error") in measured
    assert {"text_encoder", "image_encoder", "image_decoder"} <= {s for s, _ in measured}
    assert all(line.value <= line.tolerance for line in bundle.manifest.parity)


def test_a_published_bundle_is_verified_from_its_own_weights(bundle: Bundle) -> None:
    lines = gate(compare_bundle(bundle, *sources_of(bundle)))
    assert len(lines) > 3 * SCALES


@pytest.mark.parametrize(
    ("component", "one", "other"),
    [
        ("transformer", "blocks.1.self_attention.projection", "blocks.1.cross_attention.query"),
        ("transformer", "blocks.0.mlp.0", "blocks.1.mlp.0"),
        ("tokenizer", "decoder.middle.0.conv1", "decoder.middle.0.conv2"),
    ],
)
def test_swapped_tensors_fail_the_gate(
    tmp_path: Path, component: str, one: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = random_weights()
    names = {f"{one}.weight": f"{other}.weight", f"{other}.weight": f"{one}.weight"}
    state = {
        "transformer": dict(good.transformer.items()),
        "tokenizer": dict(good.tokenizer.items()),
    }
    swapped = state | {component: {n: state[component][names.get(n, n)] for n in state[component]}}
    bad = Sources(swapped["transformer"], swapped["tokenizer"], None, "swapped", "swapped")
    plan = BundlePlan([request(tmp_path / "bad")], bad)
    compare = assemble_module.compare_bundle
    given = Sources(state["transformer"], state["tokenizer"], None, "", "")
    monkeypatch.setattr(
        assemble_module,
        "compare_bundle",
        lambda bundle, config, sources: compare(bundle, config, given),
    )
    with pytest.raises(ParityError, match="measures failed"):
        assemble(plan, quiet)
    assert not (tmp_path / "bad").exists()


def test_thirteen_scales_pass_the_gates(tmp_path: Path) -> None:
    config = bundle_config()
    grids = tuple((side, side) for side in range(1, 14))
    config = replace(config, transformer=replace(config.transformer, grids=grids))
    wanted = replace(request(tmp_path / "thirteen"), config=config, guided=False)
    assemble(BundlePlan([wanted], random_sources(config, seed=0)), quiet)
    parity = Bundle.open(wanted.target).manifest.parity
    assert {f"scale_{k:02}" for k in range(13)} <= {line.stage for line in parity}


def test_an_interrupted_build_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []
    record, stop_after = Staging.record, [9]

    def counted(staging: Staging, name: str, key: str | None = None) -> None:
        if len(recorded) in stop_after:
            raise KeyboardInterrupt
        recorded.append(name)
        record(staging, name, key)

    monkeypatch.setattr(Staging, "record", counted)
    target = tmp_path / "small"
    with pytest.raises(KeyboardInterrupt):
        assemble(BundlePlan([request(target)], random_weights()), quiet)
    assert not target.exists()
    first = set(recorded)
    recorded.clear()
    stop_after.clear()
    assemble(BundlePlan([request(target)], random_weights()), quiet)
    assert len(first) == 9 and not first & set(recorded)
    reference = Bundle.open(small_bundle()).manifest
    assert Bundle.open(target).manifest.files == reference.files


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_half_precision_is_written_into_the_graphs(precision: str, kind: str) -> None:
    target = half_bundle(precision)
    bundle = Bundle.open(target)
    (variant,) = bundle.manifest.variants
    graph = onnx.load(target / variant.graphs["scale_02"].file, load_external_data=False).graph
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    assert types["blocks.0.mlp_up.weight"] == kind
    assert types["head.weight"] == types["blocks.0.cross_norm.weight"] == "FLOAT"
    outputs = {spec.name: spec.dtype for spec in variant.graphs["scale_02"].outputs}
    assert outputs["logits"] == outputs["running_sum_out"] == "float32"
    assert outputs["new_key.1"] == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert any("rounded" in line.measure for line in bundle.manifest.parity)
    assert bundle.manifest.fp32_exceptions
    for spec in variant.graphs.values():
        onnx.checker.check_model(target / spec.file, full_check=True)


def test_a_bf16_bundle_is_not_opened_with_onnxruntime() -> None:
    with pytest.raises(BackendError, match="--precision fp32"):
        Editor.open(half_bundle("bf16"))


def test_nothing_of_a_failed_build_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> Iterator[object]:
        raise ParityError("no")

    monkeypatch.setattr(assemble_module, "compare_bundle", broken)
    with pytest.raises(ParityError):
        assemble(BundlePlan([request(tmp_path / "bundle")], random_weights()), quiet)
    assert not (tmp_path / "bundle").exists()


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    good = request(tmp_path)
    with pytest.raises(ConfigError, match="batch"):
        replace(good, batch=0)
    with pytest.raises(ConfigError, match="text tokens"):
        replace(good, text_tokens=513)


def test_random_text_weights_do_not_depend_on_order() -> None:
    text = random_weights().text
    assert text is not None and isinstance(text.state, RandomWeights)
    names = list(text.state)
    digests = [
        hashlib.sha256(text.state[name].numpy().tobytes()).hexdigest()
        for name in (names[2], names[5], names[2])
    ]
    assert digests[0] == digests[2] != digests[1]
    assert torch.isfinite(text.state[names[0]]).all()

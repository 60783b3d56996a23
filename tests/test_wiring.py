"""Which memory the tensors of an edit are: nothing is read unwritten, or written over."""

from collections.abc import Callable

import msgspec
import pytest
from editing import small_bundle

from varedit_runtime.backends.wiring import KINDS, View, constants, sized, values_of, wire
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BundleError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import GraphSpec, Model, TensorSpec, Variant

_CHOSEN = ("noise", "forced_bits", "forced_mask")


def described(bundle: Bundle) -> tuple[Variant, Model]:
    return bundle.manifest.variants[0], bundle.manifest.model


@pytest.fixture(params=["nano", "small"])
def model(request: pytest.FixtureRequest) -> tuple[Variant, Model]:
    return described(Bundle.open(embedded() if request.param == "nano" else small_bundle()))


def entries(view: View) -> set[tuple[str, int]]:
    return {(view.value, view.first + i) for i in range(view.shape[0])}


@pytest.mark.parametrize("symbolic", [False, True])
def test_what_a_step_reads_was_written_or_given(model: tuple[Variant, Model], symbolic: bool):
    steps = wire(*model, symbolic)
    known = {(name, i) for name, array in constants(*model).items() for i in range(len(array))}
    zeros = ("tokens.0", "sum.0", *(f"{name}.prefill" for name in _CHOSEN), "sum.prefill")
    for step in steps:
        given = {
            e for view in step.inputs.values() if view.value in step.fed for e in entries(view)
        }
        read = {e for view in step.inputs.values() for e in entries(view)}
        unknown = {name for name, _ in read - known - given}
        assert not unknown - set(zeros if symbolic else ()), step.name
        known |= {e for view in step.outputs.values() for e in entries(view)}


@pytest.mark.parametrize("symbolic", [False, True])
def test_nothing_is_written_twice_in_an_edit(model: tuple[Variant, Model], symbolic: bool):
    written: set[tuple[str, int]] = set()
    for step in wire(*model, symbolic):
        for view in step.outputs.values():
            assert not entries(view) & written, (step.name, view.value)
            written |= entries(view)


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_scale_sees_all_tokens_before_it(model: tuple[Variant, Model], symbolic: bool):
    variant, described = model
    areas = [rows * columns for rows, columns in variant.grids]
    steps = {step.name: step for step in wire(variant, described, symbolic)}
    for k in range(len(areas)):
        for i in range(described.depth):
            own = 0 if i == 0 and described.conditioning == "sar" else areas[-1]
            seen = own + sum(areas[:k])
            for kind in KINDS:
                new = steps[f"scale_{k:02}"].outputs[f"new_{kind}.{i}"]
                assert (new.first, new.shape[0]) == (seen, areas[k])
                past = steps[f"scale_{k:02}"].inputs.get(f"past_{kind}.{i}")
                assert (past.first, past.shape[0]) == (0, seen) if past else seen == 0


def test_both_wirings_have_the_same_values(model: tuple[Variant, Model]):
    static, symbolic = (values_of(wire(*model, symbolic)) for symbolic in (False, True))
    assert static.keys() <= symbolic.keys()
    assert all(static[name] == symbolic[name] for name in static)


def test_the_host_gives_and_takes_what_an_edit_is(model: tuple[Variant, Model]):
    variant, _ = model
    last = len(variant.grids) - 1
    steps = {step.name: step for step in wire(*model, symbolic=False)}
    taken = steps[f"scale_{last:02}"].read
    assert taken == (f"logits.{last}", f"bits.{last}", f"sum.{last + 1}")
    assert steps["image_decoder"].fed == (f"sum.{last + 1}",)
    assert steps["image_decoder"].read == ("decoded",)
    assert steps["condition"].read == steps["prefill"].read == ()


def test_graphs_that_do_not_fit_together_are_refused():
    variant, model = described(Bundle.open(embedded()))
    graph = variant.graphs["scale_01"]
    inputs = tuple(
        TensorSpec(spec.name, "float16", spec.shape) if spec.name == "past_key.1" else spec
        for spec in graph.inputs
    )
    graphs = variant.graphs | {"scale_01": GraphSpec(graph.file, inputs, graph.outputs)}
    other = Variant(**{**_fields(variant), "graphs": graphs})
    with pytest.raises(BundleError, match=r"scale_01 has cache_key\.1 as float16"):
        values_of(wire(other, model, symbolic=False))


Change = Callable[[GraphSpec], GraphSpec]


def changed(stage: str, change: Change) -> tuple[Variant, Model]:
    """Return nano's manifest with another graph for a stage."""
    variant, model = described(Bundle.open(embedded()))
    graphs = variant.graphs | {stage: change(variant.graphs[stage])}
    return Variant(**{**_fields(variant), "graphs": graphs}), model


def with_input(name: str, shape: tuple[int, ...] = (1, 2)) -> Change:
    more = TensorSpec(name, "float32", shape)
    return lambda graph: msgspec.structs.replace(graph, inputs=(*graph.inputs, more))


def without(name: str) -> Change:
    def change(graph: GraphSpec) -> GraphSpec:
        inputs, outputs = (
            tuple(spec for spec in specs if spec.name != name)
            for specs in (graph.inputs, graph.outputs)
        )
        return GraphSpec(graph.file, inputs, outputs)

    return change


def in_bf16(name: str) -> Change:
    def change(graph: GraphSpec) -> GraphSpec:
        inputs, outputs = (
            tuple(
                msgspec.structs.replace(spec, dtype="bfloat16") if spec.name == name else spec
                for spec in specs
            )
            for specs in (graph.inputs, graph.outputs)
        )
        return GraphSpec(graph.file, inputs, outputs)

    return change


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        ("scale", with_input("past_key.x"), r"input that nothing gives 'past_key\.x'"),
        ("scale", with_input("past_key." + "1" * 5000), r"that nothing gives 'past_key\.111"),
        ("scale", with_input("past_key.\u0663"), r"input that nothing gives 'past_key\."),
        ("scale", with_input("past_key.9"), r"input that nothing gives 'cache_key\.9'"),
        ("scale", with_input("level_of"), "input that nothing gives 'level_of'"),
        ("scale", without("tokens"), r"lacks its input 'source_tokens' \(for step prefill\)"),
        ("scale", without("logits"), r"lacks its output 'logits\.0' \(for step scale_00\)"),
        ("scale", without("running_sum_out"), r"lacks its output 'sum\.1'"),
        ("text_encoder", with_input("style"), "text_encoder has an input that nothing .* 'style'"),
        ("text_encoder", without("text_mask"), "lacks its input 'text_mask'"),
        ("text_encoder", without("text_features"), "lacks its output 'text_features'"),
        ("image_encoder", with_input("hat"), "input that nothing gives 'hat'"),
        ("image_encoder", without("source_tokens"), "lacks its output 'source_tokens'"),
        ("condition", without("has_negative"), "lacks its input 'has_negative'"),
        ("condition", with_input("level"), "input that nothing gives 'level'"),
        ("condition", with_input("token_ids", (0, 48)), "nothing gives 'token_ids'"),
        ("references", with_input("seed"), "input that nothing gives 'seed'"),
        ("image_decoder", with_input("tokens"), "input that nothing gives 'tokens'"),
        ("image_decoder", without("pictures"), "lacks its output 'decoded'"),
        ("image_decoder", in_bf16("pictures"), "bf16, which NumPy cannot represent, as 'decoded'"),
    ],
)
def test_graphs_that_are_not_an_edits_are_refused(stage: str, change: Change, said: str):
    with pytest.raises(BundleError, match=said) as caught:
        wire(*changed(stage, change), symbolic=True)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        ("scale_00", with_input("past_value.x"), r"nothing gives 'past_value\.x'"),
        ("scale_02", with_input("level"), r"nothing gives 'level\.2'"),
        ("scale_02", without("bits"), r"lacks its output 'bits\.2'"),
        ("prefill", without("source_tokens"), "lacks its input 'source_tokens'"),
        ("prefill", with_input("noise"), r"nothing gives 'noise\.prefill'"),
    ],
)
def test_static_graphs_that_are_not_an_edits_are_refused(stage: str, change: Change, said: str):
    with pytest.raises(BundleError, match=said):
        wire(*changed(stage, change), symbolic=False)


def _fields(variant: Variant) -> dict[str, object]:
    return {name: getattr(variant, name) for name in variant.__struct_fields__}


def test_a_graph_without_static_shapes_is_a_typed_error():
    with pytest.raises(BundleError, match=r"start has no static shape"):
        sized(TensorSpec("start", "float32", (1, "tokens")), {})


def test_products_of_lengths_have_sizes():
    assert sized(TensorSpec("new", "float32", ("h*w", 2)), {"h": 3, "w": 5}) == (15, 2)


def test_a_view_knows_its_bytes():
    view = View("cache", (4, 2, 8), "float16", first=3)
    assert (view.row, view.offset, view.size) == (32, 96, 128)


def test_steps_are_named_once():
    steps = wire(*described(Bundle.open(embedded())), symbolic=False)
    assert len({step.name for step in steps}) == len(steps)

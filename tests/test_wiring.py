"""Which memory the tensors of an edit are: nothing is read unwritten, or written over."""

from collections.abc import Callable, Iterable

import msgspec
import numpy as np
import pytest
from editing import full_bundle, small_bundle

from varedit_runtime.backends.wiring import (
    KINDS,
    Crowded,
    Step,
    View,
    constants,
    crowded,
    of_batch,
    sized,
    values_of,
    wire,
)
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BundleError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import UNGUIDED, GraphSpec, Model, TensorSpec, Variant

_CHOSEN = ("noise", "forced_bits", "forced_mask")


def described(bundle: Bundle) -> tuple[Variant, Model]:
    return bundle.manifest.variants[0], bundle.manifest.model


@pytest.fixture(params=["nano", "small", "full"])
def model(request: pytest.FixtureRequest) -> tuple[Variant, Model]:
    path = {"nano": embedded, "small": small_bundle, "full": full_bundle}[request.param]
    return described(Bundle.open(path()))


def edit_of(steps: list[Step], unguided: bool) -> list[Step]:
    """Return the steps of an edit that has guidance throughout, or nowhere."""
    both = {step.name.removesuffix(UNGUIDED) for step in steps if step.unguided}
    shared = [step for step in steps if not step.unguided and step.name not in both]
    return [step for step in steps if step.unguided is unguided or step in shared]


def source_of(areas: list[int], described: Model) -> int:
    return sum(areas) if described.conditioning == "full" else areas[-1]


def entries(view: View) -> set[tuple[str, int]]:
    return {(view.value, view.first + i) for i in range(view.shape[0])}


@pytest.mark.parametrize("unguided", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_what_a_step_reads_was_written_or_given(
    model: tuple[Variant, Model], symbolic: bool, unguided: bool
):
    steps = edit_of(wire(*model, symbolic), unguided)
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
@pytest.mark.parametrize("unguided", [False, True])
def test_nothing_is_written_twice_in_an_edit(
    model: tuple[Variant, Model], symbolic: bool, unguided: bool
):
    written: set[tuple[str, int]] = set()
    for step in edit_of(wire(*model, symbolic), unguided):
        for view in step.outputs.values():
            assert not entries(view) & written, (step.name, view.value)
            written |= entries(view)


@pytest.mark.parametrize("form", ["", UNGUIDED])
@pytest.mark.parametrize("symbolic", [False, True])
def test_a_scale_sees_all_tokens_before_it(model: tuple[Variant, Model], symbolic: bool, form: str):
    variant, described = model
    rows = variant.batch if form else variant.rows
    areas = [rows * columns for rows, columns in variant.grids]
    steps = {step.name: step for step in wire(variant, described, symbolic)}
    for k in range(len(areas)):
        for i in range(described.depth):
            own = 0 if i == 0 and described.conditioning == "sar" else source_of(areas, described)
            seen = own + sum(areas[:k])
            for kind in KINDS:
                new = steps[f"scale_{k:02}{form}"].outputs[f"new_{kind}.{i}"]
                assert (new.first, new.shape[:2]) == (seen, (areas[k], rows))
                past = steps[f"scale_{k:02}{form}"].inputs.get(f"past_{kind}.{i}")
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


def of_one_length(length: int, name: str = "text_tokens") -> Change:
    """Return a graph's change to one that has one length in place of a symbolic one."""

    def static(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            msgspec.structs.replace(
                spec, shape=tuple(length if size == name else size for size in spec.shape)
            )
            for spec in specs
        )

    return lambda graph: GraphSpec(graph.file, static(graph.inputs), static(graph.outputs))


@pytest.mark.parametrize("stage", ["text_encoder", "condition"])
def test_graphs_of_one_length_of_texts_are_not_given_shorter_ones(stage: str):
    most = described(Bundle.open(embedded()))[0].text_tokens
    variant, model = changed(stage, of_one_length(most))
    wire(variant, model, symbolic=True)
    with pytest.raises(BundleError, match=f"graph {stage} takes masks of shape .*{most}.* of 16 t"):
        wire(variant, model, symbolic=True, text_tokens=16)


@pytest.mark.parametrize("stage", ["text_encoder", "image_encoder", "scale", "image_decoder"])
def test_graphs_of_one_number_of_pictures_are_not_given_fewer(stage: str):
    variant, model = changed(stage, of_one_length(2, "batch"))
    wire(of_batch(variant, 2), model, symbolic=True)
    with pytest.raises(BundleError, match=rf"graph {stage} has \S+ as \(2, .* for 1 pictures: "):
        wire(of_batch(variant, 2), model, symbolic=True, batch=1)


@pytest.mark.parametrize("fewer", [1, 2])
def test_fewer_pictures_lie_at_the_beginning_of_the_same_values(
    model: tuple[Variant, Model], fewer: int
):
    variant, described = of_batch(model[0], 3), model[1]
    values = values_of(wire(variant, described, symbolic=True))
    largest = {step.name: step for step in wire(variant, described, symbolic=True)}
    for step in wire(variant, described, symbolic=True, batch=fewer):
        whole = largest[step.name]
        assert all(view.offset + view.size <= values[view.value].size for view in step.views)
        assert (step.fed, step.read) == (whole.fed, whole.read)


def test_every_number_of_pictures_has_profiles_of_its_own(model: tuple[Variant, Model]):
    variant, described = of_batch(model[0], 3), model[1]
    profiles = [
        step.profile
        for batch in (3, 2, 1)
        for step in wire(variant, described, symbolic=True, batch=batch)
        if step.stage == "scale"
    ]
    assert sorted(profiles) == list(range(3 * 2 * (1 + len(variant.grids))))
    assert max(profiles[: len(profiles) // 3]) == len(profiles) // 3 - 1  # those of engines


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
        ("text_encoder", without("text_mask"), "lacks its input 'prompt_mask'"),
        ("text_encoder", without("text_features"), "lacks its output 'text_features'"),
        ("image_encoder", with_input("hat"), "input that nothing gives 'hat'"),
        ("image_encoder", without("source_tokens"), "lacks its output 'source_tokens'"),
        ("condition", without("learned"), "lacks its input 'learned'"),
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


@pytest.mark.parametrize("entries", [0, 1, 2, 3, 7, 64, 100])
def test_conditional_rows_move_together_in_place(entries: int):
    """What is copied never overlaps its target, as a GPU demands."""
    values = np.random.default_rng(entries).integers(0, 256, (entries, 2, 3), dtype=np.uint8)
    memory, cache = values.reshape(-1).copy(), Crowded("cache_key.0", entries, 3)
    cache.move(memory)
    assert np.array_equal(memory[: 3 * entries].reshape(entries, 3), values[:, 0])
    for target, source, count in cache.copies():
        assert target + 3 * count <= source and source + 6 * count <= 6 * entries


def test_caches_and_references_lose_their_unconditional_rows(model: tuple[Variant, Model]):
    variant, described = model
    areas = [rows * columns for rows, columns in variant.grids]
    steps, own = wire(*model, symbolic=True), described.width * variant.batch * 4
    for scale in range(len(areas)):
        moved = {cache.value: cache for cache in crowded(steps, scale)}
        for kind in KINDS:
            past = moved[f"cache_{kind}.1"]
            seen = source_of(areas, described) + sum(areas[:scale])
            assert (past.entries, past.kept) == (seen, own)
            if described.conditioning == "sar":
                references = [n for n in moved if n.startswith(f"reference_{kind}")]
                assert references == [f"reference_{kind}.{k}" for k in range(scale, len(areas))]
                assert all(moved[n].entries == areas[int(n.split(".")[1])] for n in references)
        assert not {"start", "modulation", "sum.1", f"noise.{scale}"} & moved.keys()


def test_values_that_do_not_fit_without_guidance_are_refused():
    variant, model = described(Bundle.open(embedded()))
    graph = variant.graphs["scale_01_unguided"]
    inputs = tuple(
        TensorSpec(spec.name, spec.dtype, (spec.shape[0], 9, *spec.shape[2:]))
        if spec.name == "past_key.1"
        else spec
        for spec in graph.inputs
    )
    graphs = {"scale_01_unguided": GraphSpec(graph.file, inputs, graph.outputs)}
    other = Variant(**{**_fields(variant), "graphs": variant.graphs | graphs})
    with pytest.raises(BundleError, match=r"do not fit together"):
        values_of(wire(other, model, symbolic=False))

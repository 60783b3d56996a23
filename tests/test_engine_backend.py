"""The engines' runtime on a simulated GPU: the same edits as ONNX Runtime's, from the same bits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from editing import full_bundle, pair_bundle, picture, plain_bundle, small_bundle
from fake_bundles import rewrite_manifest
from PIL import Image
from simulated_gpu import SimulatedGpu
from uncompiled import Uncompiled, compiled, keep_engines_in, near

from varedit_engines.compile_set import CompileJob
from varedit_export.cli import main
from varedit_export.errors import ParityError
from varedit_export.parity.compare_bundle import compare_backend
from varedit_export.parity.measures import gate
from varedit_runtime.backends.base import Prompts, Sampling, ScaleOutput, WholeEdit
from varedit_runtime.backends.engines import weights
from varedit_runtime.backends.engines.backend import EngineBackend
from varedit_runtime.backends.engines.engine_set import (
    LAYOUTS,
    EngineLayout,
    EngineSet,
    EngineSets,
    why_unusable,
)
from varedit_runtime.backends.engines.memory import budget, lay_out
from varedit_runtime.backends.engines.weights import EngineWeights
from varedit_runtime.backends.handle import EditHandle
from varedit_runtime.backends.wiring import profiles_of, sized
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.results import Progress
from varedit_runtime.errors import BackendError, BundleError, EditCancelled, readable_size
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import MANIFEST, UNGUIDED


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_engines_in(tmp_path, monkeypatch)


HERE = "sm89 NVIDIA L4"


def editor_on(gpu: SimulatedGpu, bundle: Bundle, engines: EngineSet) -> Editor:
    (variant,) = bundle.manifest.variants
    backend = EngineBackend(bundle, variant, engines, gpu)
    return Editor(bundle, variant, backend, read_instructions(bundle, variant.text_tokens))


@pytest.fixture(params=LAYOUTS)
def small(request: pytest.FixtureRequest) -> tuple[Editor, SimulatedGpu]:
    bundle, engines = compiled(small_bundle(), request.param)
    gpu = SimulatedGpu(bundle.graphs_folder)
    return editor_on(gpu, bundle, engines), gpu


def pixels(editor: Editor, image: Image.Image, prompt: str, **options: Any) -> np.ndarray:
    return np.asarray(editor.edit(image, prompt, **options).image)


def test_an_edit_is_the_same_as_onnxruntimes(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, gpu = small
    asked: list[dict[str, Any]] = [{}, {"negative_prompt": "rain"}, {"guidance_scale": 4}]
    with Editor.open(small_bundle(), threads=1) as other:
        for seed, options in enumerate(asked):
            ours, theirs = (
                pixels(one, picture(40, 30), "add a hat", seed=seed, **options)
                for one in (editor, other)
            )
            assert near(ours, theirs)
    assert gpu.launches == 3  # one for each edit


def test_by_stages_and_as_a_whole_are_the_same_edit(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, gpu = small
    whole = editor.edit(picture(40, 30), "add a hat", seed=1)
    assert list(whole.timings) == ["edit"]
    previews: list[np.ndarray] = []

    def on_scale(progress: Progress) -> None:
        previews.append(np.asarray(progress.preview()[0]))

    editor.forget()
    before = gpu.launches
    staged = editor.edit(picture(40, 30), "add a hat", seed=1, on_scale=on_scale)
    assert np.array_equal(np.asarray(whole.image), np.asarray(staged.image))
    assert np.array_equal(previews[-1], np.asarray(staged.image))
    assert not np.array_equal(previews[0], previews[-1])
    backend = editor.backend
    assert isinstance(backend, EngineBackend)
    steps = [step for step in backend.steps.values() if not step.unguided]
    assert gpu.launches - before == len(steps) - 1 + len(previews)  # no negative


@pytest.mark.parametrize("options", [{}, {"fast": True}, {"negative_prompt": "a dog"}])
def test_an_edit_that_a_handle_can_end_is_one_launch_for_each_step(
    small: tuple[Editor, SimulatedGpu], options: dict[str, Any]
) -> None:
    """The host copies nothing between them, and only looks at the handle."""
    editor, gpu = small
    whole = editor.edit(picture(40, 30), "add a hat", seed=1, **options)
    editor.forget()
    before = gpu.launches
    one = editor.edit(picture(40, 30), "add a hat", seed=1, handle=EditHandle(), **options)
    assert one.image == whole.image and set(one.timings) == {"edit"}
    steps = [step for step in editor.backend.steps.values() if not step.unguided]  # type: ignore[attr-defined]
    assert gpu.launches - before == len(steps) + 2 - ("negative_prompt" not in options)


@pytest.mark.parametrize("launches", [0, 1, 5])
def test_an_edit_with_a_handle_can_be_ended_between_steps(
    small: tuple[Editor, SimulatedGpu], monkeypatch: pytest.MonkeyPatch, launches: int
) -> None:
    editor, gpu = small
    expected = editor.edit(picture(40, 30), "add a hat", seed=1).image
    handle, before, wait = EditHandle(), gpu.launches, gpu.wait

    def cancelling() -> None:
        wait()
        if gpu.launches - before == launches:
            handle.cancel()

    if launches == 0:
        handle.cancel()
    monkeypatch.setattr(gpu, "wait", cancelling)
    with pytest.raises(EditCancelled):
        editor.edit(picture(30, 40), "hat", seed=1, handle=handle)
    assert gpu.launches - before == launches
    assert editor.edit(picture(40, 30), "add a hat", seed=1).image == expected


def test_a_mask_is_kept_to(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, _ = small
    source, mask = picture(40, 30), Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 24, 20))
    with Editor.open(small_bundle(), threads=1) as other:
        ours, theirs = (pixels(e, source, "red", seed=1, mask=mask) for e in (editor, other))
    assert near(ours, theirs)
    differs = (ours != np.asarray(source)).any(axis=2)
    assert differs.any() and not differs[np.asarray(mask) == 0].any()
    full = Image.new("L", source.size, 255)
    assert list(editor.edit(source, "red", seed=1, mask=full).timings) == ["edit"]


def test_an_edit_leaves_nothing_for_the_next(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, _ = small
    first = pixels(editor, picture(40, 30), "add a hat", seed=1)
    pixels(editor, picture(30, 40, blue=5), "make it night", seed=2, negative_prompt="sun")
    assert np.array_equal(first, pixels(editor, picture(40, 30), "add a hat", seed=1))


def test_bits_can_be_forced(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, _ = small
    with Editor.open(small_bundle(), threads=1) as other:
        outputs = [forced(one) for one in (editor, other)]
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=1e-4)
        assert np.array_equal(ours.bits, theirs.bits) and ours.bits.all()
        np.testing.assert_allclose(ours.running_sum, theirs.running_sum, rtol=0, atol=1e-5)


def forced(editor: Editor) -> list[ScaleOutput]:
    backend, variant = editor.backend, editor.variant
    channels = editor.bundle.manifest.model.token_channels
    random, sizes = np.random.default_rng(0), profiles_of("condition", variant, "sar")[0]
    backend.condition(
        {
            spec.name: np.ones(sized(spec, sizes), np.bool_)
            if spec.dtype == "bool"
            else random.normal(size=sized(spec, sizes)).astype(np.float32)
            for spec in variant.graphs["condition"].inputs
        }
    )
    shapes = [(variant.batch, *grid, channels) for grid in variant.grids]
    backend.prefill(random.normal(size=shapes[-1]).astype(np.float32))
    ones = [np.ones(shape, np.bool_) for shape in shapes]
    return [
        backend.predict(k, Sampling(np.full(one.shape, 0.5, np.float32), 2.0, 0.7, one, one))
        for k, one in enumerate(ones)
    ]


@pytest.mark.parametrize("path", [pair_bundle, plain_bundle, full_bundle, embedded])
@pytest.mark.parametrize("layout", ["external", "profiles"])
def test_batches_and_other_conditionings(path: Callable[[], Path], layout: EngineLayout) -> None:
    bundle, engines = compiled(path(), layout)
    editor = editor_on(SimulatedGpu(bundle.graphs_folder), bundle, engines)
    pictures = [picture(40, 30), picture(20, 60, blue=200), picture(30, 30)]
    prompts = ["add a hat", "make it night", "remove it"]
    with Editor.open(path(), threads=1) as other:
        ours, theirs = (one.edit(pictures, prompts, seed=5) for one in (editor, other))
    assert all(near(a.image, b.image) for a, b in zip(ours, theirs, strict=True))


def test_memory_is_as_the_budget_says(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, gpu = small
    backend = editor.backend
    assert isinstance(backend, EngineBackend)
    layout = "external" if len(gpu.allocated) == 2 else "baked"
    said = backend.budget
    taken = sum(map(len, gpu.allocated))
    inside = said.weights if layout == "baked" else 0  # in the engines, which simulated ones ignore
    assert said.total - inside == taken
    assert said.caches > 0 and said.between > 0 and said.scratch
    assert f"{readable_size(said.total)} of GPU memory" in str(said)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_too_little_memory_is_said_before_any_is_taken(layout: EngineLayout) -> None:
    bundle, engines = compiled(small_bundle(), layout)
    (variant,) = bundle.manifest.variants
    needed = budget(bundle, variant, layout, engines.manifest)
    for free in (needed.total - 1, 0):
        gpu = SimulatedGpu(bundle.graphs_folder, free=free)
        with pytest.raises(BackendError, match=r"engines need .* are free: end other programs"):
            EngineBackend(bundle, variant, engines, gpu)
        assert not gpu.allocated
    # Scratch that the set does not tell is known once engines are loaded, and counts as well.
    gpu = SimulatedGpu(bundle.graphs_folder, free=needed.total + 10_000, scratch=20_000)
    if layout == "external":
        with pytest.raises(BackendError, match="scratch"):
            EngineBackend(bundle, variant, engines, gpu)
        assert not gpu.allocated


def test_the_budget_is_exact_before_engines_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, engines = compiled(small_bundle(), scratch=20_000)
    (variant,) = bundle.manifest.variants
    needed = budget(bundle, variant, engines=engines.manifest)
    gpu = SimulatedGpu(bundle.graphs_folder, free=needed.total, scratch=20_000)
    with editor_on(gpu, bundle, engines):
        assert gpu.free == 0
    monkeypatch.setattr(SimulatedGpu, "load", None)
    gpu = SimulatedGpu(bundle.graphs_folder, free=needed.total - 1, scratch=20_000)
    with pytest.raises(BackendError, match=r"20\.2 kB scratch\), and what the driver takes"):
        EngineBackend(bundle, variant, engines, gpu)
    told = CliRunner().invoke(main, ["inspect", str(bundle.path)]).output
    assert f"on a GPU, tensorrt-rtx for sm89, weights external: {needed}" in told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_budget_counts_what_is_inside_the_engines(layout: EngineLayout) -> None:
    bundle, engines = compiled(small_bundle(), layout, resident=10**6)
    (variant,) = bundle.manifest.variants
    inputs = EngineWeights(engines.manifest.weights).size
    said = budget(bundle, variant, layout, engines.manifest)
    assert said.weights == inputs + 10**6 * len(engines.manifest.plans)
    assert (inputs > 0) == (layout == "external")


def test_weights_are_read_while_those_before_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []  # copies, whenever one more is submitted

    class Watched(SimulatedGpu):
        def copy(self, target: int, source: int, size: int) -> None:
            waiting.append(len(self.queue))
            super().copy(target, source, size)

    monkeypatch.setattr(weights, "CHUNK", 5000)
    bundle, engines = compiled(small_bundle())
    gpu, filled = Watched(bundle.graphs_folder), EngineWeights(engines.manifest.weights)
    filled.allocate(gpu)
    filled.fill(bundle, gpu)
    assert waiting[0] == 0 and set(waiting[1:]) == {1} and not gpu.queue
    for stage, stored in engines.manifest.weights.items():
        addresses = filled.addresses(stage)
        for weight in stored:
            data = (bundle.path / weight.file).read_bytes()[weight.offset :][: weight.length]
            assert gpu.memory(addresses[weight.name], weight.length).tobytes() == data


def test_a_plan_of_another_graph_is_refused_before_it_is_run() -> None:
    bundle, engines = compiled(small_bundle())
    (variant,) = bundle.manifest.variants

    class Swapped(EngineSet):
        def plan_bytes(self, stage: str) -> bytearray:
            return super().plan_bytes("scale_01" if stage == "scale_02" else stage)

    gpu = SimulatedGpu(bundle.graphs_folder)
    swapped = Swapped(engines.path, engines.manifest, engines.digest)
    with pytest.raises(
        BundleError, match=r"engine for scale_02 whose bits, .* are not its graph's"
    ):
        EngineBackend(bundle, variant, swapped, gpu)
    assert not gpu.allocated


def test_closing_frees_the_gpu() -> None:
    bundle, engines = compiled(small_bundle())
    gpu = SimulatedGpu(bundle.graphs_folder)
    with editor_on(gpu, bundle, engines):
        assert not gpu.closed
    assert gpu.closed


def test_engines_are_found_for_their_gpu_and_tools() -> None:
    bundle, engines = compiled(small_bundle())
    compiled(small_bundle(), "baked")
    (variant,) = bundle.manifest.variants
    sets = EngineSets(bundle)
    found = sets.find(variant.name, "tensorrt-rtx", {"tensorrt-rtx": "1.7"}, HERE)
    assert found.path == engines.path  # the one with the smallest plans
    for tools, gpu, said in (
        ({"tensorrt-rtx": "1.8"}, HERE, "of tensorrt-rtx 1.7, and 1.8 is installed"),
        ({"tensorrt-rtx": "1.7"}, "sm120 X", "for sm89, and this machine has sm120 X"),
    ):
        with pytest.raises(BundleError, match=said) as caught:
            sets.find(variant.name, "tensorrt-rtx", tools, gpu)
        assert f"--backend tensorrt-rtx --architecture {gpu.split()[0]} " in str(caught.value)
    with pytest.raises(BundleError, match=r"\(there are none\): run `varedit-export engines"):
        sets.find(variant.name, "tensorrt", {"tensorrt": "11.0"}, HERE)


def spoilt(path: Path, how: str) -> str:
    """Make a set useless; return the expected message."""
    manifest = msgspec.json.decode((path / MANIFEST).read_bytes())
    if how == "truncated":
        plan = path / manifest["plans"]["scale_00"]["file"]
        plan.write_bytes(plan.read_bytes()[:-1])
        return "is damaged"
    recipe = manifest["recipe"]
    if how == "no version":
        recipe["tools"], recipe["flags"] = {"tensorrt-rtx": "x"}, {"version_compatible": "True"}
    if how == "no GPU":
        recipe["gpu"], recipe["flags"] = " ", {"hardware_compatible": "same-compute-capability"}
    if how == "unknown stage":
        recipe["graphs"]["foo"] = recipe["graphs"]["prefill"]
        manifest["plans"]["foo"] = manifest["plans"]["prefill"]
    if how == "not ours":
        recipe["flags"] = {"x": "None"}
    rewrite_manifest(path, msgspec.json.encode(manifest))
    said = {
        "no version": "of tensorrt-rtx x, and 1.7",
        "no GPU": r"\(there are none\)",  # for whose it is cannot be read
        "unknown stage": "no graph 'foo'",
        "not ours": "built elsewhere",
    }
    return said[how]


@pytest.mark.parametrize("how", ["truncated", "no version", "no GPU", "unknown stage", "not ours"])
def test_a_useless_set_hides_no_other_and_is_told(how: str) -> None:
    bundle, useless = compiled(small_bundle())
    (variant,) = bundle.manifest.variants
    said = spoilt(useless.path, how)
    asked = variant.name, "tensorrt-rtx", {"tensorrt-rtx": "1.7"}, HERE
    with pytest.raises(BundleError, match=said):
        EngineSets(bundle).find(*asked)
    _, other = compiled(small_bundle(), "baked")
    assert EngineSets(bundle).find(*asked).path == other.path


def test_engines_with_fewer_settings_are_preferred() -> None:
    bundle, plain = compiled(small_bundle(), settings={"other": "None", "aux_streams": "0"})
    (variant,) = bundle.manifest.variants
    for name in ("tf32", "version_compatible", "workspace", "aux_streams"):
        compiled(small_bundle(), settings={"other": "None", "aux_streams": "0", name: "4"})
    found = EngineSets(bundle).find(variant.name, "tensorrt-rtx", {"tensorrt-rtx": "1.7"}, HERE)
    assert found.path == plain.path


@pytest.mark.parametrize(
    ("flags", "tools", "gpu", "serves"),
    [
        ({}, "11.1", "sm90 NVIDIA H100", True),
        ({}, "11.1", "sm90 NVIDIA H200", False),
        ({}, "11.2", "sm90 NVIDIA H100", False),
        ({}, "11.1", "sm89 NVIDIA L4", False),
        ({"version_compatible": "True"}, "11.2", "sm90 NVIDIA H100", True),
        ({"version_compatible": "True"}, "11.0", "sm90 NVIDIA H100", False),
        ({"version_compatible": "True"}, "12.0", "sm90 NVIDIA H100", False),
        ({"version_compatible": "True"}, "", "sm90 NVIDIA H100", False),
        ({"hardware_compatible": "ampere-plus"}, "11.1", "sm120 NVIDIA RTX 5090", True),
        ({"hardware_compatible": "ampere-plus"}, "11.1", "sm75 NVIDIA T4", False),
        ({"hardware_compatible": "same-compute-capability"}, "11.1", "sm90 NVIDIA H200", True),
        ({"hardware_compatible": "same-compute-capability"}, "11.1", "sm89 NVIDIA L4", False),
    ],
)
def test_compatible_engines_serve_others(
    flags: dict[str, str], tools: str, gpu: str, serves: bool
) -> None:
    bundle = Bundle.open(small_bundle())
    job = CompileJob(bundle, "external", Uncompiled("tensorrt", "sm90 NVIDIA H100"))  # type: ignore[arg-type]
    recipe = msgspec.structs.replace(job.recipe, tools={"tensorrt": "11.1"}, flags=flags)
    assert (why_unusable(recipe, {"tensorrt": tools}, [gpu]) is None) == serves


def test_an_arena_holds_its_parts_side_by_side() -> None:
    arena = lay_out({"a": 1, "b": 256, "c": 257, "d": 0, "e": 5})
    assert dict(arena.offsets) == {"a": 0, "b": 256, "c": 512, "d": 1024, "e": 1024}
    assert arena.size == 1280


def test_engines_are_verified(small: tuple[Editor, SimulatedGpu]) -> None:
    editor, _ = small
    lines = list(compare_backend(editor.bundle, editor.variant, editor.backend))
    assert gate(iter(lines)) == lines
    stages = {line.stage for line in lines}
    forms = ("", UNGUIDED) if editor.backend.drops_rows else ("",)
    scales = {f"scale_{k:02}{form}" for k in range(len(editor.variant.grids)) for form in forms}
    assert stages == {"text_encoder", "image_encoder", "image_decoder", "edit"} | scales
    for other in ("ONNX Runtime", "the reference"):
        compared = sum(f"logits against {other}" in line.measure for line in lines)
        assert compared == len(scales)


def test_an_edit_in_one_piece_that_is_another_fails(
    small: tuple[Editor, SimulatedGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, _ = small
    whole = editor.backend.whole
    assert whole

    def other(
        prompts: Prompts, pictures: np.ndarray, samplings: Sequence[Sampling], prefilled: bool
    ) -> WholeEdit:
        edited = whole(prompts, pictures, samplings, prefilled)
        return WholeEdit(edited.logits, edited.pictures + np.float32(1e-6))

    monkeypatch.setattr(EngineBackend, "whole", property(lambda backend: other))
    lines = list(compare_backend(editor.bundle, editor.variant, editor.backend))
    assert [line.value for line in lines if line.stage == "edit"] == [1.0]
    with pytest.raises(ParityError, match="in one piece"):
        gate(iter(lines))


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_engines_that_compute_otherwise_fail(factor: float) -> None:
    bundle, engines = compiled(small_bundle())
    gpu = SimulatedGpu(bundle.graphs_folder)
    editor = editor_on(gpu, bundle, engines)
    weights = gpu.allocated[-1].view(np.float32)
    weights[len(weights) // 2 :] *= factor
    with pytest.raises(ParityError):
        gate(compare_backend(bundle, editor.variant, editor.backend))

"""Precisions of 8-bit integers: their products, a bundle of them, and what cannot run one."""

from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
import pytest
import torch
from bundles import built, bundle_config, random_weights, request
from click.testing import CliRunner
from editing import picture
from product_graph import integer_product_graph
from safetensors import safe_open
from torch import Tensor
from uncompiled import Uncompiled

from varedit_engines.compile_set import CompileJob
from varedit_engines.engine_compiler import EngineCompiler
from varedit_export import components
from varedit_export.assemble import assemble
from varedit_export.cli import main
from varedit_export.commands import build
from varedit_export.graphs.layout import pack
from varedit_export.graphs.model import GraphLinear
from varedit_export.parity.measures import gate
from varedit_export.parity.streamed import compare_streamed
from varedit_export.plan import BundlePlan
from varedit_reference.weights_file import read_header
from varedit_runtime.backends import choose, detect
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.backends.onnxruntime import integers
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, ConfigError
from varedit_runtime.manifest import GRAPHS, scale_name, weights_file
from varedit_runtime.precision import (
    FLOAT32,
    SEVEN_BITS,
    WHOLE_BYTE,
    Format,
    Int8Columns,
    Storage,
    named,
)

INTEGERS = ("int8", "int7")
CHANNELS_IN, CHANNELS = 96, 48
NO_VNNI = "this processor has no VNNI"
whole_bytes = pytest.mark.skipif(not integers.exact(), reason="cuts off sums of 8-bit products")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Parity with the reference is proven as it is built."""
    name = "int8" if integers.exact() else "int7"
    return Bundle.open(
        built(name, lambda target: BundlePlan([request(target, name)], random_weights()))
    )


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


# A product


class Graph:
    """A linear layer of integers, and ONNX Runtime's run of its graph, weights included."""

    def __init__(self, largest: int) -> None:
        self.storage = Int8Columns(largest)
        generator = torch.Generator().manual_seed(largest)
        self.weight = torch.randn(CHANNELS_IN, CHANNELS, generator=generator)
        self.weight[:, 3] = 0  # a column that nothing has to divide by
        layer = GraphLinear(CHANNELS_IN, CHANNELS, Format(FLOAT32, self.storage))
        self.parts = pack(self.storage, self.weight)
        state = {f"weight.{name}": part for name, part in self.parts.items()}
        layer.eval().load_state_dict(state | {"bias": torch.arange(CHANNELS) / 10})
        self.bias = layer.bias
        rows = {0: torch.export.Dim("rows")}
        program = torch.onnx.export(
            layer, (torch.ones(3, CHANNELS_IN),), dynamo=True, verbose=False, dynamic_shapes=(rows,)
        )
        assert program is not None
        self.session = ort.InferenceSession(program.model_proto.SerializeToString())

    def __call__(self, x: Tensor) -> Tensor:
        (name,) = (given.name for given in self.session.get_inputs())
        (made,) = self.session.run(None, {name: x.numpy()})
        return torch.from_numpy(np.asarray(made))

    def expected(self, x: Tensor) -> Tensor:
        return self.storage.round_input(x) @ self.storage.unpack(self.parts) + self.bias


@pytest.fixture(scope="module", params=[pytest.param(WHOLE_BYTE, marks=whole_bytes), SEVEN_BITS])
def product(request: pytest.FixtureRequest) -> Graph:
    return Graph(request.param)


def rows(count: int) -> Tensor:
    """Draw rows of very different sizes; some are of zeros."""
    generator = torch.Generator().manual_seed(count)
    sizes = 10.0 ** torch.randint(-20, 6, (count, 1), generator=generator)
    return torch.randn(count, CHANNELS_IN, generator=generator) * sizes * (sizes > 1e-18)


def test_a_graph_computes_what_the_storage_rounds(product: Graph) -> None:
    x = rows(60)
    made, expected = product(x), product.expected(x)
    scale = x.abs().amax(-1, keepdim=True) + 1
    assert ((made - expected).abs() / scale).max() < 1e-4
    assert (made[(x == 0).all(-1)] == product.bias).all()


def test_rounding_loses_little(product: Graph) -> None:
    """Half a step of 127 in a row, half a step of a column: far from what 4 bits would lose."""
    x = rows(60)
    exact = x @ product.weight
    error = (product(x) - product.bias - exact).square().mean(-1).sqrt()
    share = error / exact.square().mean(-1).sqrt().clamp_min(1e-30)
    assert 1e-4 < share[x.abs().amax(-1) > 1].max() < 0.025  # the bias hides smaller rows


def test_a_row_does_not_depend_on_the_others(product: Graph) -> None:
    """Otherwise a stranger's picture in a batch would change another's bits."""
    x = rows(9)
    together = product(x)
    for i in range(len(x)):
        assert torch.equal(product(x[i : i + 1])[0], together[i])


def test_the_largest_products_are_not_cut_off(product: Graph) -> None:
    """All factors at their largest: the sums that processors without VNNI would cut off."""
    x = torch.ones(8, CHANNELS_IN)
    largest = product.parts["values"].abs().amax()
    assert largest == product.storage.largest
    assert torch.allclose(product(x), product.expected(x), rtol=1e-5, atol=1e-4)


# A bundle


def test_its_products_are_stored_in_bytes(bundle: Bundle) -> None:
    largest = dict(bundle.manifest.policy.stored)["transformer.blocks.*"]
    stored = {"transformer": "blocks.1.cross_kv.weight", "text_encoder": "blocks.1.qkv"}
    for component, product in stored.items():
        with safe_open(bundle.path / weights_file(component), "pt") as file:
            values, names = file.get_tensor(f"{product}.values"), set(file.keys())
        assert product not in names
        assert values.dtype == torch.int8
        assert values.abs().amax() == cast("Int8Columns", largest).largest


def test_every_weight_is_made_once_and_every_tensor_is_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(components, "pack", lambda storage, weight: _counted(made, storage, weight))
    (tmp_path / GRAPHS / "weights").mkdir(parents=True)
    for component in BundlePlan([request(tmp_path, "int7")], random_weights()).shared:
        names, before = component.module.state_dict().keys(), len(made)
        component.write(tmp_path)
        assert len(made) - before == sum(name.endswith(".values") for name in names)
        for tensor in read_header(tmp_path, component.file).values():
            assert tensor.place.offset % tensor.dtype.itemsize == 0
    assert made


def _counted(made: list[tuple[int, ...]], storage: Storage, weight: Tensor) -> dict[str, Tensor]:
    made.append(tuple(weight.shape))
    return pack(storage, weight)


def test_it_is_verified_from_its_own_weights(bundle: Bundle) -> None:
    output = run("verify", bundle.path)
    assert f"rounded to {bundle.manifest.precision}" in output and "EXCEEDED" not in output


def test_graphs_compute_the_rounded_reference(bundle: Bundle) -> None:
    """Both are as far from the reference in fp32, as they round alike."""
    lines = {(line.stage, line.measure): line.value for line in bundle.manifest.parity}
    rounding = f", reference with products rounded to {bundle.manifest.precision}"
    logits = "logits, largest error"
    for stage in map(scale_name, range(len(bundle.manifest.variants[0].grids))):
        assert lines[stage, logits] == pytest.approx(lines[stage, logits + rounding], rel=0.2)
        assert lines[stage, logits] > 1e-3  # it is not fp32 that was compared


def test_it_is_compared_block_by_block(bundle: Bundle) -> None:
    lines = gate(compare_streamed(bundle, bundle_config(), random_weights()))
    blocks = [line for line in lines if "rms error over what they add" in line.measure]
    assert {"condition", "prefill", "scale_01", "text_encoder"} <= {line.stage for line in blocks}
    (share,) = [line for line in lines if "reference with products rounded" in line.measure]
    assert share.value <= 0.02  # of a random model, whose bits are decided far from one half


def test_it_edits(bundle: Bundle) -> None:
    with Editor.open(bundle.path) as editor:
        edited = np.asarray(editor.edit(picture(60, 50), "a red hat", seed=3).image)
    assert edited.shape == (50, 60, 3) and edited.std() > 0


def test_inspect_says_what_it_is_and_nothing_of_gpus(bundle: Bundle) -> None:
    inspected = run("inspect", bundle.path)
    assert f"{bundle.manifest.precision}; in fp32: transformer: residual stream" in inspected
    assert "on a GPU" not in inspected


# Where it cannot run


def test_the_probe_is_an_integer_product() -> None:
    assert integers.PRODUCT.read_bytes() == integer_product_graph()


def test_a_processor_that_cuts_off_sums_is_told_of(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integers, "exact", lambda: False)
    plan = BundlePlan([request(tmp_path / "new", "int8")], random_weights())
    with pytest.raises(BackendError, match=f"{NO_VNNI}.*--precision int7"):
        assemble(plan, lambda *_: None)
    assert not (tmp_path / "new").exists()
    integers.check_exact(named("int7"))
    integers.check_exact(named("fp32"))
    if bundle.manifest.precision == "int8":
        with pytest.raises(BackendError, match=NO_VNNI):
            Editor.open(bundle.path)
        result = CliRunner().invoke(main, ["verify", str(bundle.path)])
        assert result.exit_code == 1 and NO_VNNI in result.output


@pytest.mark.parametrize("name", INTEGERS)
def test_gpus_are_refused_with_what_helps(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} is for ONNX Runtime on CPUs alone: build"):
        onnx_backend._check_precision(named(name), "cuda")
    result = CliRunner().invoke(
        main, ["build", "--size", "nano", "--precision", name, "--backend", "tensorrt-rtx"]
    )
    assert result.exit_code == 1 and f"no engine can be compiled of it: {name}" in result.output
    result = CliRunner().invoke(
        main, ["build", "--size", "nano", "--precision", name, "--fused-attention"]
    )
    assert result.exit_code == 1 and f"runs no {name} on a GPU" in result.output


def test_a_bundle_has_no_engines(bundle: Bundle) -> None:
    variant = bundle.manifest.variants[0]
    with pytest.raises(BackendError, match=r"can have no engines: .*--backend onnxruntime"):
        choose("tensorrt").open(bundle, variant)
    with pytest.raises(ConfigError, match="--precision fp16"):
        CompileJob(bundle, "external", cast("EngineCompiler", Uncompiled()))


def test_a_machine_with_a_gpu_builds_integers_for_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "detect_machine", lambda: pytest.fail("it asked for a GPU"))
    chosen = build._chosen_backend("auto", (), "int8")
    assert (chosen.label, chosen.why) == ("onnxruntime cpu", "int8 is for CPUs alone")

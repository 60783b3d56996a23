"""The twin whose attention is one operator: its form, its numbers, and who runs it."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundles import half_bundle, random_weights, request, small_bundle
from editing import picture
from fake_bundles import rewrite_manifest
from msgspec import structs
from onnx import NodeProto, helper
from stand_in_cuda import pretend

from varedit_engines.compile_set import stages_of
from varedit_export.assemble import graph_spec
from varedit_export.graphs.trace import Tracer
from varedit_export.manifest_model import sources_of
from varedit_export.parity.compare import begin_edit
from varedit_export.parity.edit import random_edit, scale_sampling
from varedit_export.plan import BundlePlan
from varedit_runtime.backends.engines.engine_set import LAYOUTS
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
from varedit_runtime.backends.onnxruntime.options import OnnxRuntimeOptions
from varedit_runtime.backends.wiring import FUSED, SYMBOLIC
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import ConfigError
from varedit_runtime.manifest import FileEntry, canonical_json


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Add the graph to a copy of the small bundle, whose other graphs do not depend on it."""
    folder = tmp_path_factory.mktemp("fused") / "bundle"
    shutil.copytree(small_bundle(), folder)
    plan = BundlePlan([replace(request(folder), fused_attention=True)], random_weights())
    stored = {name: w for part in plan.components for name, w in part.stored(folder).items()}
    (graph,) = (graph for graph in plan.variants[0].graphs if graph.name == FUSED)
    file = plan.variants[0].file(graph)
    ir.save(Tracer(plan.fake, stored).graph(graph.stage, graph.depth), folder / file)
    manifest = Bundle.open(folder).manifest
    content = (folder / file).read_bytes()
    entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    (variant,) = manifest.variants
    variant = structs.replace(variant, graphs=variant.graphs | {FUSED: graph_spec(folder, file)})
    changed = structs.replace(manifest, variants=(variant,), files=manifest.files | {file: entry})
    rewrite_manifest(folder, canonical_json(changed))
    return Bundle.open(folder)


def backend(bundle: Bundle, twin: str) -> OnnxBackend:
    (variant,) = bundle.manifest.variants
    return OnnxBackend(bundle, variant, OnnxRuntimeOptions(threads=1), twin)


def stages_run(editor: Editor) -> set[str]:
    assert isinstance(editor.backend, OnnxBackend)
    return {step.stage for step in editor.backend.steps.values()}


def test_the_operator_is_used_as_cuda_fuses_it(fused: Bundle) -> None:
    """A change of this form costs the fused kernels: see `graphs/attention.py`."""
    (variant,) = fused.manifest.variants
    path = fused.path / variant.graphs[FUSED].file
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    values = (*model.graph.input, *model.graph.value_info)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values}
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Attention"] == 2 * fused.manifest.model.depth
    assert operators["Softmax"] == 1  # the bits' own
    for over_tokens, over_text in _pairs(model.graph.node):
        for node, heads in ((over_tokens, variant.rows), (over_text, 1)):
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            heads *= fused.manifest.model.heads
            assert given.keys() == {"q_num_heads", "kv_num_heads", "scale"}
            assert given["q_num_heads"] == given["kv_num_heads"] == heads
            assert len(node.output) == 1
            assert [ranks[name] for name in node.input[:3]] == [3, 3, 3]
        assert len(over_tokens.input) == 3  # Flash Attention takes no mask
        assert len(over_text.input) == 4 and ranks[over_text.input[3]] == 4


def _pairs(nodes: Iterable[NodeProto]) -> list[tuple[NodeProto, NodeProto]]:
    found = [node for node in nodes if node.op_type == "Attention"]
    return list(zip(found[::2], found[1::2], strict=True))


def test_both_twins_compute_the_same(fused: Bundle) -> None:
    (variant,) = fused.manifest.variants
    edit = random_edit(variant, sources_of(fused)[0])
    written, one = (backend(fused, twin) for twin in (SYMBOLIC, FUSED))
    for each in (written, one):
        begin_edit(each, edit)
    for k in range(len(variant.grids)):
        sampling = scale_sampling(variant, edit, k)
        expected, found = written.predict(k, sampling), one.predict(k, sampling)
        assert expected.logits.std() > 0.1
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-4)
        assert np.array_equal(found.bits, expected.bits)


def test_cuda_takes_it_and_the_cpu_does_not(fused: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = picture(90, 70), "make it blue"
    with Editor.open(fused.path, threads=1) as editor:
        assert FUSED not in stages_run(editor)
        expected = editor.edit(source, text, seed=1).image
    made = pretend(monkeypatch)
    with Editor.open(fused.path, provider="cuda", threads=1) as editor:
        assert FUSED in stages_run(editor) and SYMBOLIC not in stages_run(editor)
        assert editor.edit(source, text, seed=1).image == expected
    assert sum(session.options["enable_cuda_graph"] == "1" for session in made) == 1


def test_engines_are_not_compiled_of_it(fused: Bundle) -> None:
    (variant,) = fused.manifest.variants
    assert not any(FUSED in stages_of(variant, layout) for layout in LAYOUTS)


def test_it_is_compared_in_16_bits_too() -> None:
    lines = [
        line for line in Bundle.open(half_bundle("fp16")).manifest.parity if line.stage == FUSED
    ]
    assert any(line.measure.startswith("share of bits that differ") for line in lines)


def test_types_that_onnx_runtime_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="runs no bf16 on a GPU: build with --precision fp16"):
        replace(request(Path("unused"), "bf16"), fused_attention=True)

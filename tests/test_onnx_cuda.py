"""ONNX Runtime's CUDA provider: what it is told, what it must not do, and what it replays."""

import onnxruntime as ort
import pytest
from PIL import Image
from stand_in_cuda import CUDA, Node, StandInSession, pretend

from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.backends.onnxruntime import cuda
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend, Session
from varedit_runtime.backends.onnxruntime.options import PROVIDERS, OnnxRuntimeOptions
from varedit_runtime.backends.onnxruntime.spec import failed_providers
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError
from varedit_runtime.locate import embedded

AZURE = "AzureExecutionProvider"
TEXTS = ("add a red hat", "make it snow")


def edited(editor: Editor, text: str) -> bytes:
    result = editor.edit(Image.new("RGB", (128, 128), "teal"), text, seed=3)
    return result.image.tobytes()


def open_nano(provider: str) -> OnnxBackend:
    bundle = Bundle.open(embedded())
    return OnnxBackend(bundle, bundle.manifest.variants[0], OnnxRuntimeOptions(provider, 1))


def load_references(provider: str = "cuda") -> Session:
    bundle = Bundle.open(embedded())
    graph = bundle.graph_bytes(bundle.manifest.variants[0].name, "references")
    return Session("references", graph, bundle.graphs_folder, provider, 1)


def test_fp32_is_fp32_and_memory_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(monkeypatch)
    open_nano("cuda")
    assert len(made) == 6
    for session in made:
        assert session.options["use_tf32"] == "0"
        assert session.options["arena_extend_strategy"] == "kSameAsRequested"
        assert session.options["cudnn_conv_algo_search"] == "HEURISTIC"


def test_edits_on_cuda_replay_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for the prefill and for each scale; every edit reads its own inputs."""
    with Editor.open(embedded(), threads=1) as editor:
        pictures = [edited(editor, text) for text in TEXTS]
    made = pretend(monkeypatch)
    with Editor.open(embedded(), provider="cuda", threads=1) as editor:
        assert editor.provider == "cuda"
        for _ in range(2):
            for text, picture in zip(TEXTS, pictures, strict=True):
                assert edited(editor, text) == picture
        scales = len(editor.variant.grids)
    (captured,) = (session for session in made if session.options["enable_cuda_graph"] == "1")
    assert captured.runs == [str(n + 1) for n in range(scales + 1)] * 4
    others = {run for session in made if session is not captured for run in session.runs}
    assert others == {"gpu:0"}  # theirs are freed after every run


def test_arithmetic_on_the_cpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    nodes = [Node(f"blocks.{i}/Attention", "Attention") for i in range(4)]
    monkeypatch.setattr(StandInSession, "on_cpu", [*nodes, Node("Concat_2", "Concat")])
    said = r"leave 4 nodes of graph text_encoder to the CPU \(blocks\.0/Attention \(Attention\), "
    with pytest.raises(BackendError, match=said):
        open_nano("cuda")


def test_shapes_may_be_computed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(StandInSession, "on_cpu", [Node("Concat_2", "Concat"), Node("m", "Mul")])
    load_references()


@pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason="not in this onnxruntime")
def test_what_a_real_provider_leaves_to_the_cpu_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider for Azure computes nothing itself."""
    monkeypatch.setitem(PROVIDERS, "cuda", AZURE)
    monkeypatch.setattr(cuda, "provider_options", lambda captured: {})
    with pytest.raises(BackendError, match=rf"{AZURE} would leave 28 nodes of graph references"):
        load_references()


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="CUDA would start")
def test_libraries_are_preloaded_and_those_missing_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcublas.so.13:\nno"))
    with pytest.raises(BackendError, match=r"\(Failed to load libcublas.so.13: no\).*\[gpu\]"):
        load_references()
    assert capfd.readouterr().out == ""


def test_an_onnxruntime_that_overwrites_captured_pointers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    with pytest.raises(BackendError, match=r"1\.29\.0, and captured graphs need 1\.30.*--upgrade"):
        open_nano("cuda")
    assert "1.29.0" in failed_providers([CUDA])["cuda"]


def test_doctor_runs_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions are made without cuDNN, which the first convolution looks for."""

    def run(*_: object, **__: object) -> None:
        raise BackendError("no libcudnn.so.9")

    monkeypatch.setattr(onnx_backend.Session, "run", run)
    assert failed_providers(["CPUExecutionProvider"]) == {"cpu": "no libcudnn.so.9"}

"""Weights that are exchanged in a live editor: all or nothing, on every backend."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from bundles import small_bundle
from fake_bundles import rewrite_manifest
from msgspec import structs
from PIL import Image
from republishing import publish_weights, republish
from simulated_gpu import SimulatedGpu
from stand_in_cuda import pretend
from uncompiled import compiled, keep_engines_in

from varedit_runtime import bundle as bundle_module
from varedit_runtime.backends.engines import weights as engine_weights
from varedit_runtime.backends.engines.backend import EngineBackend
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.results import Progress
from varedit_runtime.errors import BackendError, BundleError, EditorError
from varedit_runtime.files import HeldFile
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    canonical_json,
    decode_manifest,
    weights_file,
)

pytestmark = pytest.mark.usefixtures("no_flushing")
PHOTO = Image.new("RGB", (32, 32), "teal")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_engines_in(tmp_path, monkeypatch)
    monkeypatch.setattr(engine_weights, "CHUNK", 10**5)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Publish a bundle that differs from the small one in the values of its weights alone."""
    return publish_weights(small_bundle(), tmp_path_factory.mktemp("other") / "bundle")


def on_engines(path: Path, layout: EngineLayout = "external") -> Editor:
    bundle, engines = compiled(path, layout)
    (variant,) = bundle.manifest.variants
    backend = EngineBackend(bundle, variant, engines, SimulatedGpu(bundle.graphs_folder))
    return Editor(bundle, variant, backend, read_instructions(bundle, variant.text_tokens))


def gpu_of(editor: Editor) -> SimulatedGpu:
    gpu = editor.backend._device  # type: ignore[attr-defined]
    assert isinstance(gpu, SimulatedGpu)
    return gpu


OPENED: dict[str, Callable[[Path], Editor]] = {
    "onnxruntime": lambda path: Editor.open(path, backend="onnxruntime", threads=1),
    "cuda": lambda path: Editor.open(path, backend="onnxruntime", provider="cuda", threads=1),
    "engines": on_engines,
}


@pytest.fixture(params=OPENED)
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Editor]:
    if request.param == "cuda":
        pretend(monkeypatch)
    return OPENED[request.param]


def drawn(editor: Editor, **options: Any) -> bytes:
    return editor.edit(PHOTO, "add a hat", seed=1, **options).image.tobytes()


def test_after_a_swap_edits_are_those_of_an_editor_of_the_new_bundle(
    opened: Callable[[Path], Editor], other: Path
) -> None:
    expected = []
    for path in (small_bundle(), other):
        with opened(path) as fresh:
            expected.append((drawn(fresh), drawn(fresh, on_scale=lambda progress: None)))
    assert expected[0] != expected[1]
    with opened(small_bundle()) as editor:
        for path, pictures in ((small_bundle(), 0), (other, 1), (small_bundle(), 0)):
            if path != editor.bundle.path:
                editor.swap_weights(path)
            assert editor.bundle.digest == Bundle.open(path).digest
            assert (drawn(editor), drawn(editor, on_scale=lambda progress: None)) == expected[
                pictures
            ]


def test_swapping_takes_no_more_memory_each_time(other: Path) -> None:
    with on_engines(small_bundle()) as editor:
        gpu = gpu_of(editor)
        before = [[len(block) for block in blocks] for blocks in (gpu.allocated, gpu.host)]
        for path in (other, small_bundle(), other):
            editor.swap_weights(path)
        assert [[len(block) for block in blocks] for blocks in (gpu.allocated, gpu.host)] == before


# Swaps that fail


def damaged(other: Path, folder: Path) -> Path:
    path = Path(shutil.copytree(other, folder / "damaged"))
    file = path / weights_file("transformer")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return path


def short(other: Path, folder: Path) -> Path:
    path = Path(shutil.copytree(other, folder / "short"))
    file = path / weights_file("tokenizer")
    file.write_bytes(file.read_bytes()[:-1])
    return path


def with_manifest(other: Path, path: Path, change: Callable[[Manifest], Manifest]) -> Path:
    shutil.copytree(other, path)
    data = canonical_json(change(decode_manifest((path / MANIFEST).read_bytes(), Manifest)))
    rewrite_manifest(path, data)
    return path


def of_another_tokenizer(other: Path, folder: Path) -> Path:
    def changed(manifest: Manifest) -> Manifest:
        entry = structs.replace(manifest.files[TOKENIZER], sha256="0" * 64)
        return structs.replace(
            manifest, guidance_scale=1.5, files=manifest.files | {TOKENIZER: entry}
        )

    return with_manifest(other, folder / "tokenizer", changed)


FAILING: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "damaged": (damaged, r"transformer\.safetensors is damaged"),
    "short": (short, r"tokenizer\.safetensors is damaged: it has \d+ bytes instead of"),
    "no bundle": (lambda other, folder: folder, "is not a bundle"),
    "other model": (lambda other, folder: embedded(), "has no variant '96-b1'"),
    "other tokenizer": (
        of_another_tokenizer,
        r"in more than its weights \(guidance_scale is 1.5, not 3.0; tokenizer.json is '0{16}', "
        r"not '[0-9a-f]{16}'\): build it with the same options and --graphs-from",
    ),
}


@pytest.mark.parametrize("how", FAILING)
def test_what_is_no_bundle_of_the_same_graphs_leaves_the_weights(
    other: Path, tmp_path: Path, how: str
) -> None:
    make, said = FAILING[how]
    path = make(other, tmp_path)
    with OPENED["onnxruntime"](small_bundle()) as editor:
        before = drawn(editor)
        with pytest.raises(BundleError, match=said):
            editor.swap_weights(path)
        assert editor.bundle.path == small_bundle().resolve() and drawn(editor) == before


def test_all_that_differs_is_listed(other: Path, tmp_path: Path) -> None:
    def changed(manifest: Manifest) -> Manifest:
        (variant,) = manifest.variants
        files = dict(manifest.files)
        graph = variant.graphs["scale_01"].file
        files[graph] = structs.replace(files[graph], sha256="0" * 64)
        longer = structs.replace(variant, text_tokens=50)
        model = structs.replace(manifest.model, rotary="paper", weights="of others", size="nine")
        return structs.replace(manifest, variants=(longer,), model=model, files=files)

    path = with_manifest(other, tmp_path / "changed", changed)
    with OPENED["onnxruntime"](small_bundle()) as editor, pytest.raises(BundleError) as refused:
        editor.swap_weights(path)
    listed = (
        r"\(rotary is 'paper', not 'released'; text_tokens is 50, not 24; graph scale_01 is "
        r"'0{16}', not '[0-9a-f]{16}'\)"
    )
    assert re.search(listed, str(refused.value))


def test_a_pinned_digest_admits_no_other_bundle(other: Path) -> None:
    with OPENED["onnxruntime"](small_bundle()) as editor:
        with pytest.raises(BundleError, match="not the one asked for"):
            editor.swap_weights(other, digest=editor.bundle.digest)
        editor.swap_weights(other, digest=Bundle.open(other).digest)


def test_a_damaged_file_leaves_the_weights(
    opened: Callable[[Path], Editor], other: Path, tmp_path: Path
) -> None:
    with opened(small_bundle()) as editor:
        before = drawn(editor)
        with pytest.raises(BundleError, match="is damaged"):
            editor.swap_weights(damaged(other, tmp_path))
        assert drawn(editor) == before


def test_a_graph_that_does_not_load_leaves_the_weights(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = onnx_backend.load_graph, iter(range(100))

    def load(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("no memory")
        return original(*arguments, **options)

    with OPENED["onnxruntime"](small_bundle()) as editor:
        before = drawn(editor)
        monkeypatch.setattr(onnx_backend, "load_graph", load)
        with pytest.raises(BackendError, match=r"cannot load graph \w+ \(no memory\)"):
            editor.swap_weights(other)
        assert drawn(editor) == before
        editor.swap_weights(other)
        assert drawn(editor) != before


@pytest.mark.parametrize("session", [0, 3, 5])
def test_a_bundle_that_is_replaced_while_it_is_loaded_is_not_mixed(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: int
) -> None:
    """ONNX Runtime opens weights by their path: what was read of two bundles is dropped."""
    third = publish_weights(small_bundle(), tmp_path / "third", 0.99)
    with OPENED["onnxruntime"](third) as fresh:
        expected = drawn(fresh)
    target = tmp_path / "target"
    republish(other, target)
    original, calls = onnx_backend.load_graph, iter(range(100))

    def load(*arguments: Any, **options: Any) -> Any:
        if next(calls) == session:
            republish(third, target)
        return original(*arguments, **options)

    with OPENED["onnxruntime"](small_bundle()) as editor:
        monkeypatch.setattr(onnx_backend, "load_graph", load)
        editor.swap_weights(target)
        assert editor.bundle.digest == Bundle.open(third).digest
        assert drawn(editor) == expected


def test_a_bundle_that_is_replaced_by_one_of_other_shapes_leaves_the_weights(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    republish(other, target)
    original = onnx_backend.load_graph

    def load(*arguments: Any, **options: Any) -> Any:
        republish(embedded(), target)
        return original(*arguments, **options)

    with OPENED["onnxruntime"](small_bundle()) as editor:
        before = drawn(editor)
        monkeypatch.setattr(onnx_backend, "load_graph", load)
        with pytest.raises(BundleError, match="has no variant"):
            editor.swap_weights(target)
        assert drawn(editor) == before


def test_a_bundle_that_is_replaced_whenever_it_is_hashed_leaves_the_weights(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    republish(other, target)
    with OPENED["onnxruntime"](small_bundle()) as editor:
        before = drawn(editor)
        monkeypatch.setattr(bundle_module, "ATTEMPTS", 2)
        monkeypatch.setattr(Bundle, "verify", lambda bundle: republish(other, target))
        with pytest.raises(BundleError, match="replaced whenever it was opened"):
            editor.swap_weights(target)
        assert drawn(editor) == before


@pytest.fixture
def failing_reads(other: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Return a function that lets reads of weights files fail from one on, of paths with a text."""
    original, calls = HeldFile.read_into, iter(range(10**6))

    def fail(part: str, first: int) -> None:
        def read_into(file: HeldFile, buffer: Any, offset: int) -> int:
            if part in str(file.path) and next(calls) >= first:
                raise OSError(5, "Input/output error")
            return original(file, buffer, offset)

        monkeypatch.setattr(HeldFile, "read_into", read_into)
        monkeypatch.setattr(Bundle, "verify", lambda bundle: None)

    return fail


def test_a_disk_that_fails_half_way_leaves_the_old_weights_on_the_gpu(
    other: Path, failing_reads: Callable[[str, int], None]
) -> None:
    with on_engines(small_bundle()) as editor:
        before = drawn(editor)
        memory = gpu_of(editor).allocated[-1].copy()
        failing_reads(str(other), 8)
        with pytest.raises(BundleError, match="Input/output error"):
            editor.swap_weights(other)
        assert (gpu_of(editor).allocated[-1] == memory).all()
        assert editor.bundle.path == small_bundle().resolve() and drawn(editor) == before


def test_a_gpu_that_fails_half_way_leaves_the_old_weights(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = SimulatedGpu.copy, iter(range(10**6))

    def copy(gpu: SimulatedGpu, *arguments: int) -> None:
        if next(calls) == 9:
            raise BackendError("the GPU cannot copy")
        original(gpu, *arguments)

    with on_engines(small_bundle()) as editor:
        before = drawn(editor)
        monkeypatch.setattr(SimulatedGpu, "copy", copy)
        with pytest.raises(BackendError, match="the GPU cannot copy"):
            editor.swap_weights(other)
        monkeypatch.setattr(SimulatedGpu, "copy", original)
        assert drawn(editor) == before


def test_an_editor_whose_old_weights_cannot_be_put_back_is_closed(
    other: Path, failing_reads: Callable[[str, int], None]
) -> None:
    editor = on_engines(small_bundle())
    gpu = gpu_of(editor)
    failing_reads("", 8)
    with pytest.raises(
        BackendError, match=r"exchanged \(.*\), nor those of .* put back \(.*\): open"
    ):
        editor.swap_weights(other)
    assert gpu.closed
    with pytest.raises(EditorError, match="the editor is closed"):
        drawn(editor)


def test_an_interrupt_comes_after_the_weights(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave half of each on the GPU."""
    original, calls = SimulatedGpu.copy, iter(range(10**6))

    def copy(gpu: SimulatedGpu, *arguments: int) -> None:
        if next(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        original(gpu, *arguments)

    with on_engines(other) as fresh:
        expected = drawn(fresh)
    with on_engines(small_bundle()) as editor:
        monkeypatch.setattr(SimulatedGpu, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            editor.swap_weights(other)
        monkeypatch.setattr(SimulatedGpu, "copy", original)
        assert editor.bundle.digest == Bundle.open(other).digest and drawn(editor) == expected


@pytest.mark.parametrize("layout", ["profiles", "baked"])
def test_weights_inside_engines_are_not_exchanged(other: Path, layout: EngineLayout) -> None:
    with on_engines(small_bundle(), layout) as editor:
        before = drawn(editor)
        with pytest.raises(BackendError, match=rf"\(layout {layout}\).*--layout external"):
            editor.swap_weights(other)
        assert drawn(editor) == before


def test_a_backend_that_cannot_says_so(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnx_backend.OnnxBackend, "prepare_weights")
    said = "runs on cpu cannot take other weights while"
    with OPENED["onnxruntime"](small_bundle()) as editor, pytest.raises(BackendError, match=said):
        editor.swap_weights(other)


# When it may be called


def test_a_closed_editor_takes_no_weights(other: Path) -> None:
    editor = OPENED["onnxruntime"](small_bundle())
    editor.close()
    with pytest.raises(EditorError, match="the editor is closed"):
        editor.swap_weights(other)


def test_on_scale_cannot_swap(other: Path) -> None:
    def on_scale(progress: Progress) -> None:
        with pytest.raises(EditorError, match="on_scale cannot use the editor"):
            editor.swap_weights(other)

    with OPENED["onnxruntime"](small_bundle()) as editor:
        assert drawn(editor, on_scale=on_scale) == drawn(editor)


def test_a_preview_is_not_drawn_with_other_weights(other: Path) -> None:
    told: list[Progress] = []
    with OPENED["onnxruntime"](small_bundle()) as editor:
        drawn(editor, on_scale=told.append)
        kept = told[0].preview()
        editor.swap_weights(other)
        assert told[0].preview() == kept
        with pytest.raises(EditorError, match="predicted this scale were swapped since"):
            told[1].preview()


def test_edits_of_other_threads_have_the_old_weights_or_the_new(
    opened: Callable[[Path], Editor], other: Path
) -> None:
    expected = []
    for path in (small_bundle(), other):
        with opened(path) as fresh:
            expected.append(drawn(fresh))
    pictures: list[bytes] = []
    with opened(small_bundle()) as editor:
        threads = [Thread(target=lambda: pictures.append(drawn(editor))) for _ in range(3)]
        threads += [
            Thread(target=editor.swap_weights, args=(path,)) for path in (other, small_bundle())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = [small_bundle().resolve(), other].index(editor.bundle.path)
        assert drawn(editor) == expected[last]
    assert len(pictures) == 3 and set(pictures) <= set(expected)

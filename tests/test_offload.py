"""A text encoder that is held only while it runs: less memory, and the same pictures."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import small_bundle
from click.testing import CliRunner
from editing import picture, without_text
from republishing import publish_weights
from simulated_gpu import SimulatedGpu
from stand_in_cuda import pretend
from uncompiled import compiled, keep_engines_in

from varedit_runtime.backends import choose
from varedit_runtime.backends.auto import AutoBackend, wanted_backend
from varedit_runtime.backends.engines.backend import EngineBackend
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.engines.memory import aligned, budget
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.backends.onnxruntime.backend import OnnxBackend, Session
from varedit_runtime.backends.wiring import CACHE, TEXT
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import read_instructions
from varedit_runtime.editing.random_text import with_any_text
from varedit_runtime.errors import BackendError, BundleError, ConfigError, EditCancelled
from varedit_runtime.manifest import Variant

PHOTO, OTHER = picture(40, 30), picture(30, 40, blue=5)
# Instructions come again, so that the text encoder comes and goes.
EDITS: tuple[dict[str, Any], ...] = (
    {"prompt": "add a hat", "num_images_per_prompt": 2},
    {"prompt": "make it night", "negative_prompt": "sun"},
    {"prompt": "add a hat", "guidance_scale": 1},
    {"prompt": "remove it", "fast": True, "on_scale": lambda progress: progress.preview()},
    {"prompt": "add a hat"},
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_engines_in(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_weights(small_bundle(), tmp_path_factory.mktemp("other") / "bundle")


def on_engines(path: Path, offload: str | None, layout: EngineLayout = "external") -> Editor:
    bundle, engines = compiled(path, layout)
    (variant,) = bundle.manifest.variants
    gpu = SimulatedGpu(bundle.graphs_folder)
    backend = EngineBackend(bundle, variant, engines, gpu, offload)
    return Editor(bundle, variant, backend, read_instructions(bundle, variant.text_tokens))


def on_cpu(path: Path, offload: str | None) -> Editor:
    return Editor.open(path, threads=1, offload=offload)


def on_cuda(path: Path, offload: str | None) -> Editor:
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        return Editor.open(path, provider="cuda", threads=1, offload=offload)


BACKENDS = {"cpu": on_cpu, "cuda": on_cuda, "engines": on_engines}
Open = Callable[[Path, str | None], Editor]


@pytest.fixture(params=BACKENDS)
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Open:
    if request.param == "cuda":
        pretend(monkeypatch)
    return BACKENDS[request.param]


def drawn(editor: Editor) -> list[bytes]:
    results = [editor.edit(PHOTO, seed=n, **options) for n, options in enumerate(EDITS)]
    flat = [one for each in results for one in (each if isinstance(each, list) else [each])]
    return [one.image.tobytes() for one in flat]


def test_pictures_are_the_same(opened: Open, other: Path) -> None:
    with opened(small_bundle(), None) as whole, opened(small_bundle(), "text") as editor:
        expected = drawn(whole)
        assert drawn(editor) == expected
        for path in (other, small_bundle()):
            whole.swap_weights(path)
            editor.swap_weights(path)
            assert (
                editor.edit(PHOTO, "a hat", seed=1).image
                == whole.edit(PHOTO, "a hat", seed=1).image
            )
        assert drawn(editor) == expected


def test_an_edit_that_stops_leaves_an_editor_that_works(opened: Open) -> None:
    with opened(small_bundle(), "text") as editor:
        expected = editor.edit(PHOTO, "add a hat", seed=1).image
        with pytest.raises(EditCancelled):
            editor.edit(PHOTO, "rain", on_scale=lambda progress: progress.cancel())
        editor.forget()
        editor.backend.encode_text(*(np.zeros((1, 24), kind) for kind in (np.int64, np.bool_)))
        assert editor.edit(PHOTO, "add a hat", seed=1).image == expected


def test_a_bundle_without_a_text_encoder_has_none_to_release(tmp_path: Path) -> None:
    path = without_text(tmp_path)
    whole, editor = (with_any_text(on_cpu(path, offload)) for offload in (None, "text"))
    assert drawn(whole) == drawn(editor)


# On engines


def test_weights_lie_where_caches_are() -> None:
    taken, told = {}, {}
    bundle, engines = compiled(small_bundle())
    (variant,) = bundle.manifest.variants
    for offload in (None, "text"):
        with on_engines(small_bundle(), offload) as editor:
            backend = editor.backend
            assert isinstance(backend, EngineBackend)
            gpu = backend._device
            assert isinstance(gpu, SimulatedGpu)
            taken[offload] = sum(map(len, gpu.allocated))
            assert backend.gpu_memory == taken[offload]
            assert (backend.whole is None) == (offload is not None)
        told[offload] = budget(bundle, variant, engines=engines.manifest, offload=offload)
    size = sum(aligned(weight.length) for weight in engines.manifest.weights[TEXT])
    saved = min(size, told[None].caches)
    assert taken[None] - taken["text"] == told[None].total - told["text"].total == saved > 0
    before = budget(bundle, variant, offload="text")  # anything is compiled
    assert before.total == pytest.approx(told["text"].total, rel=0.02)


@pytest.mark.parametrize("layout", ["profiles", "baked"])
def test_engines_that_hold_weights_cannot_release_them(layout: EngineLayout) -> None:
    with pytest.raises(BackendError, match=f"layout {layout}.*leave out offload.*external"):
        on_engines(small_bundle(), "text", layout)


# On ONNX Runtime


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each graph is loaded, by its name."""
    counted = Counter[str]()

    class Counted(Session):
        def __init__(self, name: str, *rest: Any, **options: Any) -> None:
            counted[name] += 1
            super().__init__(name, *rest, **options)

    monkeypatch.setattr(onnx_backend, "Session", Counted)
    return counted


@pytest.fixture
def editor(loaded: Counter[str]) -> Iterator[Editor]:
    with on_cpu(small_bundle(), "text") as editor:
        yield editor


def held(editor: Editor) -> OnnxBackend:
    backend = editor._open_backend()
    assert isinstance(backend, OnnxBackend)
    return backend


def caches(backend: OnnxBackend) -> int:
    return sum(name.startswith(CACHE) for name in backend._values)


def test_only_what_runs_is_held(editor: Editor, loaded: Counter[str]) -> None:
    backend = held(editor)
    assert TEXT not in loaded and caches(backend)
    during: list[tuple[bool, int]] = []
    load = backend._load

    def watched(*arguments: Any) -> dict[str, Session]:
        during.append((TEXT in backend._sessions, caches(backend)))
        return load(*arguments)

    backend._load = watched  # type: ignore[method-assign]
    editor.edit(PHOTO, "add a hat", negative_prompt="rain", seed=1)
    assert loaded[TEXT] == 1 and TEXT not in backend._sessions and caches(backend)
    editor.edit([PHOTO, OTHER], "add a hat", negative_prompt="rain", seed=2)
    assert loaded[TEXT] == 1  # of instructions that come again, the encodings were kept
    editor.edit(PHOTO, "remove it", seed=1)
    assert loaded[TEXT] == 2
    assert during == [(False, 0)] * 2
    assert all(count == 1 for name, count in loaded.items() if name != TEXT)


def test_a_new_instruction_reads_no_other_graph(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_graph = list[str](), onnx_backend.read_graph

    def noted(bundle: Bundle, variant: Variant, stage: str) -> bytes:
        read.append(stage)
        return read_graph(bundle, variant, stage)

    monkeypatch.setattr(onnx_backend, "read_graph", noted)
    editor.edit(PHOTO, "add a hat", seed=1)
    assert read == [TEXT]


def test_what_cannot_be_loaded_is_tried_again(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = held(editor)
    expected = editor.edit(PHOTO, "add a hat", seed=1).image
    for fault in ("_load", "_allocate"):
        editor.forget()
        with monkeypatch.context() as patch, pytest.raises(BackendError, match="no memory"):
            patch.setattr(backend, fault, failing)
            editor.edit(PHOTO, "add a hat", seed=1)
        assert editor.edit(PHOTO, "add a hat", seed=1).image == expected


def failing(*_: Any) -> None:
    raise BackendError("no memory")


def test_a_replaced_bundle_is_not_mixed_with_the_open_one(tmp_path: Path, other: Path) -> None:
    path = publish_weights(small_bundle(), tmp_path / "bundle")
    with on_cpu(path, "text") as editor:
        editor.edit(PHOTO, "add a hat", seed=1)
        path.rename(tmp_path / "old")
        other.rename(path)
        try:
            with pytest.raises(BundleError, match="was replaced while it was used"):
                editor.edit(PHOTO, "make it night", seed=1)
            editor.edit(PHOTO, "add a hat", seed=1)  # needs no text encoder
        finally:
            path.rename(other)


# How it is asked for


def test_auto_keeps_to_it() -> None:
    chosen = wanted_backend("auto", offload="text")
    assert isinstance(chosen, AutoBackend) and chosen.offload == "text"
    assert wanted_backend(chosen) == chosen
    with Editor.open(small_bundle(), offload="text") as editor:
        assert (
            editor.chosen and editor.chosen.options == choose("onnxruntime", offload="text").options
        )


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "tensorrt"])
def test_other_words_are_refused(backend: str) -> None:
    with pytest.raises(ConfigError, match="offload is 'all'; it can only be text"):
        wanted_backend(backend, offload="all")


def test_the_command_takes_it(tmp_path: Path, loaded: Counter[str]) -> None:
    photo, results = tmp_path / "photo.png", [tmp_path / f"{n}.png" for n in range(2)]
    PHOTO.save(photo)
    loaded_first = []
    for result, options in zip(results, [(), ("--offload", "text")], strict=True):
        told = *("--bundle", "nano", "--seed", "1", "-o", str(result)), *options
        loaded.clear()
        done = CliRunner().invoke(main, [str(photo), "add a hat", *told])
        assert done.exit_code == 0, done.output
        loaded_first.append(next(iter(loaded)) == TEXT)
        assert loaded[TEXT] == 1
    assert loaded_first == [True, False]
    assert results[0].read_bytes() == results[1].read_bytes()

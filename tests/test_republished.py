"""Bundles that are published again while others use them: nobody mixes two."""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image
from republishing import publish_weights, republish
from uncompiled import Uncompiled, keep_engines_in

import varedit_export
from varedit_engines.compile_set import CompileJob, compile_engine_set
from varedit_engines.engine_compiler import Compiled
from varedit_engines.network import external_inputs
from varedit_export import bench
from varedit_export.parity import compare_bundle
from varedit_runtime import bundle as bundle_module
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.engines.weights import EngineWeights
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.bench_report import Measurement
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BundleError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import weights_file

pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return nano, and a bundle that differs from it in the values of its weights alone."""
    other = publish_weights(embedded(), tmp_path_factory.mktemp("other") / "bundle")
    return embedded(), other


def drawn(editor: Editor) -> bytes:
    with editor:
        return editor.edit(Image.new("RGB", (32, 32), "teal"), "add a hat", seed=1).image.tobytes()


@pytest.fixture(scope="module")
def expected(sources: tuple[Path, Path]) -> dict[str, bytes]:
    """Return the picture that each of the two draws, by its digest."""
    pictures = {Bundle.open(path).digest: drawn(Editor.open(path, threads=1)) for path in sources}
    assert len(set(pictures.values())) == 2
    return pictures


@pytest.fixture
def target(sources: tuple[Path, Path], tmp_path: Path) -> Path:
    republish(sources[0], tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def landing(
    sources: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """Return a function that makes the other bundle land before a session is made."""
    original = onnx_backend.load_graph

    def land(session: int) -> None:
        calls = iter(range(100))

        def load(*arguments: object, **others: object) -> object:
            if next(calls) == session:
                republish(sources[1], target)
            return original(*arguments, **others)  # type: ignore[arg-type]

        monkeypatch.setattr(onnx_backend, "load_graph", load)

    return land


@pytest.mark.parametrize("session", [0, 1, 3, 5])
def test_a_bundle_that_lands_between_two_sessions_is_opened_instead(
    landing: Callable[[int], None], target: Path, expected: dict[str, bytes], session: int
):
    landing(session)
    editor = Editor.open(target, threads=1)
    assert editor.bundle.digest == Bundle.open(target).digest
    assert drawn(editor) == expected[editor.bundle.digest]


def test_a_pinned_bundle_that_is_replaced_while_it_is_opened_is_refused(
    landing: Callable[[int], None], target: Path
):
    landing(3)
    with pytest.raises(BundleError, match="not the one asked for"):
        Editor.open(target, threads=1, digest=Bundle.open(target).digest)


def test_a_pinned_bundle_that_is_published_again_while_it_is_hashed_is_opened(
    sources: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the two renames of a publication there is nothing to hash."""
    original, landed = Bundle.verify, iter([republish])

    def verify(bundle: Bundle) -> None:
        for land in landed:
            land(sources[0], target)
            raise BundleError("no such file")
        original(bundle)

    monkeypatch.setattr(Bundle, "verify", verify)
    digest = Bundle.open(target).digest
    with Editor.open(target, threads=1, digest=digest) as editor:
        assert editor.bundle.digest == digest


def test_a_bundle_that_is_replaced_whenever_it_is_opened_is_an_error(
    sources: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bundle_module, "ATTEMPTS", 2)
    monkeypatch.setattr(Editor, "_load", lambda *_: republish(sources[0], target) and Closed())
    with pytest.raises(BundleError, match="replaced whenever it was opened"):
        Editor.open(target)


class Closed:
    """An editor that was made while its bundle was replaced."""

    def close(self) -> None:
        pass


def test_weights_replaced_by_another_file_are_found(
    sources: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder stays: a digest tells that the file is not the bundle's."""
    file = weights_file("transformer")

    def land(*arguments: object, **others: object) -> object:
        shutil.copyfile(sources[1] / file, target.parent / "other")
        (target.parent / "other").replace(target / file)
        return original(*arguments, **others)  # type: ignore[arg-type]

    original = onnx_backend.load_graph
    digest = Bundle.open(target).digest
    monkeypatch.setattr(onnx_backend, "load_graph", land)
    with pytest.raises(BundleError, match=r"transformer\.safetensors is damaged"):
        Editor.open(target, threads=1, digest=digest)


class Collected:
    """A device that keeps what is copied to it."""

    def __init__(self) -> None:
        self.copied = b""

    def allocate(self, size: int) -> int:
        return 0

    def allocate_host(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)

    def copy(self, target: int, source: int, size: int) -> None:
        self.copied += ctypes.string_at(source, size)

    def wait(self) -> None:
        pass

    def mark(self) -> Callable[[], None]:
        return self.wait


def test_engines_get_the_weights_of_the_bundle_that_was_opened(
    sources: tuple[Path, Path], target: Path
):
    copied: list[bytes] = []
    bundle = Bundle.open(target)
    (variant,) = bundle.manifest.variants
    _, stored = external_inputs(bundle.graph_bytes(variant.name, "prefill"))
    for replaced in (False, True):
        if replaced:
            republish(sources[1], target)
        device = Collected()
        weights = EngineWeights({"prefill": stored})
        weights.allocate(device)  # type: ignore[arg-type]
        weights.fill(bundle, device)  # type: ignore[arg-type]
        copied.append(device.copied)
    assert len(copied[0]) > 10**6 and copied[0] == copied[1]


@pytest.mark.parametrize("layout", ["external", "profiles", "baked"])
def test_engines_are_not_compiled_with_the_weights_of_a_newer_bundle(
    sources: tuple[Path, Path],
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: EngineLayout,
):
    """Compilers open weights by their path. Plans with weights inside are not even kept."""
    keep_engines_in(tmp_path, monkeypatch)
    monkeypatch.setattr("varedit_engines.engine_cache._writable", lambda folder: False)
    compiled: list[str] = []

    class Replacing(Uncompiled):
        def compile(self, name: str, graph: bytes, *rest: object) -> Compiled:
            compiled.append(name)
            if name == "image_encoder":
                republish(sources[1], target)
            return super().compile(name, graph)

    def compile_all() -> None:
        compiled.clear()
        compile_engine_set(CompileJob(bundle, layout, Replacing()), lambda *_: None)  # type: ignore[arg-type]

    bundle = Bundle.open(target)
    if layout == "external":
        compile_all()
    else:
        for _ in range(2):
            with pytest.raises(BundleError, match="was replaced while it was used"):
                compile_all()
            assert compiled[-1] == "image_encoder"


def test_a_bundle_that_is_replaced_while_it_is_verified_is_not_verified(
    sources: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch
):
    def compared(*_: object) -> list[object]:
        republish(sources[1], target)
        return []

    monkeypatch.setattr(compare_bundle, "compare_bundle", compared)
    with pytest.raises(BundleError, match="was replaced while it was used"):
        varedit_export.verify(target)


def test_a_bundle_that_is_replaced_while_it_is_measured_is_not_reported(
    sources: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch
):
    def measured(*_: object) -> list[Measurement]:
        republish(sources[1], target)
        return []

    monkeypatch.setattr(bench, "_measure_variant", measured)
    with pytest.raises(BundleError, match="was replaced while it was used"):
        bench.measure_all(bench.entrants(target, []), repeat=1, threads=1)


@pytest.fixture
def publishing(sources: tuple[Path, Path], target: Path) -> Iterator[None]:
    """Publish the two bundles in turns, without end, at random times."""
    ended, random = Event(), Random(0)

    def publish() -> None:
        turn = 0
        while not ended.wait(random.expovariate(5)):
            turn += 1
            republish(sources[turn % 2], target)

    publisher = Thread(target=publish)
    publisher.start()
    yield
    ended.set()
    publisher.join()


@pytest.mark.usefixtures("publishing")
def test_fuzz_every_picture_is_of_one_bundle(
    cases: Callable[[int], Iterator[Random]], target: Path, expected: dict[str, bytes]
):
    pictures = 0
    for random in cases(8):
        pinned = random.choice([None, *expected])
        try:
            editor = Editor.open(target, threads=1, digest=pinned)
        except BundleError as error:
            assert pinned and "not the one asked for" in str(error)
        else:
            assert pinned in (None, editor.bundle.digest)
            assert drawn(editor) == expected[editor.bundle.digest]
            pictures += 1
    assert pictures  # which of the two is met is chance


@pytest.mark.usefixtures("publishing")
def test_fuzz_everything_that_is_read_is_of_one_bundle(
    cases: Callable[[int], Iterator[Random]], target: Path, sources: tuple[Path, Path]
):
    """What was opened stays readable, or says that it was replaced."""
    bundles = {Bundle.open(path).digest: path for path in sources}
    for random in cases(60):
        bundle = Bundle.open(target)
        (variant,) = bundle.manifest.variants
        source = bundles[bundle.digest]
        for component in random.sample(bundle.components, 2):
            name = weights_file(component)
            size = bundle.manifest.files[name].size
            assert bundle.hold(name).read(size) == (source / name).read_bytes()
        stage = random.choice(list(variant.graphs))
        try:
            data = bundle.graph_bytes(variant.name, stage)
        except BundleError:
            assert not bundle.stands()
        else:
            assert data == (source / variant.graph(stage).file).read_bytes()

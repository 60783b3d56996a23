"""The real device on fakes of CUDA and TensorRT, whose memory is this machine's."""

import gc
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cuda.core
import fake_cuda
import numpy as np
import pytest
import tensorrt_lean_bindings
from click.testing import CliRunner, Result
from editing import picture, small_bundle
from fake_cuda import RTX, Machine
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from PIL import Image
from simulated_gpu import SimulatedGpu
from uncompiled import compiled, keep_engines_in, near

from varedit_export.cli import main as varedit_export
from varedit_runtime.backends.engines import cuda as cuda_device
from varedit_runtime.backends.engines import engine_set
from varedit_runtime.backends.engines.cuda import CudaDevice
from varedit_runtime.backends.engines.device import Launch, address_of
from varedit_runtime.backends.engines.engine_set import LAYOUTS, EngineLayout, EngineSet, EngineSets
from varedit_runtime.backends.engines.import_tensorrt import ENGINE_KINDS, TYPES, EngineKind
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as varedit_run
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, BundleError

CORE: Any = cuda.core
LEAN: Any = tensorrt_lean_bindings
SIZE = 512


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Replace this machine's CUDA and TensorRT for RTX by a fake for the small bundle."""
    keep_engines_in(tmp_path, monkeypatch)
    monkeypatch.setattr(cuda_device, "cache_folder", lambda: tmp_path / "cache")
    machine = Machine(SimulatedGpu(Bundle.open(small_bundle()).graphs_folder))
    install(machine, monkeypatch)
    return machine


def install(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in machine.modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def opened(layout: EngineLayout = "external", kind: EngineKind = "tensorrt-rtx") -> Editor:
    """Open the small bundle on engines that were just compiled."""
    compiled(small_bundle(), layout, kind)
    return Editor.open(small_bundle(), backend=kind)


def edited(editor: Editor, seed: int = 1) -> np.ndarray:
    return np.asarray(editor.edit(picture(40, 30), "add a hat", seed=seed).image)


# The fakes


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_cuda.Driver, fake_cuda.driver),
        (fake_cuda.Device, CORE.Device),
        (fake_cuda.Stream, CORE.Stream),
        (fake_cuda.Event, CORE.Event),
    ],
)
def test_what_is_called_of_cuda_exists_with_these_parameters(fake: Any, real: Any) -> None:
    for name in public(fake):
        member = getattr(real, name)
        if inspect.isfunction(getattr(fake, name)):
            theirs = [p for p in inspect.signature(member).parameters if p != "self"]
            assert parameters(fake, name) == theirs


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_cuda.Runtime, RTX.Runtime),
        (fake_cuda.Engine, RTX.ICudaEngine),
        (fake_cuda.OldEngine, RTX.ICudaEngine),
        (fake_cuda.Context, RTX.IExecutionContext),
        (fake_cuda.RtxConfig, RTX.IRuntimeConfig),
        (fake_cuda.RuntimeCache, RTX.IRuntimeCache),
        (fake_cuda.Runtime, LEAN.Runtime),  # of the real TensorRT
        (fake_cuda.Engine, LEAN.ICudaEngine),
        (fake_cuda.OldEngine, LEAN.ICudaEngine),
        (fake_cuda.Context, LEAN.IExecutionContext),
        (fake_cuda.RuntimeConfig, LEAN.IRuntimeConfig),
    ],
)
def test_what_is_called_of_tensorrt_exists_with_these_parameters(fake: Any, real: Any) -> None:
    for name in public(fake):
        member = getattr(real, name)
        if inspect.isfunction(getattr(fake, name)):
            overloads = re.findall(rf"{name}\(self: .*", member.__doc__)
            theirs = [re.findall(r"(?:\(|, )(\w+): ", text)[1:] for text in overloads]
            assert parameters(fake, name) in theirs


@pytest.mark.parametrize("library", [RTX, LEAN])
def test_both_libraries_have_the_types_and_strategies_that_are_used(library: Any) -> None:
    assert hasattr(CORE._device.DeviceProperties, "integrated")
    assert set(TYPES) <= set(library.DataType.__members__)
    assert "USER_MANAGED" in library.ExecutionContextAllocationStrategy.__members__


def public(fake: Any) -> list[str]:
    """Return the fake's names, which the real one must have too."""
    names = [name for name in vars(fake) if name[0] != "_"]
    assert names
    return names


def parameters(fake: Any, name: str) -> list[str]:
    return list(inspect.signature(getattr(fake, name)).parameters)[1:]


# Edits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ENGINE_KINDS)
def test_an_edit_is_the_same_as_onnxruntimes(
    machine: Machine, kind: EngineKind, layout: EngineLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.kind = kind
    install(machine, monkeypatch)
    with opened(layout, kind) as editor, Editor.open(small_bundle(), threads=1) as other:
        for seed, negative in ((1, None), (2, "rain")):
            ours, theirs = (
                one.edit(picture(40, 30), "add a hat", seed=seed, negative_prompt=negative)
                for one in (editor, other)
            )
            assert near(ours.image, theirs.image)


def test_by_stages_and_as_a_whole_are_the_same_edit(machine: Machine) -> None:
    with opened() as editor:
        whole = edited(editor)
        staged = editor.edit(picture(40, 30), "add a hat", seed=1, on_scale=lambda progress: None)
    assert np.array_equal(whole, np.asarray(staged.image))


def test_another_thread_can_edit(machine: Machine) -> None:
    """The current GPU is a setting of each thread; a new thread has none."""
    images: list[np.ndarray] = []
    with opened() as editor:
        thread = threading.Thread(target=lambda: images.append(edited(editor)))
        thread.start()
        thread.join()
        assert np.array_equal(images[0], edited(editor))
    assert len(machine.current) == 2


def in_another_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_another_thread_can_close(machine: Machine) -> None:
    editor = opened()
    in_another_thread(editor.close)
    assert not held(machine) and not machine.loaded and not machine.orphans


def test_an_editor_that_is_not_closed_is_freed_on_its_gpu_by_any_thread(machine: Machine) -> None:
    editors = [opened()]
    gc.collect()

    def forget() -> None:
        editors.clear()
        gc.collect()

    in_another_thread(forget)
    assert not held(machine) and not machine.loaded and not machine.orphans


def test_threads_keep_their_own_gpu(machine: Machine) -> None:
    """Another library in this process may use another GPU."""
    ident, other = threading.get_ident(), 99
    with opened() as editor:
        machine.current[ident] = [other]
        edited(editor)
        assert machine.current[ident] == [other]
    assert machine.current[ident] == [other]


# Capture


@pytest.fixture
def device(machine: Machine) -> CudaDevice:
    return CudaDevice("tensorrt-rtx")


def zeros_and_fives(device: CudaDevice) -> tuple[np.ndarray, int]:
    """Allocate memory of the host, filled with fives, and of the GPU, with zeros."""
    host, block = device.allocate_host(SIZE), device.allocate(SIZE)
    host[:] = 5
    device.clear(block, SIZE)
    return host, block


def read(device: CudaDevice, block: int) -> np.ndarray:
    host = device.allocate_host(SIZE)
    device.copy(address_of(host), block, SIZE)
    device.wait()
    return host


def test_captured_work_is_done_whenever_it_is_launched(device: CudaDevice) -> None:
    host, block = zeros_and_fives(device)
    launch = device.capture(lambda: device.copy(block, address_of(host), SIZE))
    assert not read(device, block).any()
    launch()
    assert (read(device, block) == 5).all()
    host[:] = 6
    launch()
    assert (read(device, block) == 6).all()


@pytest.mark.parametrize("failing", [set(), {"cuStreamEndCapture"}])  # as one that is spoilt does
def test_a_capture_that_fails_leaves_nothing_behind(
    device: CudaDevice, machine: Machine, failing: set[str]
) -> None:
    host, block = zeros_and_fives(device)

    def record() -> None:
        device.copy(block, address_of(host), SIZE)
        raise KeyboardInterrupt

    machine.failing = failing
    with pytest.raises(KeyboardInterrupt):
        device.capture(record)
    assert not read(device, block).any() and not machine.graphs


def test_graphs_are_destroyed_once_and_not_launched_after_that(
    device: CudaDevice, machine: Machine
) -> None:
    launch = captured(device)
    assert len(machine.graphs) == 1
    device.close()
    assert not machine.graphs
    device.close()
    with pytest.raises(BackendError, match=r"cannot launch a graph \(it has been closed"):
        launch()


def test_what_is_freed_during_a_capture_does_not_spoil_it(
    device: CudaDevice, machine: Machine
) -> None:
    spare = device.allocate(SIZE)
    host, block = zeros_and_fives(device)
    device.wait()

    def record() -> None:
        device.copy(block, address_of(host), SIZE)
        fake_cuda.Driver(machine).cuMemFree(spare)

    device.capture(record)()
    assert (read(device, block) == 5).all()


# Errors


def doubling() -> bytes:
    """Return a graph that doubles x [n, 4]."""
    x, y = (make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = make_graph([make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    model = make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def bound(device: CudaDevice, shape: tuple[int, ...] = (2, 4)) -> Launch:
    engine = device.load("doubling", doubling())
    size = engine.scratch(0)
    addresses = {name: device.allocate(SIZE) for name in engine.tensors}
    return engine.bind(0, {"x": shape}, addresses, (device.allocate(size), size))


def captured(device: CudaDevice) -> Launch:
    return device.capture(lambda: None)


OPERATIONS: list[tuple[str, Callable[[CudaDevice], object]]] = [
    ("cuCtxPushCurrent", CudaDevice.wait),
    ("cuMemGetInfo", CudaDevice.free_memory),
    ("cuMemAlloc", lambda device: device.allocate(SIZE)),
    ("cuMemAllocHost", lambda device: device.allocate_host(SIZE)),
    ("cuMemcpyAsync", lambda device: device.copy(0, 0, SIZE)),
    ("cuMemcpyAsync", lambda device: device.capture(lambda: device.copy(0, 0, SIZE))),
    ("cuMemsetD8Async", lambda device: device.clear(0, SIZE)),
    ("sync", CudaDevice.wait),
    ("record", CudaDevice.mark),
    ("sync", lambda device: device.mark()()),
    ("cuStreamBeginCapture", captured),
    ("cuStreamEndCapture", captured),
    ("cuGraphInstantiate", captured),
    ("cuGraphDestroy", captured),
    ("cuGraphUpload", captured),
    ("cuGraphLaunch", lambda device: captured(device)()),
    ("deserialize_cuda_engine", bound),
    ("create_runtime_config", bound),
    ("create_execution_context", bound),
    ("execute_async_v3", lambda device: bound(device)()),
]


@pytest.mark.parametrize(("call", "operation"), OPERATIONS)
def test_a_call_that_fails_is_an_error_of_one_line(
    device: CudaDevice, machine: Machine, call: str, operation: Callable[[CudaDevice], object]
) -> None:
    machine.failing = {call}
    with pytest.raises(BackendError) as caught:
        operation(device)
    message = str(caught.value)
    assert message.startswith("the GPU cannot ") and message.splitlines() == [message]
    assert "CUDA_ERROR_UNKNOWN" in message and message.count("varedit-export doctor") == 1
    machine.failing = set()
    _, block = zeros_and_fives(device)
    assert not read(device, block).any()


@pytest.mark.parametrize("call", ["set_current", "create_stream", "Runtime"])
def test_a_gpu_that_cannot_be_used_is_an_error(machine: Machine, call: str) -> None:
    machine.failing = {call}
    with pytest.raises(BackendError, match=r"the GPU cannot be used .*: run `varedit-export doc"):
        CudaDevice("tensorrt-rtx")


@pytest.mark.parametrize("gpu", [(7, 5), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)])
def test_a_gpu_that_rtx_does_not_run_on_is_an_error_before_anything_is_loaded(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int]
) -> None:
    monkeypatch.setattr(fake_cuda.Device, "compute_capability", gpu)
    said = rf"tensorrt-rtx has no engines for 'sm{gpu[0]}{gpu[1]}'.*, only for sm80, .*: use"
    with pytest.raises(BackendError, match=said):
        CudaDevice("tensorrt-rtx")
    assert not machine.loaded and not held(machine)
    machine.kind = "tensorrt"
    install(machine, monkeypatch)
    assert CudaDevice("tensorrt").gpu == f"sm{gpu[0]}{gpu[1]} Simulated GPU"


def test_a_runtime_that_cannot_use_cuda_is_an_error_and_not_touched(machine: Machine) -> None:
    """TensorRT logs it, returns an object, and kills the process when that is used or freed."""
    machine.messages = {"Runtime": "CUDA initialization failure\nwith error: 35"}
    said = r"tensorrt_rtx cannot be used here \(CUDA initialization failure with error: 35\): run"
    with pytest.raises(BackendError, match=said):
        CudaDevice("tensorrt-rtx")
    gc.collect()
    assert machine.loaded and not machine.streams


@pytest.mark.parametrize("refused", ["context", "execute"])
def test_what_tensorrt_refuses_without_a_word_is_an_error(
    device: CudaDevice, machine: Machine, refused: str
) -> None:
    machine.failing = {refused}
    with pytest.raises(BackendError, match=r"the engine doubling \(no reason given\)"):
        bound(device)()


def test_a_plan_that_is_none_is_an_error(device: CudaDevice) -> None:
    with pytest.raises(BackendError, match=r"decoder cannot be loaded .*: compile .* --again") as e:
        device.load("decoder", b"no plan")
    assert "no reason given" not in str(e.value)


def test_shapes_that_an_engine_does_not_take_are_an_error(device: CudaDevice) -> None:
    with pytest.raises(BackendError, match="the engine doubling does not take its tensors"):
        bound(device, (2, 5))


def test_a_profile_that_an_engine_does_not_take_is_an_error(
    device: CudaDevice, machine: Machine
) -> None:
    """TensorRT raises, and may tell its logger why."""
    machine.failing = {"set_optimization_profile_async"}
    refused = "the engine doubling does not take its tensors"
    with pytest.raises(BackendError, match=rf"^{refused} \(CUDA_ERROR_UNKNOWN: .*\): compile it"):
        bound(device)
    machine.messages = {"set_optimization_profile_async": "no such\nprofile"}
    with pytest.raises(BackendError, match=rf"^{refused} \(no such profile\): compile it"):
        bound(device)


@pytest.mark.parametrize(
    ("earlier", "refused"),
    [
        ("deserialize_cuda_engine", "context"),
        ("create_runtime_config", "context"),
        ("create_execution_context", "execute"),
    ],
)
def test_what_tensorrt_said_before_is_not_the_reason(
    device: CudaDevice, machine: Machine, earlier: str, refused: str
) -> None:
    machine.messages, machine.failing = {earlier: "a harmless error"}, {refused}
    with pytest.raises(BackendError, match="no reason given"):
        bound(device)()


def test_an_engine_that_is_closed_does_not_run(device: CudaDevice, machine: Machine) -> None:
    run = bound(device)
    device.close()
    with pytest.raises(BackendError, match=r"cannot run the engine doubling \(it has been closed"):
        run()


# Kernels


def kernels(folder: Path) -> list[Path]:
    return list((folder / "cache").rglob("*.bin"))


def test_what_rtx_compiled_is_kept(machine: Machine, tmp_path: Path) -> None:
    with opened() as editor:
        first = edited(editor)
    once = list(machine.compiled)
    assert once and len(set(once)) == len(once)
    (file,) = kernels(tmp_path)
    assert file.name == "tensorrt-rtx-1.7-Simulated_GPU.bin"
    with opened() as editor:
        assert np.array_equal(edited(editor), first)
    assert machine.compiled == once


def test_kernels_that_are_damaged_are_compiled_afresh(machine: Machine, tmp_path: Path) -> None:
    opened().close()
    once = list(machine.compiled)
    (file,) = kernels(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(b"torn")
    opened().close()
    assert machine.compiled == once * 2 and file.read_bytes() == whole


def test_kernels_that_cannot_be_written_are_no_error(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"no folder")
    with opened() as editor:
        assert edited(editor).any()


def test_tensorrt_keeps_no_kernels(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.kind = "tensorrt"
    install(machine, monkeypatch)
    opened(kind="tensorrt").close()
    assert not kernels(tmp_path)


# Closing


def held(machine: Machine) -> list[Any]:
    streams = [fake_cuda.STREAM] * machine.streams
    return [*machine.gpu.allocated, *machine.gpu.host, *machine.graphs, *streams]


def test_closing_frees_everything(machine: Machine) -> None:
    editor = opened()
    backend = editor.backend
    edited(editor)
    assert held(machine) and machine.loaded
    backend.close()
    assert not held(machine) and not machine.loaded and not machine.orphans
    backend.close()


def test_closing_waits_for_what_is_under_way(device: CudaDevice, machine: Machine) -> None:
    host, block = zeros_and_fives(device)
    device.copy(block, address_of(host), SIZE)
    device.close()
    assert not held(machine) and not machine.gpu.queue


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "execute_async_v3", "cuMemAllocHost"])
def test_what_cannot_be_opened_whole_is_freed(machine: Machine, call: str) -> None:
    machine.failing = {call}
    with pytest.raises(BackendError, match=call):
        opened()
    assert not held(machine)


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuGraphUpload", "execute", "context"])
def test_engines_that_cannot_be_opened_are_freed_before_what_they_run_on(
    machine: Machine, call: str
) -> None:
    """Freed although the error's traceback still refers to them."""
    machine.failing = {call}
    with pytest.raises(BackendError) as caught:
        opened()
    assert not held(machine) and not contexts(machine)
    del caught
    gc.collect()
    assert not machine.loaded and not machine.orphans


def contexts(machine: Machine) -> list[fake_cuda.Context]:
    return [loaded for loaded in machine.loaded if isinstance(loaded, fake_cuda.Context)]


def test_a_gpu_that_failed_can_be_closed(machine: Machine) -> None:
    """The error that is reported is the first."""
    machine.failing = {"cuStreamBeginCapture", "cuMemFree", "cuMemFreeHost"}
    with pytest.raises(BackendError, match="cuStreamBeginCapture"):
        opened()


def test_an_edit_that_failed_is_what_is_told(machine: Machine) -> None:
    with pytest.raises(BackendError, match="launch a graph"), opened() as editor:
        machine.failing = {"cuGraphLaunch", "sync", "cuMemFree"}
        edited(editor)


def test_too_little_memory_is_an_error_that_takes_none(machine: Machine) -> None:
    machine.gpu.free = 1000
    with pytest.raises(BackendError, match="the engines need"):
        opened()
    assert not held(machine)


# The commands


def run(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def engines(machine: Machine) -> tuple[object, ...]:
    """Return the options that make a command use the small bundle's engines."""
    compiled(small_bundle())
    return "--backend", "tensorrt-rtx"


def test_varedit_run_edits_with_engines(engines: tuple[object, ...], tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    picture(40, 30).save(photo)
    options = ["--bundle", small_bundle(), "--seed", 1, "-o", out, "--json", *engines]
    done = run(varedit_run, photo, "add a hat", *options)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["provider"], list(told["timings"])) == ("tensorrt-rtx", ["edit"])
    with Editor.open(small_bundle(), threads=1) as other, Image.open(out) as ours:
        assert near(ours, other.edit(picture(40, 30), "add a hat", seed=1).image)


def test_bench_times_whole_edits_and_their_stages(
    engines: tuple[object, ...], tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    done = run(varedit_run, "bench", small_bundle(), "--repeat", 2, "--json", file, *engines)
    assert done.exit_code == 0, done.output
    (own,) = json.loads(file.read_text())["measurements"]
    assert own["product_rate"] is None and "matrix product" not in done.stdout
    stages = [stage["name"] for stage in own["stages"]]
    assert stages[0] == "text_encoder" and stages[-1] == "image_decoder" and "edit" not in stages
    assert own["wall"]["median"] > 0


def test_verify_compares_engines(engines: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    done = run(varedit_export, "verify", small_bundle(), "--report", file, *engines)
    assert done.exit_code == 0, done.output
    measures = [line["measure"] for line in json.loads(file.read_text())]
    assert any("against ONNX Runtime" in measure for measure in measures)
    assert any("against the reference" in measure for measure in measures)


def test_engines_of_another_user_need_their_digest_or_trust(
    engines: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = EngineSets(Bundle.open(small_bundle())).folders
    digest = EngineSet.open(folder).digest
    monkeypatch.setattr(engine_set, "data_folder", lambda: tmp_path / "another user's")
    with pytest.raises(BundleError, match="built elsewhere, and they are native code"):
        Editor.open(small_bundle(), backend="tensorrt-rtx")
    with pytest.raises(BundleError, match="no tensorrt-rtx engines"):
        Editor.open(small_bundle(), backend="tensorrt-rtx", engines_digest="0" * 64)
    Editor.open(small_bundle(), backend="tensorrt-rtx", engines_digest=digest).close()
    Editor.open(small_bundle(), backend="tensorrt-rtx", trust_engines=True).close()

"""What Jetsons have: TensorRT 10.3, CUDA 12, and a GPU with the system's memory."""

import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import copying_tensorrt
import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import Machine
from test_cuda import edited, install, machine, opened, public
from uncompiled import VERSIONS

from varedit_engines import engine_compiler
from varedit_engines.engine_compiler import EngineCompiler, Flags
from varedit_runtime.backends.engines import cuda as cuda_device
from varedit_runtime.backends.engines import import_tensorrt as tensorrt
from varedit_runtime.backends.engines import weights
from varedit_runtime.backends.engines.import_tensorrt import EngineKind
from varedit_runtime.backends.engines.spec import TENSORRT
from varedit_runtime.backends.machine import Machine as Facts
from varedit_runtime.backends.machine import Nvidia
from varedit_runtime.errors import BackendError, ConfigError, MissingExtraError

__all__ = ["machine"]  # a fixture

# The names of TensorRT 10.3

STUBS = """
void *createInferBuilder_INTERNAL, *createInferRefitter_INTERNAL, *createInferRuntime_INTERNAL;
void *createNvOnnxParserRefitter_INTERNAL, *createNvOnnxParser_INTERNAL, *getPluginRegistry;
void *getBuilderPluginRegistry, *initLibNvInferPlugins;
int getNvOnnxParserVersion(void) { return 0; }
"""
TELL = """
import inspect, json, re, sys
import tensorrt_bindings as trt

def told(kind, name):
    member = getattr(kind, name)
    if not inspect.isroutine(member):
        return []
    overloads = re.findall(rf"{name}\\(self: .*", member.__doc__)
    return [re.findall(r"(?:\\(|, )(\\w+): ", text)[1:] for text in overloads]

kinds = {name: kind for name, kind in vars(trt).items() if inspect.isclass(kind)}
print(json.dumps({
    name: {member: told(kind, member) for member in dir(kind) if member[0] != "_"}
    for name, kind in kinds.items()
}))
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[str]]]]:
    """Return the classes of TensorRT 10.3 with their members and these' parameters by overload.

    They are its real Python module's, which is imported beside empty libraries.
    """
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("tensorrt-cu12-bindings 10.3 is for Linux on x86-64 and Python up to 3.12")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "stubs.c").write_text(STUBS)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = f"lib{name}.so.10"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "stubs.c", "-o", library]
        try:
            subprocess.run(command, cwd=folder, check=True)
        except FileNotFoundError:
            pytest.skip("there is no C compiler")
    done = subprocess.run(
        [sys.executable, "-c", TELL],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_cuda.Runtime, "Runtime"),
        (fake_cuda.OldEngine, "ICudaEngine"),
        (fake_cuda.Context, "IExecutionContext"),
        (copying_tensorrt.Runtime, "Runtime"),
        (copying_tensorrt.ICudaEngine, "ICudaEngine"),
        (copying_tensorrt.IExecutionContext, "IExecutionContext"),
        (fake_tensorrt.TimingCache, "ITimingCache"),
        (fake_tensorrt.Builder, "Builder"),
        (fake_tensorrt.BuilderConfig, "IBuilderConfig"),
        (fake_tensorrt.OnnxParser, "OnnxParser"),
    ],
)
def test_what_is_called_exists_in_tensorrt_10_3(old: Any, fake: Any, real: str) -> None:
    """All but the choice of architectures, and what the fakes record."""
    ours = {"gpu", "refused", "configs", "measured"}
    ours |= {"set_compute_capability", "get_compute_capability"}
    for name in set(public(fake)) - ours:
        assert name in old[real]
        if inspect.isfunction(function := getattr(fake, name)):
            assert list(inspect.signature(function).parameters)[1:] in old[real][name]


@pytest.mark.parametrize(
    ("enumeration", "names"),
    [
        ("BuilderFlag", {"TF32", "VERSION_COMPATIBLE"}),
        ("DataType", {*tensorrt.TYPES, "INT64", "BOOL"}),
        ("ExecutionContextAllocationStrategy", {"USER_MANAGED"}),
        ("HardwareCompatibilityLevel", {"NONE", "AMPERE_PLUS"}),
        ("MemoryPoolType", {"WORKSPACE"}),
        ("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED"}),
        ("ProfilingVerbosity", {"DETAILED"}),
    ],
)
def test_what_is_chosen_exists_in_tensorrt_10_3(
    old: Any, enumeration: str, names: set[str]
) -> None:
    assert names <= old[enumeration].keys()


def test_tensorrt_10_3_creates_contexts_without_a_configuration(old: Any) -> None:
    assert "create_runtime_config" not in old["ICudaEngine"] and "IRuntimeConfig" not in old
    assert "SAME_COMPUTE_CAPABILITY" not in old["HardwareCompatibilityLevel"]


# Old and new versions


def test_an_edit_on_tensorrt_10_3_is_the_same(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.kind = "tensorrt"
    images = []
    for version in ("11.4", "10.3.0"):
        monkeypatch.setitem(VERSIONS, "tensorrt", version)
        install(machine, monkeypatch)
        with opened(kind="tensorrt") as editor:
            images.append(edited(editor))
    assert np.array_equal(*images)


def library(monkeypatch: pytest.MonkeyPatch, kind: EngineKind, version: str) -> Any:
    module = fake_tensorrt.fake_tensorrt()
    module.__version__ = version
    monkeypatch.setitem(sys.modules, tensorrt.MODULES[kind], module)
    return module


@pytest.mark.parametrize("version", ["8.6.2", "10.2.0.post1", "10.0"])
def test_an_older_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    library(monkeypatch, "tensorrt", version)
    said = f"TensorRT {version} is installed, and 10.3 or later is needed"
    with pytest.raises(BackendError, match=said):
        EngineCompiler("tensorrt")
    assert TENSORRT.probe().problem == said


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "11.4.0.106", "12.0"])
def test_other_versions_are_not(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    made = library(monkeypatch, "tensorrt", version)
    assert tensorrt.import_tensorrt("tensorrt") is made and TENSORRT.probe().problem == ""


def test_a_level_that_tensorrt_10_3_lacks_is_refused_before_compiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = library(monkeypatch, "tensorrt", "10.3.0")
    monkeypatch.setattr(engine_compiler, "this_gpu", lambda backend: "sm87 Orin")
    levels = made.HardwareCompatibilityLevel.__members__
    known = {name: levels[name] for name in ("NONE", "AMPERE_PLUS")}
    made.HardwareCompatibilityLevel = type("Level", (), {"__members__": known})
    EngineCompiler("tensorrt", (), Flags(hardware_compatible="ampere-plus"))
    said = "TensorRT 10.3.0 cannot compile engines for same-compute-capability, only for ampere-plu"
    with pytest.raises(ConfigError, match=said):
        EngineCompiler("tensorrt", (), Flags(hardware_compatible="same-compute-capability"))


# TensorRT that belongs to the system

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
UNSEEN = "not seen by this environment: make one with `/usr/bin/python3 -m venv --system-site-pac"
OTHER = f"is for Python 3.10, and this is Python {HERE}: docs/jetson.md says what to do"


@pytest.mark.parametrize(
    ("python", "said"), [("3", UNSEEN), (HERE, UNSEEN), ("3.10", OTHER), (None, "pip install")]
)
def test_errors_say_how_to_reach_the_systems_tensorrt(
    python: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if python is not None:
        module = tmp_path / f"python{python}" / "dist-packages" / "tensorrt"
        module.mkdir(parents=True)
        (module / "__init__.py").touch()
    monkeypatch.setattr(tensorrt, "SYSTEM", tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Nothing("tensorrt"), *sys.meta_path])
    with pytest.raises(MissingExtraError) as caught:
        tensorrt.import_tensorrt("tensorrt")
    assert said in str(caught.value)
    facts = Facts("3.12", Nvidia(None, ()), {}, {"tensorrt": TENSORRT.probe()}, None, 0)
    assert said in str(TENSORRT.verdicts(facts)[0])


class Nothing:
    """A finder for which a module is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


# A GPU with the system's memory


def test_free_memory_of_an_integrated_gpu_is_what_programs_can_have(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA counts files that the system caches as taken, such as weights that were just hashed."""
    monkeypatch.setattr(cuda_device, "available_memory", machine.gpu.free_memory)
    machine.cached = machine.gpu.free
    with pytest.raises(BackendError, match="the engines need"):
        opened()
    machine.integrated = True
    with opened() as editor:
        assert edited(editor).any()
    machine.gpu.free = 1000
    with pytest.raises(BackendError, match="the engines need"):
        opened()


def test_the_weights_are_in_memory_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory holds two small parts of them, and the inputs and outputs of an edit."""
    monkeypatch.setattr(weights, "CHUNK", 1024)
    with opened() as editor:
        backend: Any = editor.backend
        in_host, in_edits = sum(block.nbytes for block in machine.gpu.host), backend._mirror.nbytes
        assert in_host - in_edits == 2 * 1024 < backend.budget.weights / 10

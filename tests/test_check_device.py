"""What is tried of the device on a GPU is tried on a simulated one, sound and broken."""

import sys
from pathlib import Path
from typing import Any

import check_device
import pytest
from check_device import CHECKS
from copying_tensorrt import copying_tensorrt
from fake_cuda import Machine
from simulated_gpu import SimulatedGpu

from varedit_runtime.backends.engines import cuda as cuda_device
from varedit_runtime.backends.engines.cuda import CudaDevice

# A method that is broken, what it does instead, and a check that must notice.
FAULTS: list[tuple[type, str, Any, str]] = [
    (SimulatedGpu, "copy", lambda gpu, *copy: None, "copies"),
    (SimulatedGpu, "clear", lambda gpu, *block: None, "copies"),
    (CudaDevice, "capture", lambda device, record: lambda: None, "launches"),
    (CudaDevice, "capture", lambda device, record: lambda: None, "captures_that_fail"),
    (CudaDevice, "mark", lambda device: lambda: None, "buffers"),
    (CudaDevice, "close", lambda device: None, "closing"),
    (CudaDevice, "close", lambda device: None, "memory"),
]


@pytest.fixture(autouse=True)
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = Machine(SimulatedGpu(tmp_path), kind="tensorrt").modules
    for name, module in {**modules, "tensorrt": copying_tensorrt()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cuda_device, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(check_device, "SIZE", 4096)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_device_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_device.main(name)
    assert capsys.readouterr().out.startswith('{"verified": true')


@pytest.mark.parametrize(("kind", "method", "broken", "name"), FAULTS)
def test_a_broken_device_does_not(
    kind: type, method: str, broken: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, method, broken)
    with pytest.raises((AssertionError, RuntimeError)):
        check_device.main(name)

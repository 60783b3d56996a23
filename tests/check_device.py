"""Tries the engines' device, `CudaDevice`, on this machine's GPU, under engines that copy.

    python tests/check_device.py launches

Needs cuda-core and cuda-bindings, and neither TensorRT nor a bundle.
"""

import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from copying_tensorrt import copying_tensorrt

from varedit_runtime.backends.engines.cuda import CudaDevice
from varedit_runtime.backends.engines.device import Launch, address_of
from varedit_runtime.errors import BackendError

SIZE = 2**20  # bytes that are copied at a time
REPEAT = 20


@dataclass
class Rig:
    """A device, an engine on it, and a block of host memory at each end of it.

    run: copies `given` to the GPU, runs the engine, and copies what it wrote to `taken`.
    """

    device: CudaDevice
    given: np.ndarray
    taken: np.ndarray
    run: Launch

    def passes(self, launch: Launch, seed: int) -> None:
        """Raise AssertionError unless a launch brings random bytes through the engine."""
        self.given[:] = np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)
        self.taken[:] = 0
        launch()
        self.device.wait()
        assert np.array_equal(self.taken, self.given), f"other bytes came back (launch {seed})"


def rig() -> Rig:
    device = CudaDevice("tensorrt")
    given, taken = device.allocate_host(SIZE), device.allocate_host(SIZE)
    source, target = device.allocate(SIZE), device.allocate(SIZE)
    engine = device.load("copy", str(SIZE).encode())
    scratch = device.allocate(engine.scratch(0)), engine.scratch(0)
    addresses = {"source": source, "target": target}
    execute = engine.bind(0, {"source": (SIZE,)}, addresses, scratch)

    def run() -> None:
        device.copy(source, address_of(given), SIZE)
        execute()
        device.copy(address_of(taken), target, SIZE)

    return Rig(device, given, taken, run)


def copies() -> None:
    """Bring page-locked memory to the GPU and back; clear memory."""
    made = rig()
    for seed in range(REPEAT):
        made.passes(made.run, seed)
    block = made.device.allocate(SIZE)
    made.device.clear(block, SIZE)
    made.device.copy(address_of(made.taken), block, SIZE)
    made.device.wait()
    assert not made.taken.any()
    made.device.close()


def launches() -> None:
    """Capture a graph of copies and an engine, and launch it again and again, on other data."""
    made = rig()
    made.passes(made.run, 0)
    launch = made.device.capture(made.run)
    for seed in range(1, REPEAT):
        made.passes(launch, seed)
    made.device.close()


def threads() -> None:
    """Launch in another thread, in which no GPU is current."""
    made = rig()
    made.passes(made.run, 0)
    launch = made.device.capture(made.run)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            made.passes(launch, 1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    made.device.close()


def captures_that_fail() -> None:
    """End a capture by an exception; the device works on."""
    made = rig()
    made.passes(made.run, 0)

    def broken() -> None:
        made.run()
        raise ValueError("an error of the caller")

    with suppress(BackendError):
        made.device.capture(broken)
        raise AssertionError("the error was lost")
    made.passes(made.device.capture(made.run), 1)
    made.device.close()


def buffers() -> None:
    """Bring much data over two small buffers, each filled again once the GPU has read it."""
    device = CudaDevice("tensorrt")
    target, back = device.allocate(REPEAT * SIZE), device.allocate_host(REPEAT * SIZE)
    staged = [device.allocate_host(SIZE) for _ in range(2)]
    marks: list[Launch] = []
    for part in range(REPEAT):
        if part >= 2:
            marks[part - 2]()
        staged[part % 2].fill(part)
        device.copy(target + part * SIZE, address_of(staged[part % 2]), SIZE)
        marks.append(device.mark())
    device.copy(address_of(back), target, REPEAT * SIZE)
    device.wait()
    assert np.array_equal(back, np.repeat(np.arange(REPEAT, dtype=np.uint8), SIZE))
    device.close()


def closing() -> None:
    """Close one of two devices: the other works on, and what was closed refuses to run."""
    one, other = rig(), rig()
    for made in (one, other):
        made.passes(made.run, 0)
    launch, kept = one.device.capture(one.run), other.device.capture(other.run)
    one.device.close()
    one.device.close()
    other.passes(kept, 1)
    try:
        launch()
    except BackendError:
        other.device.close()
    else:
        raise AssertionError("what was closed still runs")


def memory() -> None:
    """Allocate memory, which is then missing from what is free, and back after closing."""
    watch, device = CudaDevice("tensorrt"), CudaDevice("tensorrt")
    before = watch.free_memory()
    device.allocate(64 * SIZE)
    assert before - watch.free_memory() >= 64 * SIZE, "the free memory did not shrink"
    device.close()
    assert before - watch.free_memory() < 32 * SIZE, "closing did not free memory"
    watch.close()


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (copies, launches, threads, captures_that_fail, buffers, closing, memory)
}


def main(name: str) -> None:
    """Run one check; print a line of JSON if it holds."""
    sys.modules["tensorrt"] = copying_tensorrt()
    start = perf_counter()
    CHECKS[name]()
    print(json.dumps({"verified": True, "steps": {name: perf_counter() - start}}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

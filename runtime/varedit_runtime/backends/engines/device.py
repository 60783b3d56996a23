"""The interface between the engines' runtime and a GPU, the only place where it touches one.

`cuda.py` implements it on NVIDIA GPUs; tests have one that computes in this machine's memory.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

ALIGNMENT = 256  # bytes; engines refuse tensors at other addresses

Launch = Callable[[], None]


def address_of(array: np.ndarray) -> int:
    """Return the host address of an array's data."""
    return array.__array_interface__["data"][0]


class Engine(Protocol):
    """A loaded engine: a compiled graph that can run."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Inputs and outputs by name: type as in manifests, and shape (-1: set by profiles)."""
        ...

    def scratch(self, profile: int) -> int:
        """Return the bytes of scratch memory that a run in this profile needs."""
        ...

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> Launch:
        """Return a function that runs the engine once, on these GPU addresses.

        shapes: of the inputs. scratch: address and bytes of memory that nothing else uses while it
        runs. Raises BackendError if the engine refuses them.
        """
        ...


class Device(Protocol):
    """One GPU with one queue: work runs in the order of the calls, asynchronously until `wait`.

    `close` frees all memory. Methods raise BackendError when the driver refuses.
    """

    def free_memory(self) -> int:
        """Return the free bytes of GPU memory."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate GPU memory; return its address, which is aligned."""
        ...

    def allocate_host(self, size: int) -> np.ndarray:
        """Allocate page-locked host memory to copy from and to: uint8 [size], aligned."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes between addresses of the GPU and of `allocate_host`."""
        ...

    def copy_runs(self, target: int, source: int, width: int, count: int) -> None:
        """Copy runs of `width` bytes of the GPU, 2·width apart, to one behind the other."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Set bytes of GPU memory to zero."""
        ...

    def load(self, name: str, plan: bytes | bytearray) -> Engine: ...

    def capture(self, record: Launch) -> Launch:
        """Record work; return a function that replays it. Engines must have run once before."""
        ...

    def settle(self) -> None:
        """Keep the kernels that were compiled for the engines, all of which have run once."""
        ...

    def mark(self) -> Launch:
        """Return a function that waits until all work that was submitted so far is done."""
        ...

    def wait(self) -> None:
        """Wait until all work is done."""
        ...

    def close(self) -> None: ...

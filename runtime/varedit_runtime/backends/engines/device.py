"""What the engines' runtime asks of a GPU: the one place where it touches one.

`cuda_device.py` is the real thing; the tests have one that computes in this machine's memory.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

ALIGNMENT = 256  # of every address that an engine is given

Launch = Callable[[], None]


def address_of(array: np.ndarray) -> int:
    """Of memory of the host."""
    return array.__array_interface__["data"][0]


class Engine(Protocol):
    """A compiled graph, loaded."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Its inputs and outputs by name: types as manifests call them, and shapes.

        A length that its profiles set is -1.
        """
        ...

    def scratch(self, profile: int) -> int:
        """Bytes that a run needs for itself."""
        ...

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> Launch:
        """What runs it once, on these addresses.

        shapes: of the inputs. scratch: address and bytes of memory that nothing else uses while it
        runs. Raises BackendError when it does not take them.
        """
        ...


class Device(Protocol):
    """One GPU with one queue of work: what is asked is done in order, later, until `wait`.

    Memory is freed by `close`, all at once. Raises BackendError on whatever the driver refuses.
    """

    def free_memory(self) -> int:
        """Bytes."""
        ...

    def allocate(self, size: int) -> int:
        """The address of memory of the GPU, aligned."""
        ...

    def allocate_host(self, size: int) -> np.ndarray:
        """Memory of the host that the GPU copies from and to: uint8 [size], aligned."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Between addresses of the GPU and of `allocate_host`."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Set memory of the GPU to zeros."""
        ...

    def load(self, name: str, plan: bytes | bytearray) -> Engine: ...

    def capture(self, record: Launch) -> Launch:
        """The work that `record` asks for, not done now but whenever what is returned is called.

        Engines must have run once before.
        """
        ...

    def settle(self) -> None:
        """All engines have run once: keep what was compiled for them."""
        ...

    def wait(self) -> None:
        """Until all work is done."""
        ...

    def close(self) -> None: ...

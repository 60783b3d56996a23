"""Weights that are inputs of engines, on the GPU: one copy of each, whatever engines share it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby

import numpy as np

from varedit_runtime.backends.engines.device import Device, Launch, address_of
from varedit_runtime.backends.engines.memory import distinct, place_inputs
from varedit_runtime.bundle import Bundle, readable
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import StoredWeight

CHUNK = 16 * 2**20  # bytes copied to the GPU at a time


@dataclass
class _Staged:
    """Page-locked memory with a part of a file. copied: waits until the GPU has it."""

    memory: np.ndarray
    copied: Launch = lambda: None


class EngineWeights:
    """The weights of a set of engines. by_stage: where each engine's lie in the bundle's files."""

    def __init__(self, by_stage: Mapping[str, Sequence[StoredWeight]]) -> None:
        self._by_stage = by_stage
        self._distinct = distinct(by_stage)
        self._arena = place_inputs(by_stage)
        self._start = 0
        self._staging: list[_Staged] = []

    @property
    def size(self) -> int:
        """Bytes on the GPU."""
        return self._arena.size

    def lengths(self, stage: str) -> dict[str, int]:
        """Return the bytes of those inputs of an engine that are weights, by name."""
        return {weight.name: weight.length for weight in self._by_stage.get(stage, ())}

    def addresses(self, stage: str) -> dict[str, int]:
        """Return the GPU addresses of those inputs of an engine; `allocate` comes first."""
        return {
            weight.name: self._start + self._arena.offsets[weight.file, weight.offset]
            for weight in self._by_stage.get(stage, ())
        }

    def allocate(self, device: Device, start: int | None = None) -> None:
        """Allocate memory for all weights on the GPU, and for two parts of a file on the host.

        start: where they lie on the GPU, if that is allocated.
        """
        if self._distinct:
            self._start = device.allocate(self.size) if start is None else start
            chunk = min(CHUNK, max(weight.length for weight in self._distinct.values()))
            self._staging = [_Staged(device.allocate_host(chunk)) for _ in range(2)]

    def fill(self, bundle: Bundle, device: Device) -> None:
        """Copy all weights from a bundle, reading one part while the GPU copies the one before.

        The bundle is the set's, or one of the same graphs. Raises BundleError if a file cannot be
        read or ends early, BackendError if the GPU does not copy.
        """
        weights, both = self._distinct.values(), cycle(self._staging)
        chunk = len(self._staging[0].memory) if weights else 0
        device.wait()  # for copies from an attempt that failed
        for name, stored in groupby(weights, key=lambda weight: weight.file):
            file = bundle.hold(name)
            with readable(file.path):
                for weight in stored:
                    target = self._start + self._arena.offsets[name, weight.offset]
                    for done in range(0, weight.length, chunk):
                        staged = next(both)
                        staged.copied()
                        part = staged.memory[: min(chunk, weight.length - done)]
                        if file.read_into(part.data, weight.offset + done) != len(part):
                            raise BundleError(
                                f"{file.path} ends early: copy or build the bundle again"
                            )
                        device.copy(target + done, address_of(part), len(part))
                        staged.copied = device.mark()
        device.wait()

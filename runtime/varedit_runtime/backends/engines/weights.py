"""Weights that are inputs of engines, on the GPU: each once, however many engines share it."""

from collections.abc import Mapping, Sequence

from varedit_runtime.backends.engines.device import Device, address_of
from varedit_runtime.backends.engines.engine_set import EngineWeight
from varedit_runtime.backends.engines.memory import lay_out
from varedit_runtime.bundle import Bundle, Folder, readable
from varedit_runtime.errors import BundleError

CHUNK = 64 * 2**20  # bytes on their way to the GPU

Place = tuple[str, int]  # a file and the offset in it


class Weights:
    """by_stage: where the weights of each engine lie in the bundle's files."""

    def __init__(self, by_stage: Mapping[str, Sequence[EngineWeight]]) -> None:
        self._by_stage = by_stage
        every = [weight for weights in by_stage.values() for weight in weights]
        # In the files' own order, in which they are read; a table may start like one row of it,
        # so that the longest at a place comes last.
        places = sorted((weight.file, weight.offset, weight.length) for weight in every)
        self._lengths: dict[Place, int] = {(file, at): length for file, at, length in places}
        self._arena = lay_out(self._lengths)
        self._start = 0

    @property
    def size(self) -> int:
        """Bytes on the GPU."""
        return self._arena.size

    def lengths(self, stage: str) -> dict[str, int]:
        """Bytes of the inputs of an engine that are weights."""
        return {weight.name: weight.length for weight in self._by_stage.get(stage, ())}

    def addresses(self, stage: str) -> dict[str, int]:
        """Of the inputs of an engine that are weights, once they are filled."""
        return {
            weight.name: self._start + self._arena.offsets[weight.file, weight.offset]
            for weight in self._by_stage.get(stage, ())
        }

    def fill(self, bundle: Bundle, device: Device) -> None:
        """Read them from the bundle. Raises BundleError when a file ends early."""
        if not self._lengths:
            return
        self._start = device.allocate(self.size)
        staged = device.allocate_host(min(CHUNK, max(self._lengths.values())))
        folder = Folder(bundle.path, bundle.manifest.files)
        for file in dict.fromkeys(file for file, _ in self._lengths):
            path = folder.locate(file)
            with readable(path), open(path, "rb") as stream:
                for (own, offset), length in self._lengths.items():
                    if own != file:
                        continue
                    stream.seek(offset)
                    target = self._start + self._arena.offsets[file, offset]
                    for done in range(0, length, len(staged)):
                        part = staged[: min(len(staged), length - done)]
                        if stream.readinto(part.data) != len(part):
                            raise BundleError(f"{path} ends early: copy or build the bundle again")
                        device.copy(target + done, address_of(staged), len(part))
                        device.wait()  # before the next part takes its place

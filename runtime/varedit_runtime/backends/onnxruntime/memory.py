"""The memory that editing takes on a CPU, told before a bundle is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from varedit_runtime.backends.wiring import CACHE, TEXT, values_of, wire
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import readable_size
from varedit_runtime.geometry import source_grid
from varedit_runtime.manifest import Variant, weights_file

# Measured on ONNX Runtime 1.32, of 125m in fp32 and 2b in int8: bytes that the image decoder takes
# for a pixel, and fp32 arrays of the last scale's attention, of all heads.
DECODED = 1200
SCORES = 2.5


@dataclass(frozen=True)
class HostBudget:
    """Bytes of memory that an editor on a CPU takes beside the program, by use.

    text: the text encoder's weights. weights: all others. between: tensors between graphs.
    activations: of the graph that takes most, an estimate.
    """

    text: int
    weights: int
    caches: int
    between: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.text + self._running

    @property
    def offloaded(self) -> int:
        """The total with `--offload text`, which never holds the text encoder beside the caches."""
        return self.weights + max(self.text, self._running)

    @property
    def _running(self) -> int:
        return self.caches + self.between + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "text encoder": self.text, "caches": self.caches}
        parts |= {"between graphs": self.between, "activations": self.activations}
        listed = ", ".join(f"{readable_size(size)} {name}" for name, size in parts.items())
        return (
            f"{readable_size(self.total)} of memory ({listed}), and the program; "
            f"{readable_size(self.offloaded)} with --offload text"
        )


def host_budget(bundle: Bundle, variant: Variant) -> HostBudget:
    """Return what editing with a variant takes on a CPU, which holds 16-bit weights in fp32."""
    manifest, model = bundle.manifest, bundle.manifest.model
    growth = manifest.policy.cpu_growth
    sizes = {name: manifest.files[weights_file(name)].size for name in bundle.components}
    text = sizes.pop(TEXT, 0)
    values = values_of(wire(variant, model, symbolic=True))
    caches = sum(view.size for name, view in values.items() if name.startswith(CACHE))
    between = sum(view.size for view in values.values()) - caches
    lengths = [height * width for height, width in variant.grids]
    return HostBudget(
        text * growth,
        sum(sizes.values()) * growth,
        caches,
        between,
        activations(
            variant.batch,
            variant.rows,
            model.heads,
            prod(source_grid(variant.grids, model.conditioning)),
            lengths,
            variant.picture,
        ),
    )


def activations(
    batch: int,
    rows: int,
    heads: int,
    source: int,
    lengths: Sequence[int],
    picture: tuple[int, int],
) -> int:
    """Return the bytes that the hungriest graph takes while it runs.

    It is the last scale, the prefill of a source of all scales, or the image decoder. source: its
    tokens. lengths: the tokens of each scale. picture: height and width in pixels.
    """
    pairs = max(lengths[-1] * (source + sum(lengths)), source**2)
    scores = rows * heads * pairs * 4
    return int(max(SCORES * scores, DECODED * batch * picture[0] * picture[1]))

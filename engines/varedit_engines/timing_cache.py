"""A cache of what TensorRT measured while it chose kernels, which makes later compilations faster.

It is not used for TensorRT for RTX: that measures nothing when it compiles, and the calls below,
which it has deprecated, would only make it need a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from varedit_runtime.files import keep, plain_name, read_kept
from varedit_runtime.locate import cache_folder


def timings_file(version: str, gpu: str) -> Path:
    """Return the file of the timings of a version of TensorRT on a model of GPU."""
    return cache_folder() / "timings" / plain_name(f"tensorrt-{version}-{gpu}")


@contextmanager
def kept_timings(config: Any, path: Path) -> Iterator[None]:
    """Around a build with this builder config: it starts from a file's timings and adds its own.

    A file that is damaged, of another GPU or that cannot be read counts for none; where it cannot
    be written, nothing is kept. Of two builds at once both add to it; only where they end at the
    same moment, one's timings are lost.
    """
    timings = config.create_timing_cache(read_kept(path))
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    yield
    others = config.create_timing_cache(read_kept(path))  # what another build has added since
    if others is not None:
        timings.combine(others, ignore_mismatch=False)
    keep(path, bytes(timings.serialize()))

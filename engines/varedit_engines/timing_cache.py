"""A cache of what TensorRT measured while it chose kernels, which makes later compilations faster.

It is not used for TensorRT for RTX: that measures nothing when it compiles, and the calls below,
which it has deprecated, would only make it need a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from varedit_runtime.files import keep, plain_name, read_kept
from varedit_runtime.locate import cache_folder


def timings_file(version: str, gpu: str) -> Path:
    """Return the file of the timings of a version of TensorRT on a model of GPU."""
    return cache_folder() / "timings" / plain_name(f"tensorrt-{version}-{gpu}")


@contextmanager
def kept_timings(config: Any, path: Path) -> Iterator[None]:
    """Start a build with this builder config from the timings in a file, and add its own to them.

    A file that is damaged, of another GPU or that cannot be read counts for none; where it cannot
    be written, nothing is kept. Builds that run at once all add their timings.
    """
    timings = config.create_timing_cache(read_kept(path))
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    yield
    with suppress(OSError, NotImplementedError):  # a folder without writing, or without locks
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            others = config.create_timing_cache(read_kept(path))  # another build may have added
            if others is not None:
                timings.combine(others, ignore_mismatch=False)
            keep(path, bytes(timings.serialize()))

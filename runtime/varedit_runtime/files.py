"""Write files whole or not at all, and keep files that only save time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory


def plain_name(text: str) -> str:
    """Return a text as it can stand in a file's name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; rename it to `path` on success, delete it on any failure.

    It lies in a new folder beside `path`: nobody else knows its name, so no link planted under
    that name can be written through, and two writers never share it. Raises OSError.
    """
    with TemporaryDirectory(prefix=".", dir=path.parent, ignore_cleanup_errors=True) as folder:
        whole = Path(folder, path.name)
        yield whole
        whole.replace(path)


def read_kept(path: Path) -> bytes:
    """Return the bytes of a file, none where it cannot be read."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def keep(path: Path, data: bytes) -> None:
    """Write a file that only saves time: where that fails, nothing is kept and nothing raised."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as whole:
            whole.write_bytes(data)

"""Files that only save time: what cannot be read counts for none, and what cannot be written is
not kept."""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory


def plain_name(text: str) -> str:
    """A text as part of a file's name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


def read_kept(path: Path) -> bytes:
    """Empty when there is nothing."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_bytes(data)
            whole.replace(path)

"""Say what a download takes, and ask before it begins."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from varedit_export.weights import hub
from varedit_export.weights.hub import Wanted
from varedit_runtime.errors import CheckpointError, printable, readable_size
from varedit_runtime.files import free_space, same_disk


@dataclass(frozen=True)
class Further:
    """What is made of downloaded weights. folder: where. size: its bytes. needs: for people."""

    folder: Path
    size: int
    needs: str


@dataclass(frozen=True)
class Download:
    """Files that are needed from the hub, before anything is downloaded.

    further: what will be made of them, if that is known.
    """

    wanted: tuple[Wanted, ...]
    further: Further | None = None

    @property
    def size(self) -> int:
        """Return the bytes that are not in the cache yet."""
        return sum(one.missing for one in self.wanted)

    @property
    def free(self) -> int:
        """Return the free bytes of the disk that the hub's cache is on."""
        return free_space(hub.cache())

    @property
    def fits(self) -> bool:
        """Return whether there is room for the files, and for what is made of them."""
        later = self.further
        if later is None:
            return self.size <= self.free
        if same_disk(hub.cache(), later.folder):
            return self.size + later.size <= self.free
        return self.size <= self.free and later.size <= free_space(later.folder)

    def __str__(self) -> str:
        """Return the lines that a person reads before saying yes."""
        free = f"{readable_size(self.free)} are free in {hub.cache()}"
        lines = [f"{readable_size(self.size)} to download; {free}"]
        lines += (
            f"  {one.address}: {readable_size(one.missing)}, "
            f"licence {(one.licence or 'not stated')[:80]}"
            for one in self.wanted
        )
        if later := self.further:
            free = f"{readable_size(free_space(later.folder))} are free in {later.folder}"
            lines.append(f"  then {later.needs}; {free}")
        return "\n".join(map(printable, lines))


def ask(
    wanted: Iterable[Wanted],
    accept: Callable[[Download], None],
    further: Callable[[], Further | None] = lambda: None,
) -> None:
    """Have the download of what is not in the cache yet accepted, if there is any.

    accept: raises to refuse. further: called before that; returns what will be made of the files.
    Raises CheckpointError if the disk has no room for all.
    """
    if missing := tuple(one for one in wanted if not one.cached):
        download = Download(missing, further())
        if not download.fits:
            raise CheckpointError(f"the disk has no room: {download}")
        accept(download)

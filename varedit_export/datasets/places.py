"""Bring a benchmark's data and the weights of metrics: folders, or repositories on the hub."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from varedit_export.weights import hub
from varedit_export.weights.download import Download, ask
from varedit_export.weights.hub import SCHEME, HubAddress, Wanted
from varedit_runtime.errors import CheckpointError, ConfigError

Files = Sequence[Sequence[str]]


def bring_folders(
    places: Mapping[str, tuple[str, Files]], accept: Callable[[Download], None]
) -> dict[str, Path]:
    """Download what is on the hub; return where all is on this machine.

    places: by name, a folder or an address, and the choices of files that are taken of a
    repository. accept: called before anything is downloaded, if anything has to be; it raises to
    refuse. Raises ConfigError if there is no such folder, CheckpointError if a download fails.
    """
    found = {name: Path(place) for name, (place, _) in places.items()}
    wanted = dict[str, Wanted]()
    for name, (place, files) in places.items():
        if place.startswith(SCHEME):
            address = hub.parse(place)
            with _option_told(name):
                wanted[name] = hub.look_up(address, _within(address, files))
    ask(wanted.values(), accept)
    for name, one in wanted.items():
        with _option_told(name):
            found[name] = hub.fetch(one)[0]
    for name, folder in found.items():
        if not folder.is_dir():
            raise ConfigError(f"{name}: there is no folder {folder}")
    return found


@contextmanager
def _option_told(name: str) -> Iterator[None]:
    """Say in an error about a repository which option gives a folder in its place."""
    try:
        yield
    except CheckpointError as error:
        option = "--data FOLDER" if name == "--data" else f"--weights {name}=FOLDER"
        error.args = (f"{error}; a folder on this machine is given with {option}",)
        raise


def _within(address: HubAddress, files: Files) -> list[list[str]]:
    """Return choices of files as patterns in the address's own folder."""
    inside = f"{escape(address.path)}/" if address.path else ""
    return [[inside + pattern for pattern in choice] for choice in files]

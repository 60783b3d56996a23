"""Where bundles are kept, and which of them `varedit-run` uses."""

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from varedit_runtime.bundle import standing_folder
from varedit_runtime.errors import BundleError
from varedit_runtime.files import atomic_file, read_kept

VARIABLE = "VAREDIT_BUNDLE"
RECORD = "last-built"  # the file that names the last bundle built

_APP = "varedit-export"


@dataclass(frozen=True)
class Found:
    """The bundle to use. path: its folder. why: a phrase that says how it was chosen."""

    path: Path
    why: str


def data_folder() -> Path:
    """Return the folder of this user's bundles and of records about them."""
    return user_data_path(_APP)


def cache_folder() -> Path:
    """Return the folder of files that can be made again, such as compiled engines."""
    return user_cache_path(_APP)


def default_root() -> Path:
    """Return the folder that bundles are built into when no other is named."""
    return data_folder() / "bundles"


def embedded() -> Path:
    """Return the folder of nano's bundle, which is installed with this package."""
    return Path(__file__).with_name("nano")


def remember(path: Path, unfit: str | None = None) -> None:
    """Record a bundle as the last one built, which makes it the default.

    unfit: why it must not become the default. Raises BundleError if there is such a reason, or if
    the record cannot be written.
    """
    record, place = data_folder() / RECORD, Path(os.path.abspath(path))
    try:
        if unfit is None:
            record.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(record) as whole:
                whole.write_bytes(os.fsencode(place))
        elif _last_built() == place:  # it has taken the place of one that was fit
            record.unlink()
    except OSError as error:
        unfit = f"{record} cannot be written, {error.strerror}"
    if unfit is not None:
        raise BundleError(
            f"{path} does not become varedit-run's default ({unfit}): name it with --bundle or "
            f"{VARIABLE}"
        )


def find_bundle(explicit: Path | None) -> Found:
    """Return the bundle to use: that named, the environment's, the last one built, or nano's.

    The folder may not exist; opening it then says what is wrong.
    """
    if explicit is not None:
        return Found(explicit, "named by --bundle")
    if named := os.environ.get(VARIABLE):
        return Found(Path(named), f"named by the environment variable {VARIABLE}")
    last = _last_built()
    if last and os.path.exists(standing_folder(last)):
        return Found(last, "the last one built")
    reason = f"the last one built, {last}, is gone" if last else "no bundle was named or built"
    nano = "the embedded nano, a small demonstration model for drawn scenes"
    return Found(embedded(), f"{nano}, as {reason}")


def _last_built() -> Path | None:
    recorded = os.fsdecode(read_kept(data_folder() / RECORD))
    return Path(recorded) if recorded else None

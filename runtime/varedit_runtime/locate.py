"""Where bundles are kept, how users name them, and which one `varedit-run` uses.

The record of the default holds one path and is replaced whole, so of two programs that choose at
once the later one is obeyed.
"""

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from varedit_runtime.bundle import Bundle, standing_folder
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.files import atomic_file, same_file
from varedit_runtime.manifest import MANIFEST

VARIABLE = "VAREDIT_BUNDLE"
RECORD = "default-bundle"  # the file that names the default
NANO = "nano"  # the name of the embedded bundle, and of no other
CHOICES = "`varedit-run bundles --set NAME` chooses another one, `--clear` nano"

_APP = "varedit-export"
_DESCRIBED = "the embedded nano, a small demonstration model for drawn scenes"


@dataclass(frozen=True)
class Found:
    """The bundle to use. path: its folder. why: a phrase that says how it was chosen."""

    path: Path
    why: str


def data_folder() -> Path:
    """Return the folder of this user's bundles and of records about them."""
    return _of_user(user_data_path, "data")


def cache_folder() -> Path:
    """Return the folder of files that can be made again, such as compiled engines."""
    return _of_user(user_cache_path, "cache")


def _of_user(find: Callable[[str], Path], name: str) -> Path:
    """Return a folder as an absolute path: below / for a user without a home, as in containers."""
    with suppress(RuntimeError):  # raised, or "~" left as it is, where there is no home
        folder = find(_APP)
        if folder.parts[0] != "~":
            return folder.absolute()
    return Path("/", f".{_APP}", name)


def default_root() -> Path:
    """Return the folder that bundles are built into when no other is named."""
    return data_folder() / "bundles"


def embedded() -> Path:
    """Return the folder of nano's bundle, which is installed with this package."""
    return Path(__file__).with_name("nano")


def own_bundles() -> list[Path]:
    """Return the folders of the user's own bundles, by name; none where they cannot be read."""
    names = set[str]()
    with suppress(OSError):
        names = {entry.name for entry in default_root().iterdir()}
    # Of a bundle whose replacement was interrupted, only the work folder is there.
    names |= {name.removeprefix(".").removesuffix(".partial") for name in names}
    return [default_root() / name for name in sorted(names) if _is_own(name)]


def named(text: str) -> Path:
    """Return the folder of the bundle that a user names.

    It is the embedded bundle for `nano`, one of the user's own for its name, and else the path.
    Raises ConfigError if the name is also that of another bundle in the working folder.
    """
    if text == NANO:
        return embedded()
    own, path = default_root() / text, Path(text)
    if path.name != text or not _is_own(text):
        return path
    if _is_bundle(path) and not same_file(path, own):
        raise ConfigError(
            f"{text} is one of your bundles and also a folder here: write ./{text} or {own}"
        )
    return own


def label(path: Path) -> str:
    """Return the shortest text that `named` turns into a bundle's folder."""
    path = Path(os.path.abspath(path))
    if path == embedded():
        return NANO
    own = path.parent == default_root() and path.name != NANO and _is_own(path.name)
    return path.name if own else str(path)


def _is_own(name: str) -> bool:
    return not name.startswith(".") and _is_bundle(default_root() / name)


def _is_bundle(path: Path) -> bool:
    return os.path.exists(standing_folder(path) / MANIFEST)


def find_bundle(explicit: Path | None) -> Found:
    """Return the bundle to use: that named, the environment's, the user's default, or nano's.

    The folder of one that is named may not exist; opening it then says what is wrong. Raises
    BundleError if the default, or the record of it, is damaged, or the default is gone or no longer
    fit for editing: no other model takes its place unasked.
    """
    if explicit is not None:
        return Found(explicit, "named by --bundle")
    if text := os.environ.get(VARIABLE):
        return Found(named(text), f"named by the environment variable {VARIABLE}")
    return _default()


def _default() -> Found:
    default = default_bundle()
    if default is None:
        return Found(embedded(), f"{_DESCRIBED}, as no other was named or chosen")
    if not os.path.exists(standing_folder(default)):
        raise BundleError(f"your default bundle, {default}, is gone: {CHOICES}")
    if unfit := Bundle.open(default).manifest.unfit:
        raise BundleError(
            f"your default bundle, {default}, is unfit for editing, {unfit}: {CHOICES}"
        )
    return Found(default, "your default")


def default_bundle() -> Path | None:
    """Return the bundle that the user chose as the default; None for nano.

    Raises BundleError if the record of it cannot be read or is damaged.
    """
    record = data_folder() / RECORD
    try:
        path = Path(os.fsdecode(record.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(
            f"the record of your default, {record}, cannot be read ({error.strerror}): name "
            f"bundles with --bundle or {VARIABLE}"
        ) from error
    if not path.is_absolute() or "\0" in str(path):
        raise BundleError(f"the record of your default, {record}, is damaged: {CHOICES}")
    return path


def choose_default(path: Path | None) -> str:
    """Make a bundle the default of `varedit-run`, None for nano; return what tells the user so.

    Raises BundleError if the bundle cannot be opened or is unfit for editing, or if the record
    cannot be written.
    """
    chosen = embedded() if path is None else path
    name = NANO if same_file(chosen, embedded()) else label(chosen)
    previous = None
    with suppress(BundleError):  # there is none that could be chosen again
        previous = _default().path
    record = data_folder() / RECORD
    try:
        if name == NANO:
            record.unlink(missing_ok=True)
        else:
            _write(record, chosen)
    except OSError as error:
        raise BundleError(
            f"{record} cannot be written ({error.strerror}): name bundles with --bundle or "
            f"{VARIABLE}"
        ) from error
    if previous is not None and same_file(previous, chosen):
        return f"{name} is varedit-run's default"
    told = f"varedit-run now uses {name} by default"
    if previous is None:
        return told
    undo = "--clear" if previous == embedded() else f"--set {shlex.quote(label(previous))}"
    return f"{told}; undo: varedit-run bundles {undo}"


def _write(record: Path, bundle: Path) -> None:
    if unfit := Bundle.open(bundle).manifest.unfit:
        raise BundleError(
            f"{bundle} cannot become varedit-run's default, {unfit}: name it with --bundle"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(record) as whole:
        whole.write_bytes(os.fsencode(os.path.abspath(bundle)))

"""List a user's bundles, and choose the default: `varedit-run bundles`."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from varedit_runtime.errors import BundleError, ConfigError, VareditError, printable, readable_size
from varedit_runtime.terminal.command import BUNDLE, debug_option, say

if TYPE_CHECKING:
    from varedit_runtime.manifest import Variant

_HEADINGS = ("", "name", "model", "resolution", "precision", "size", "can edit", "folder")


@dataclass(frozen=True)
class Listed:
    """A bundle in the list.

    default: whether it is used where none is named. size: bytes of all files, engines included.
    unfit: why it is not for editing pictures. What a damaged bundle does not tell is None.
    """

    name: str
    path: str
    default: bool
    can_edit: bool
    unfit: str | None
    size: int
    model: str | None = None
    resolutions: tuple[str, ...] | None = None
    precision: str | None = None
    digest: str | None = None


@click.command()
@click.option(
    "--set", "chosen", type=BUNDLE, metavar="NAME|PATH", help="Make this bundle the default."
)
@click.option("--clear", is_flag=True, help="Make nano the default again.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@debug_option
def bundles(chosen: Path | None, clear: bool, as_json: bool) -> None:
    """List your bundles and nano; `*` marks the default, which is used where none is named.

    `varedit-export build` makes a bundle that it builds among yours the default, if it can edit.

    \b
    varedit-run bundles
    varedit-run bundles --set 8b-512
    """
    from varedit_runtime.locate import choose_default, find_bundle

    if chosen and clear:
        raise ConfigError("--set and --clear contradict each other: give one of them")
    if chosen or clear:
        say(choose_default(chosen))
    listed = list(_listed())
    try:
        found = find_bundle(None)
        used, why = str(found.path), found.why
    except VareditError as error:
        used, why = None, str(error)
    if as_json:
        told = {"used": used, "why": why, "bundles": list(map(asdict, listed))}
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(_table(listed))
        say(f"varedit-run uses {used} ({why})" if used else why)


def _listed() -> Iterator[Listed]:
    """Yield nano, the user's own bundles, and the default if it is another one."""
    from varedit_runtime.files import same_file
    from varedit_runtime.locate import default_bundle, embedded, own_bundles

    places, default = [embedded(), *own_bundles()], None
    with suppress(BundleError):  # `find_bundle` tells it
        default = default_bundle() or embedded()
        if default not in places:  # by its own name; it may be one of them through a link
            default = next((path for path in places if same_file(path, default)), default)
            places = list(dict.fromkeys([*places, default]))
    for path in places:
        yield _described(path, path == default)


def _described(path: Path, default: bool) -> Listed:
    from varedit_runtime.bundle import Bundle, standing_folder
    from varedit_runtime.locate import label

    name, place, size = label(path), str(path), _size(standing_folder(path))
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return Listed(name, place, default, can_edit=False, unfit=str(error), size=size)
    manifest = bundle.manifest
    return Listed(
        name,
        place,
        default,
        can_edit=manifest.unfit is None,
        unfit=manifest.unfit,
        size=size,
        model=manifest.model.size,
        resolutions=tuple(dict.fromkeys(_resolution(one) for one in manifest.variants)),
        precision=manifest.precision,
        digest=bundle.digest,
    )


def _resolution(variant: "Variant") -> str:
    height, width = variant.picture
    return str(height) if height == width else f"{height}x{width}"


def _size(path: Path) -> int:
    """Return the bytes of all files below a folder, 0 for those that cannot be asked."""
    size = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(folder, file)).st_size
    return size


def _table(listed: Iterable[Listed]) -> str:
    rows = [_HEADINGS, *map(_row, listed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(one: Listed) -> tuple[str, ...]:
    return (
        "*" if one.default else "",
        printable(one.name),
        one.model or "?",
        ",".join(one.resolutions or "?"),
        one.precision or "?",
        readable_size(one.size),
        "yes" if one.can_edit else f"no: {one.unfit}",
        printable(one.path),
    )

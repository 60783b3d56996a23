"""The `varedit-serve` command."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.errors import ConfigError, needs_extra, shown
from varedit_runtime.terminal.command import (
    BUNDLE,
    PATH,
    BackendCommand,
    OneLineErrors,
    backend_option,
    debug_option,
    say,
    variant_option,
)
from varedit_serve.keys import VARIABLE, read_keys
from varedit_serve.limits import Limits, option

if TYPE_CHECKING:
    from varedit_serve.editing.messages import Opening
    from varedit_serve.editing.queue import Lane, Queue
    from varedit_serve.server import Keeper

    Feeding = tuple[Sequence[Keeper], Sequence[Lane]]  # what keeps processes running; what they do

LOCAL = ("localhost", "127.0.0.1", "::1")


class ServeCommand(OneLineErrors, BackendCommand):
    """The command, which fails as the others do."""


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each limit."""
    for limit in reversed(fields(Limits)):
        command = click.option(
            option(limit.name),
            type=float if isinstance(limit.default, float) else int,
            default=limit.default,
            show_default=True,
            help=limit.metadata["help"],
        )(command)
    return command


@click.command(cls=ServeCommand)
@click.version_option(package_name="varedit-export")
@click.argument("bundle", type=BUNDLE)
@variant_option
@backend_option()
@click.option("--digest", help="Serve no bundle but that of this digest, and hash all its files.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="Port; 0 for any that is free.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes that edit; they have this machine's cores and GPUs between them.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    callback=lambda context, option, text: None if text is None else _address(text),
    help="Serve /metrics there, without a key, and not at the main address.",
)
@click.option("--ray", is_flag=True, help="Edit on the Ray cluster of RAY_ADDRESS, or a new one.")
@click.option(
    "--max-workers",
    type=click.IntRange(1, 4096),
    help="With --ray: start up to so many processes while the others are busy.",
)
@click.option("--keys", type=PATH, help="File of API keys: NAME KEY [RATE] on each line.")
@click.option("--name", help="The model's name for clients; by default the bundle's.")
@click.option(
    "--batch",
    type=int,
    help="Most pictures of a batch; by default 1 on a CPU.",
)
@click.option("--allow-host", multiple=True, help="A name of this server; repeatable.")
@click.option("--allow-origin", multiple=True, help="Another site with pages; repeatable.")
@click.option("--moderation", metavar="MODULE:OBJECT", help="Code that judges; see the docs.")
@click.option(
    "--c2pa",
    type=(PATH, PATH),
    metavar="CERTIFICATES KEY",
    help="Sign each picture as edited by a model, with a chain and its key, in PEM.",
)
@_limits
@debug_option
def main(
    bundle: Path,
    variant: str | None,
    backend: ChosenBackend | AutoBackend,
    digest: str | None,
    host: str,
    port: int,
    workers: int,
    metrics: tuple[str, int] | None,
    ray: bool,
    max_workers: int | None,
    **options: Any,
) -> None:
    """Serve edits with BUNDLE, as OpenAI's images API does, and a page to make them.

    \b
    varedit-serve nano
    varedit-serve bundles/2b-512 --port 9000 --backend tensorrt
    varedit-serve bundles/2b-512 --host 0.0.0.0 --keys keys.txt --allow-host edits.example.org

    It listens at this machine alone unless there are API keys, from --keys or the environment
    variable VAREDIT_SERVE_KEYS. A KEY has at least 16 characters, or is sha256: and its digest.
    RATE is how many results a minute. SIGTERM or Ctrl-C lets admitted edits finish; a second one
    does not. docs/serving.md says more.
    """
    chosen = settings_of(host, **options)
    _check_workers(ray, workers, max_workers)

    from varedit_runtime import Preparer

    preparer = Preparer.open(bundle, variant=variant, digest=digest)
    _check_batch(chosen["largest"], preparer.variant.batch)
    with needs_extra("serve"):
        from varedit_serve import server
        from varedit_serve.app import Application, Settings
    from varedit_serve.editing.messages import Opening

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("varedit_serve").setLevel(logging.INFO)
    application = Application(preparer, Settings(own_metrics=metrics is not None, **chosen))
    opening = Opening(bundle, variant, backend, digest)
    given = opening, preparer.bundle.digest, workers, max_workers, ray
    with server.listen(host, port) as listening, _feeding(application.queue, *given) as feeding:
        shown = f"[{host}]" if ":" in host else host
        at = f"http://{shown}:{listening.getsockname()[1]}"
        say(f"{application.model} is loaded, and then served at {at}")
        if metrics is not None:
            at = server.serve_numbers(application, *metrics, chosen["limits"])
            say(f"its numbers are served at {metrics[0]}, port {at}")
        server.serve(application, *feeding, listening, chosen["limits"])


@contextmanager
def _feeding(
    queue: "Queue", opening: "Opening", digest: str, workers: int, most: int | None, ray: bool
) -> Iterator["Feeding"]:
    """Yield what edits: processes of this machine, or of a Ray cluster, which it joins."""
    if not ray:
        from varedit_serve.editing.workers import local_children

        children = local_children(opening, queue, workers)
        yield children, children
        return
    from varedit_runtime.terminal.ray_cluster import cluster, threads_of

    with cluster(least=workers * threads_of(opening.backend)):
        from varedit_serve.editing.replicas import fleet

        with fleet(queue, opening, digest, workers, most) as feeding:
            yield feeding


def _check_workers(ray: bool, least: int, most: int | None) -> None:
    if most is not None and (not ray or most < least):
        raise ConfigError("--max-workers is for --ray, and at least as many as --workers")


def settings_of(
    host: str,
    keys: Path | None,
    name: str | None,
    batch: int | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    moderation: str | None,
    c2pa: tuple[Path, Path] | None,
    **options: Any,
) -> dict[str, Any]:
    """Return the Settings that options stand for, by name. Raises ConfigError."""
    limits = Limits(**{limit.name: options[limit.name] for limit in fields(Limits)})
    known = read_keys(keys, os.environ.get(VARIABLE, ""))
    if host not in LOCAL and not known:
        raise ConfigError(f"others can reach {host}: give API keys, with --keys or {VARIABLE}")
    chosen: dict[str, Any] = {"model": name, "keys": known, "largest": batch, "limits": limits}
    if name == "":
        raise ConfigError("--name is empty; give the model's name for clients")
    chosen["hosts"] = {*LOCAL, *allow_host} if host in LOCAL or allow_host else None
    for own in allow_host:
        if urlsplit(f"//{own}").hostname != own.lower():
            raise ConfigError(f"--allow-host is {shown(own)}; give a name alone: edits.example.org")
    chosen["origins"] = [origin.rstrip("/").lower() for origin in allow_origin]
    for origin in chosen["origins"]:
        scheme, _, rest = origin.partition("://")
        if scheme not in ("http", "https") or not rest or urlsplit(origin).netloc != rest:
            raise ConfigError(f"--allow-origin is {shown(origin)}; give https://app.example")
    if moderation is not None:
        from varedit_serve.answering.moderation import find_moderation

        chosen["moderation"] = find_moderation(moderation)
    if c2pa is not None:
        with needs_extra("c2pa"):
            from varedit_serve.answering.provenance import Provenance
        chosen["sign"] = Provenance(*c2pa).sign
    return chosen


def _check_batch(batch: int | None, most: int) -> None:
    if batch is not None and not 1 <= batch <= most:
        raise ConfigError(f"--batch is {batch}; the bundle takes 1 to {most}")


def _address(text: str) -> tuple[str, int]:
    """Return host and port of [HOST:]PORT. Raises ConfigError."""
    try:
        parts = urlsplit(f"//127.0.0.1:{text}" if text.isdecimal() else f"//{text}")
        if parts.hostname and parts.port is not None and parts.netloc == parts.geturl()[2:]:
            return parts.hostname, parts.port
    except ValueError:  # an odd IPv6 address, or port
        pass
    raise ConfigError(f"--metrics is {shown(text)}; give PORT, or HOST:PORT")


if __name__ == "__main__":
    main()

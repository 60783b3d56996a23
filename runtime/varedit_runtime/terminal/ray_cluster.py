"""Connect to a Ray cluster, or start one on this machine that nobody else can use."""

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from varedit_runtime.backends import ChosenBackend
from varedit_runtime.backends.auto import AutoBackend
from varedit_runtime.backends.host import cores
from varedit_runtime.backends.onnxruntime.memory import host_budget
from varedit_runtime.errors import BackendError, needs_extra, reason, shown

if TYPE_CHECKING:
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.manifest import Variant

_CHOOSE = "choose another --backend, or fewer --threads"
RETRIES = 3  # of a batch whose process dies; then it is taken to be the reason
DIED = f"died {RETRIES + 1} times"
STORE_BYTES = 500_000_000  # of objects that pass between processes of a cluster of our own


@contextmanager
def cluster(least: int) -> Iterator[None]:
    """Be connected to the Ray cluster that RAY_ADDRESS names, or else to a new one.

    A new one is bound to this machine, asks for a token, and ends with the block, its files too.
    least: how many cores it counts even if the machine has fewer, as nothing would begin else.
    Raises MissingExtraError without the extra ray, BackendError if there is no connection.
    """
    given = {"RAY_USAGE_STATS_ENABLED": "0"}  # nothing is told to others
    if not (address := os.environ.get("RAY_ADDRESS")):
        given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Listen at 127.0.0.1 alone, as Ray does on systems where it builds no clusters.
        given |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    os.environ |= given  # which Ray reads when it is imported
    with needs_extra("ray"):
        import ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        if not address:
            options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
            options |= {"_temp_dir": folder, "num_cpus": max(cores(), least)}
        try:
            ray.init(address or "local", **options)
        except (
            Exception
        ) as error:  # Ray has no type of its own for all that can keep it from starting
            where = f"at RAY_ADDRESS, {shown(address)}" if address else "on this machine"
            raise BackendError(f"no Ray cluster can be used {where}: {reason(error)}") from error
        try:
            yield
        finally:
            with redirect_stdout(sys.stderr):  # it tells of earlier faults
                ray.shutdown()


def resources(backend: ChosenBackend | AutoBackend) -> dict[str, float]:
    """Return what Ray shall give a process that edits: cores for its threads, or a GPU too.

    Where the backend is chosen when a bundle is opened, that is a GPU if the cluster has any.
    """
    import ray

    if isinstance(backend, AutoBackend):
        on_gpu = "GPU" in ray.cluster_resources()
    else:
        on_gpu = vars(backend.options).get("provider") != "cpu"
    return {"num_cpus": threads_of(backend), "num_gpus": float(on_gpu)}


def threads_of(backend: ChosenBackend | AutoBackend) -> int:
    """Return how many threads of the CPU a process that edits has on Ray."""
    return 1 if isinstance(backend, AutoBackend) else vars(backend.options).get("threads") or 1


def most_editors(
    bundle: "Bundle", variant: "Variant", given: Mapping[str, float], spare: float = 0
) -> int:
    """Return how many processes that edit the cluster has room for.

    given: to each, as `resources` says. spare: cores that others need. Raises BackendError if there
    is room for none: Ray would wait for a machine without end.
    """
    import ray

    check_room(given, spare)
    there = ray.cluster_resources()
    if given["num_gpus"]:
        return int(there["GPU"])
    by_memory = there["memory"] // host_budget(bundle, variant).total
    return max(1, min(int((there["CPU"] - spare) // given["num_cpus"]), int(by_memory)))


def check_room(given: Mapping[str, float], spare: float = 0) -> None:
    """Raise BackendError if the cluster has no room for one process that edits.

    Its cores and its GPU must be of one machine; spare: cores of any, which others need.
    """
    import ray

    there = ray.cluster_resources()
    for what, needed in (("CPU", given["num_cpus"] + spare), ("GPU", given["num_gpus"])):
        if needed > there.get(what, 0):
            raise BackendError(
                f"the Ray cluster has {there.get(what, 0):g} {what}, and editing takes {needed:g}: "
                + _CHOOSE
            )
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": given["num_cpus"], "GPU": given["num_gpus"]}
    if not any(all(one.get(w, 0) >= n for w, n in wanted.items()) for one in machines):
        told = " and ".join(f"{needed:g} {what}" for what, needed in wanted.items())
        raise BackendError(
            f"no machine of the Ray cluster has {told}, which editing takes together: {_CHOOSE}"
        )

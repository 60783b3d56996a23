"""Clusters of Ray without room for an editing process: they are told of, not waited for."""

import asyncio

import pytest
from serving import served

from varedit_runtime import Editor
from varedit_runtime.backends.auto import wanted_backend
from varedit_runtime.errors import BackendError
from varedit_runtime.locate import embedded
from varedit_runtime.terminal.ray_cluster import most_editors
from varedit_serve.editing.messages import Opening

pytest.importorskip("ray", reason="the extra ray is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


@pytest.mark.parametrize(
    ("given", "spare", "told"),
    [
        ({"num_cpus": 1, "num_gpus": 1}, 0, "has 0 GPU, and editing takes 1"),
        ({"num_cpus": 3, "num_gpus": 0}, 1, "has 3 CPU, and editing takes 4"),
        ({"num_cpus": 3, "num_gpus": 0}, 0, "no machine of the Ray cluster has 3 CPU and 0 GPU"),
    ],
)
def test_a_cluster_without_room_is_told(
    given: dict[str, float], spare: int, told: str, nano: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [("CPU", 2.0, True), ("CPU", 1.0, True), ("GPU", 1.0, False)]
    told_of = [{"Resources": {what: count}, "Alive": alive} for what, count, alive in nodes]
    monkeypatch.setattr("ray.nodes", lambda: told_of)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0, "memory": 8e9})
    with pytest.raises(BackendError, match=told):
        most_editors(nano.bundle, nano.variant, given, spare)
    assert most_editors(nano.bundle, nano.variant, {"num_cpus": 1, "num_gpus": 0}) == 3


def test_a_server_is_told_that_no_machine_has_a_gpu_and_the_cores_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from varedit_serve.editing import replicas

    async def test() -> None:
        opening = Opening(embedded(), None, wanted_backend(provider="cuda"))
        async with served() as server:
            given = server.application.queue, opening, "0", 1, None
            told = "no machine of the Ray cluster has 1 CPU"
            with replicas.fleet(*given) as ([fleet], _), pytest.raises(BackendError, match=told):
                await asyncio.wait_for(fleet.run(), 20)

    nodes = [{"Resources": {what: 1.0}, "Alive": True} for what in ("CPU", "GPU")]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0, "GPU": 1.0})
    monkeypatch.setattr(replicas.serve, "run", lambda *_, **__: pytest.fail("it is deployed"))
    monkeypatch.setattr(replicas.serve, "start", lambda **_: None)
    monkeypatch.setattr(replicas.serve, "delete", lambda name: None)
    asyncio.run(test())

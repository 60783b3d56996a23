"""How many cores a process may use: of its machine, its affinity, and its containers."""

import os
from pathlib import Path

import pytest

from varedit_runtime.backends import host


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, 8),
        ({"": "max 100000"}, 8),
        ({"": "250000 100000\n"}, 2),
        ({"": "50000 100000\n"}, 1),
        ({"": "400000 100000", "pod": "300000 100000", "pod/own": "max 100000"}, 3),
        ({"": "400000 100000", "pod": "max"}, 4),
        ({"": "400000 100000", "pod": "many 100000"}, 4),
        ({"": "400000 100000", "pod": "1000 0"}, 4),
    ],
)
def test_a_quota_bounds_the_cores(
    quotas: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.write_text("1:cpu:/\n0::/pod/own\n")
    for folder, quota in quotas.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(quota)
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert host.cores() == cores

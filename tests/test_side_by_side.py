"""Patterns that other processes make while a build makes its first graphs."""

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from bundles import request

from varedit_export.graphs import side_by_side
from varedit_export.graphs.patterns import is_missing
from varedit_export.graphs.side_by_side import MEMORY, SideBySide
from varedit_export.graphs.variant_graphs import GraphPlan
from varedit_export.plan import BundlePlan, VariantPlan
from varedit_export.sources import random_sources


@pytest.fixture(autouse=True)
def three_threads_and_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@cache
def variant() -> VariantPlan:
    wanted = request(Path("unused"))
    return BundlePlan([wanted], random_sources(wanted.config, 0)).variants[0]


def graphs(*names: str) -> list[GraphPlan]:
    return [graph for graph in variant().graphs if graph.name in names]


def makers(plans: list[GraphPlan], memory: int = 10 * MEMORY) -> SideBySide:
    return SideBySide([(variant().shapes, plans)], memory)


def command(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(side_by_side, "COMMAND", (sys.executable, "-c", program))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_another_process_keeps_patterns_that_this_one_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = os.pathsep.join(filter(None, [*sys.path]))
    monkeypatch.setenv("PYTHONPATH", paths)  # the working tree's code, wherever it was installed
    plans = graphs("image_encoder", "references")
    assert len(plans) == 2 and all(is_missing(plan.stage, plan.binding) for plan in plans)
    with makers(plans) as made:
        begun = plans[-1].stage  # they begin with the last one
        while not made._tasks[begun].running() and not made._tasks[begun].done():
            pass
        made.wait(begun)
        assert not is_missing(begun, plans[-1].binding)
    with makers(plans) as made:  # one is missing now, which the build makes
        assert not made._processes


def test_what_no_process_has_begun_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "import time; time.sleep(600)")
    plans = graphs("text_encoder", "image_encoder", "condition", "references")
    with makers(plans) as made:
        pids = [process.pid for process in made._processes]
        assert len(pids) == 2
        made.wait(plans[0].stage)
        made.wait(plans[0].stage)
    assert all(map(gone, pids))


def test_a_process_that_ends_leaves_its_templates_to_the_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command(monkeypatch, "")
    plans = graphs("text_encoder", "image_encoder", "condition", "references")
    with makers(plans) as made:
        for plan in plans:
            made.wait(plan.stage)
            assert is_missing(plan.stage, plan.binding)


@pytest.mark.parametrize("case", ["one thread", "little memory", "one template", "none starts"])
def test_without_room_for_others_the_build_is_alone(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, memory = graphs("image_encoder", "condition"), 10 * MEMORY
    match case:
        case "one thread":
            torch.set_num_threads(1)
        case "little memory":
            memory = MEMORY - 1
        case "one template":
            plans = plans[:1]
        case _:
            monkeypatch.setattr(side_by_side, "COMMAND", ("/nonexistent",))
    with makers(plans, memory) as made:
        assert not made._processes
        made.wait(plans[0].stage)

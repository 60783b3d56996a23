"""Patterns of graphs that are kept for later builds."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from bundles import request

from varedit_export.graphs import patterns, trace
from varedit_export.graphs.trace import Tracer
from varedit_export.plan import BundlePlan
from varedit_export.sources import random_sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start with an empty cache."""
    monkeypatch.setattr(patterns, "cache_folder", lambda: tmp_path)
    return tmp_path / "patterns"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the names of stages are added to when they are traced."""
    names: list[str] = []
    original = trace.trace
    monkeypatch.setattr(
        trace, "trace", lambda stage, fake: (names.append(stage.name), original(stage, fake))[1]
    )
    return names


def graph(batch: int = 1, depth: int = 5, seed: int = 0) -> bytes:
    """Make the graph `condition`, which is small."""
    wanted = request(Path("unused"))
    config = wanted.config
    config = replace(config, transformer=replace(config.transformer, depth=depth))
    sources = replace(random_sources(config, seed), text=None)
    plan = BundlePlan([replace(wanted, config=config, batch=batch)], sources)
    planned = next(g for g in plan.variants[0].graphs if g.name == "condition")
    model = Tracer(plan.fake, {}).graph(planned.stage, planned.depth, planned.binding)
    return ir.to_proto(model).SerializeToString()


def test_a_kept_pattern_is_not_traced_again_and_gives_the_same_bytes(
    folder: Path, traced: list[str]
) -> None:
    first = graph()
    assert traced == ["condition"] and len(list(folder.iterdir())) == 1
    assert graph() == first and traced == ["condition"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "a byte changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "no model": lambda data: patterns.with_digest(b"\xff" * 100),
    "of other inputs": lambda data: patterns.with_digest(without_an_input(data)),
}


def without_an_input(data: bytes) -> bytes:
    model = onnx.load_from_string(data[patterns.DIGEST_SIZE :])
    del model.graph.input[0]
    return model.SerializeToString()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pattern_counts_for_none(folder: Path, traced: list[str], damage: str) -> None:
    first = graph()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert graph() == first and len(traced) == 2
    assert path.read_bytes() == whole


def test_other_shapes_other_code_and_other_stages_have_patterns_of_their_own(
    folder: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph(), graph(batch=2)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(patterns, "_code", lambda: "changed")
    graph()
    assert len(list(folder.iterdir())) == len(traced) == 3


def test_weights_and_depth_do_not_matter(folder: Path, traced: list[str]) -> None:
    for seed, depth in ((0, 5), (1, 6)):
        graph(depth=depth, seed=seed)
    assert traced == ["condition"]


def test_the_cache_is_bounded_and_what_was_used_last_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph()
    (used,) = folder.iterdir()
    monkeypatch.setattr(patterns, "LARGEST_CACHE", 2 * used.stat().st_size)
    old = folder / "old.onnx"
    old.write_bytes(used.read_bytes())
    for path in (used, old):
        os.utime(path, (1, 1))
    graph()
    graph(batch=2)
    assert used.exists() and not old.exists()


def test_a_cache_that_cannot_be_written_is_done_without(folder: Path, traced: list[str]) -> None:
    folder.write_bytes(b"")
    assert graph() == graph() and len(traced) == 2

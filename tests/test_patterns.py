"""Patterns of graphs that are kept for later builds."""

import os
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from bundles import request
from torch._subclasses.fake_tensor import FakeTensorMode

from varedit_export.graphs import patterns, trace
from varedit_export.graphs.patterns import kept_pattern
from varedit_export.graphs.trace import Tracer
from varedit_export.graphs.variant_graphs import GraphPlan
from varedit_export.plan import BundlePlan
from varedit_export.sources import random_sources
from varedit_runtime.precision import Int8Columns


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start with an empty cache."""
    monkeypatch.setattr(patterns, "cache_folder", lambda: tmp_path)
    return tmp_path / "patterns"


@cache
def condition(batch: int = 1, depth: int = 5, seed: int = 0) -> tuple[GraphPlan, FakeTensorMode]:
    """Plan the graph `condition`, which is small; return it and what traces it."""
    wanted = request(Path("unused"))
    config = wanted.config
    config = replace(config, transformer=replace(config.transformer, depth=depth))
    sources = replace(random_sources(config, seed), text=None)
    plan = BundlePlan([replace(wanted, config=config, batch=batch)], sources)
    graph = next(g for g in plan.variants[0].graphs if g.name == "condition")
    return graph, plan.fake


@cache
def pattern() -> ir.Model:
    graph, fake = condition()
    return Tracer(fake, {})._pattern(graph.stage, graph.binding)


class Maker:
    """Count how often a pattern has to be made."""

    count = 0

    def __call__(self, **of: int) -> bytes:
        """Return the bytes of the pattern of `condition`, kept or made."""
        graph, _ = condition(**of)
        return ir.to_proto(kept_pattern(graph.stage, graph.binding, self.make)).SerializeToString()

    def make(self) -> ir.Model:
        self.count += 1
        return pattern()


@pytest.fixture
def kept() -> Maker:
    return Maker()


def test_a_kept_pattern_is_not_traced_again_and_gives_the_same_graph(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, fake = condition()

    def made() -> bytes:
        model = Tracer(fake, {}).graph(graph.stage, graph.depth, graph.binding)
        return ir.to_proto(model).SerializeToString()

    first = made()
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(trace, "trace", lambda *of: pytest.fail("it is traced again"))
    assert made() == first


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "a byte changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "no model": lambda data: patterns.with_digest(b"\xff" * 100),
    "of other inputs": lambda data: patterns.with_digest(without_an_input(data)),
    "with weights elsewhere": lambda data: patterns.with_digest(with_weights_elsewhere(data)),
}


def without_an_input(data: bytes) -> bytes:
    model = onnx.load_from_string(data[patterns.DIGEST_SIZE :])
    del model.graph.input[0]
    return model.SerializeToString()


def with_weights_elsewhere(data: bytes) -> bytes:
    model = onnx.load_from_string(data[patterns.DIGEST_SIZE :])
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model.SerializeToString()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pattern_counts_for_none(folder: Path, kept: Maker, damage: str) -> None:
    first = kept()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert kept() == first and kept.count == 2
    assert path.read_bytes() == whole


def test_other_shapes_and_other_code_have_patterns_of_their_own(
    folder: Path, kept: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept()
    kept(batch=2)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(patterns, "_code", lambda: "changed")
    kept()
    assert len(list(folder.iterdir())) == kept.count == 3


def test_weights_and_depth_do_not_matter(kept: Maker) -> None:
    kept(seed=0, depth=5)
    kept(seed=1, depth=6)
    assert kept.count == 1


class OwnColumns(Int8Columns):
    """Somebody's storage, whose code may change without a trace in ours."""


def test_what_code_of_others_takes_part_in_is_not_kept(folder: Path, kept: Maker) -> None:
    graph, _ = condition()
    stage = copy(graph.stage)
    precision = replace(stage.shapes.precision, stored=(("transformer.*", OwnColumns(7)),))
    stage.shapes = replace(stage.shapes, precision=precision)
    for count in (1, 2):
        kept_pattern(stage, graph.binding, kept.make)
        assert kept.count == count
    assert not folder.exists()


def test_the_cache_is_bounded_and_what_was_used_last_stays(
    folder: Path, kept: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept()
    (used,) = folder.iterdir()
    monkeypatch.setattr(patterns, "LARGEST_CACHE", 2 * used.stat().st_size)
    old = folder / "old.onnx"
    old.write_bytes(used.read_bytes())
    for path in (used, old):
        os.utime(path, (1, 1))
    kept()
    kept(batch=2)
    assert used.exists() and not old.exists()


def test_a_cache_that_cannot_be_written_is_done_without(folder: Path, kept: Maker) -> None:
    folder.write_bytes(b"")
    assert kept() == kept() and kept.count == 2

"""Engine sets: keyed, bound to their bundle, vouched for. Engines are random bytes here."""

import gzip
import hashlib
import os
import random
import shutil
import stat
import tempfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_bundles import content, publish, rewrite_manifest
from killing import FORKS, killed_at

from varedit_engines import engine_cache
from varedit_engines.engine_cache import EngineCache
from varedit_engines.publish import Staging
from varedit_runtime.backends.engines import engine_set
from varedit_runtime.backends.engines.engine_set import (
    EngineRecipe,
    EngineSet,
    EngineSetManifest,
    PlanFile,
)
from varedit_runtime.backends.engines.packing import PIECE, pack_into, unpack
from varedit_runtime.bundle import Bundle, Folder, set_aside, work_folder
from varedit_runtime.errors import BundleError
from varedit_runtime.manifest import DIGEST, MANIFEST

STAGES: tuple[str, ...] = ("condition", "scale_00", "scale_01")
OF_A_MACHINE = {
    "backend": "tensorrt",
    "tools": {"tensorrt": "11.0"},
    "gpu": "sm_90",
    "layout": "external",
    "flags": {"weights": "inputs"},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this test its own user folders, where sets built here are recorded."""
    monkeypatch.setattr(engine_set, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr(engine_set, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(Bundle.open(publish(tmp_path / "bundle")))


def recipe_of(cache: EngineCache, **changed: Any) -> EngineRecipe:
    return cache.recipe("64", STAGES, **{**OF_A_MACHINE, **changed})


def plan(stage: str) -> bytes:
    return content(f"plan of {stage}")


def pack(plan: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.gz")
        pack_into(path, plan)
        return path.read_bytes()


def compile_into(
    staging: Staging, recipe: EngineRecipe, contents: Mapping[str, bytes] | None = None
) -> list[str]:
    """Publish a set. Returns the stages that had to be compiled."""
    files = {stage: f"{stage}.plan" for stage in recipe.graphs}
    compiled = []
    for stage, file in files.items():
        if not staging.kept(file, recipe.key):
            whole = contents[stage] if contents else plan(stage)
            staging.file(file).write_bytes(pack(whole))
            staging.record(file, recipe.key)
            compiled.append(stage)
    sizes = {stage: len(contents[stage] if contents else plan(stage)) for stage in files}
    plans = {stage: PlanFile(file, sizes[stage]) for stage, file in files.items()}
    staging.publish(EngineSetManifest(files=staging.files, recipe=recipe, plans=plans))
    return compiled


def compile_set(cache: EngineCache, recipe: EngineRecipe) -> Path:
    with cache.create(recipe) as staging:
        compile_into(staging, recipe)
    return staging.target


def someone_else(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Become another user, who has built nothing."""
    monkeypatch.setattr(engine_set, "data_folder", lambda: home / "other" / "data")
    monkeypatch.setattr(engine_set, "cache_folder", lambda: home / "other" / "cache")


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as refused:
        action()
    assert str(refused.value).isprintable()
    return str(refused.value)


# Found and made


def test_a_set_is_found_once_it_is_made(cache: EngineCache):
    recipe = recipe_of(cache)
    assert cache.open(recipe) is None
    folder = compile_set(cache, recipe)
    engines = cache.open(recipe)
    assert engines and engines.path == folder
    assert folder == cache.bundle.path / "engines" / f"tensorrt-{recipe.key[:16]}"
    assert {stage: engines.plan_bytes(stage) for stage in STAGES} == {s: plan(s) for s in STAGES}
    assert "it has condition, scale_00" in refusal(lambda: engines.plan_bytes("prefill"))


def test_the_bundle_stays_what_it_was(cache: EngineCache):
    compile_set(cache, recipe_of(cache))
    assert Bundle.open(cache.bundle.path, cache.bundle.digest) == cache.bundle


def test_an_interrupted_compilation_resumes_at_its_graph(cache: EngineCache):
    recipe = recipe_of(cache)
    with pytest.raises(KeyboardInterrupt), cache.create(recipe) as staging:
        staging.file("condition.plan").write_bytes(pack(plan("condition")))
        staging.record("condition.plan", recipe.key)
        staging.file("scale_00.plan").write_bytes(plan("scale_00")[:10])
        raise KeyboardInterrupt
    assert cache.open(recipe) is None
    with cache.create(recipe) as staging:
        assert compile_into(staging, recipe) == ["scale_00", "scale_01"]
    assert cache.open(recipe)


def test_who_waits_for_another_compilation_finds_its_set(cache: EngineCache):
    recipe = recipe_of(cache)
    found: list[object] = []

    def wait() -> None:
        with cache.create(recipe):
            found.append(cache.open(recipe))

    with cache.create(recipe) as staging:
        waiting = threading.Thread(target=wait)
        waiting.start()
        compile_into(staging, recipe)
        assert not found
    waiting.join(timeout=10)
    assert found == [cache.open(recipe)] and found != [None]


# Keys


def test_anything_that_could_give_other_engines_gives_another_key(cache: EngineCache):
    other_bundle = EngineCache(Bundle.open(publish(cache.bundle.path.parent / "other", seed=1)))
    recipes = [
        recipe_of(cache),
        recipe_of(cache, backend="tensorrt-rtx"),
        recipe_of(cache, tools={"tensorrt": "11.1"}),
        recipe_of(cache, gpu="sm_80"),
        recipe_of(cache, layout="profiles"),
        recipe_of(cache, flags={}),
        recipe_of(cache, baked=["transformer"]),
        recipe_of(cache, baked=["tokenizer"]),
        cache.recipe("64", STAGES[:2], **OF_A_MACHINE),
        recipe_of(other_bundle),
    ]
    assert len({recipe.key for recipe in recipes}) == len(recipes)
    compile_set(cache, recipes[0])
    assert [cache.open(recipe) is None for recipe in recipes] == [False] + [True] * 9


def test_the_order_of_mappings_does_not_change_the_key(cache: EngineCache):
    keys = {
        recipe_of(cache, flags=flags, baked=baked).key
        for flags in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
        for baked in (("transformer", "tokenizer"), ("tokenizer", "transformer"))
    }
    assert len(keys) == 1


def test_a_recipe_is_of_what_the_bundle_has(cache: EngineCache):
    assert "no graph 'x'" in refusal(lambda: cache.recipe("64", ["x"], **OF_A_MACHINE))
    assert "no variant 'x'" in refusal(lambda: cache.recipe("x", STAGES, **OF_A_MACHINE))
    assert "no weights of ['x']" in refusal(lambda: recipe_of(cache, baked=["x"]))


def test_a_set_of_another_bundle_is_refused_under_any_name(cache: EngineCache):
    other = EngineCache(Bundle.open(publish(cache.bundle.path.parent / "other", seed=1)))
    folder = compile_set(other, recipe_of(other))
    recipe = recipe_of(cache)
    place = compile_set(cache, recipe)
    shutil.rmtree(place)
    shutil.copytree(folder, place)
    assert "other graphs or tools" in refusal(lambda: cache.open(recipe, trust=True))


# Trust


def test_engines_built_elsewhere_are_loaded_only_when_vouched_for(
    cache: EngineCache, home: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of(cache)
    compile_set(cache, recipe)
    built = cache.open(recipe)
    assert built
    someone_else(monkeypatch, home)
    assert "built elsewhere" in refusal(lambda: cache.open(recipe))
    assert cache.open(recipe, trust=True) == built
    assert cache.open(recipe, digest=built.digest) == built
    assert "built elsewhere" in refusal(lambda: cache.open(recipe))
    for wrong in ("0" * 64, ""):
        message = refusal(lambda wrong=wrong: cache.open(recipe, digest=wrong, trust=True))
        assert "not the one asked for" in message


def test_who_does_not_trust_a_set_can_build_another(
    cache: EngineCache, home: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of(cache)
    compile_set(cache, recipe)
    someone_else(monkeypatch, home)
    compile_set(cache, recipe)
    assert cache.open(recipe)


def test_a_set_made_like_ours_by_another_is_not_ours(cache: EngineCache):
    """A record vouches for a manifest, and so for every plan's bytes; not for a name or recipe."""
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    with Staging(folder, check=lambda path: None) as staging:
        staging.file("evil.plan").write_bytes(b"native code")
        staging.record("evil.plan")
        plans = dict.fromkeys(STAGES, PlanFile("evil.plan", 11))
        staging.publish(EngineSetManifest(files=staging.files, recipe=recipe, plans=plans))
    assert "built elsewhere" in refusal(lambda: cache.open(recipe))


def test_another_users_unfinished_compilation_is_not_resumed(
    cache: EngineCache, home: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of(cache)
    with cache.create(recipe) as staging:
        staging.file("condition.plan").write_bytes(b"native code")
        staging.record("condition.plan", recipe.key)
        journal = msgspec.json.encode(staging._journal)
    someone_else(monkeypatch, home)
    (work_folder(staging.target) / "journal.json").write_bytes(journal)
    with cache.create(recipe) as staging:
        assert compile_into(staging, recipe) == list(STAGES)
    engines = cache.open(recipe)
    assert engines and engines.plan_bytes("condition") == plan("condition")


def test_records_of_compilations_do_not_pile_up(cache: EngineCache, home: Path):
    recipe = recipe_of(cache)
    compile_set(cache, recipe)
    engines = cache.open(recipe)
    assert engines
    assert [path.name for path in (home / "data").rglob("*.*")] == []
    assert (home / "data" / "engines-built-here" / engines.digest).exists()


# Damage


def test_a_flipped_bit_is_found_before_a_plan_is_used(cache: EngineCache):
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    numbers = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(whole)
            damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
            path.write_bytes(damaged)

            def use() -> None:
                engines = cache.open(recipe)
                assert engines
                for stage in STAGES:
                    engines.plan_bytes(stage)

            assert "damaged" in refusal(use)
        path.write_bytes(whole[: numbers.randrange(len(whole))])
        refusal(lambda: cache.open(recipe))
        path.unlink()
        refusal(lambda: cache.open(recipe))
        path.symlink_to(folder / MANIFEST)
        refusal(lambda: cache.open(recipe))
        path.unlink()
        path.write_bytes(whole)
    assert cache.open(recipe)


def test_verifying_finds_a_flipped_bit_that_opening_does_not(cache: EngineCache):
    recipe = recipe_of(cache)
    path = compile_set(cache, recipe) / "scale_01.plan"
    path.write_bytes(flipped(path.read_bytes(), random.Random(0)))
    assert cache.open(recipe)
    assert f"{path} is damaged" in refusal(lambda: cache.open(recipe, verify=True))


def test_a_thousand_damaged_plans_are_never_handed_on(cache: EngineCache):
    """A plan is flipped, cut short or extended, before or after the set is opened."""
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    opened = cache.open(recipe)
    assert opened
    numbers = random.Random(0)
    for _ in range(1000):
        stage = numbers.choice(STAGES)
        path, whole = folder / f"{stage}.plan", pack(plan(stage))
        path.write_bytes(numbers.choice([flipped, cut_short, grown])(whole, numbers))
        assert "damaged" in refusal(lambda stage=stage: opened.plan_bytes(stage))
        assert "damaged" in refusal(lambda stage=stage: read_plan(cache, recipe, stage))
        path.write_bytes(whole)
    assert [read_plan(cache, recipe, stage) for stage in STAGES] == [plan(s) for s in STAGES]


def flipped(whole: bytes, numbers: random.Random) -> bytes:
    damaged = bytearray(whole)
    damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
    return bytes(damaged)


def cut_short(whole: bytes, numbers: random.Random) -> bytes:
    return whole[: numbers.randrange(len(whole))]


def grown(whole: bytes, numbers: random.Random) -> bytes:
    return whole + numbers.randbytes(numbers.randrange(1, 9))


def read_plan(cache: EngineCache, recipe: EngineRecipe, stage: str, **vouched: Any) -> bytearray:
    """Read a plan as a runtime does before it deserialises it."""
    engines = cache.open(recipe, **vouched)
    assert engines
    return engines.plan_bytes(stage)


def test_the_bytes_handed_on_are_those_that_were_hashed(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
):
    """One reading serves both: a file exchanged after it was hashed is not read again."""
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    chunks = Folder.chunks

    def exchanging(files: Folder, name: str) -> Iterator[bytes]:
        yield from chunks(files, name)
        (folder / "condition.plan").write_bytes(b"native code")

    engines = cache.open(recipe)
    assert engines
    monkeypatch.setattr(Folder, "chunks", exchanging)
    assert engines.plan_bytes("condition") == plan("condition")
    assert (folder / "condition.plan").read_bytes() == b"native code"


def test_swapped_plans_are_refused(cache: EngineCache):
    """Make plans of one size, so that only digests tell them apart."""
    recipe = recipe_of(cache)
    contents = {stage: bytes([number]) * 100 for number, stage in enumerate(STAGES)}
    with cache.create(recipe) as staging:
        compile_into(staging, recipe, contents)
    first, second = (staging.target / f"{stage}.plan" for stage in STAGES[:2])
    first.write_bytes(pack(contents[STAGES[1]]))
    second.write_bytes(pack(contents[STAGES[0]]))
    assert first.stat().st_size == second.stat().st_size
    for stage in STAGES[:2]:
        assert "damaged" in refusal(lambda stage=stage: read_plan(cache, recipe, stage))
    assert read_plan(cache, recipe, STAGES[2]) == contents[STAGES[2]]


def swap_plans(manifest: dict[str, Any]) -> None:
    plans = manifest["plans"]
    plans["condition"], plans["scale_00"] = plans["scale_00"], plans["condition"]


def wrong_size(manifest: dict[str, Any]) -> None:
    manifest["plans"]["condition"]["size"] += 1


def no_size(manifest: dict[str, Any]) -> None:
    manifest["plans"]["condition"]["size"] = -1


def swap_digests(manifest: dict[str, Any]) -> None:
    files = manifest["files"]
    first, second = files["condition.plan"], files["scale_00.plan"]
    first["sha256"], second["sha256"] = second["sha256"], first["sha256"]


def foreign_tool(manifest: dict[str, Any]) -> None:
    manifest["recipe"]["tools"]["tensorrt"] = "11.1"


def file_unlisted(manifest: dict[str, Any]) -> None:
    del manifest["files"]["condition.plan"]


def digest_left_out(manifest: dict[str, Any]) -> None:
    del manifest["files"]["condition.plan"]["sha256"]


def plan_left_out(manifest: dict[str, Any]) -> None:
    del manifest["plans"]["condition"]


@pytest.mark.parametrize(
    ("change", "said", "said_to_who_trusts"),
    [
        (swap_plans, "built elsewhere", None),
        (swap_digests, "built elsewhere", "damaged"),
        (wrong_size, "built elsewhere", "does not unpack to"),
        (no_size, ">= 0", ">= 0"),
        (foreign_tool, "other graphs or tools", "other graphs or tools"),
        (file_unlisted, "not in files", "not in files"),
        (digest_left_out, "sha256", "sha256"),
        (plan_left_out, "were expected", "were expected"),
    ],
)
def test_a_rewritten_manifest_is_refused(
    cache: EngineCache,
    change: Callable[[dict[str, Any]], None],
    said: str,
    said_to_who_trusts: str | None,
):
    """The manifest agrees with the digest beside it: trust covers plans, not damage."""
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    change(manifest)
    rewrite_manifest(folder, msgspec.json.encode(manifest))
    assert said in refusal(lambda: read_plan(cache, recipe, "condition"))
    if said_to_who_trusts is not None:
        trusted = refusal(lambda: read_plan(cache, recipe, "condition", trust=True))
        assert said_to_who_trusts in trusted


WEIGHTS = "graphs/weights/transformer.safetensors"
SIZE = len(content(WEIGHTS))


def publish_weights(cache: EngineCache, stage: str, *place: Any) -> EngineRecipe:
    """Build a set here, with a stage whose weight lies at this place."""
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    manifest["weights"] = {stage: [["blocks.0.qkv", *place]]}
    data = msgspec.json.encode(manifest)
    rewrite_manifest(folder, data)
    engine_set.built_here(hashlib.sha256(data).hexdigest()).touch()
    return recipe


@pytest.mark.parametrize("place", [(0, SIZE), (SIZE - 1, 1), (SIZE, 0), (3, 5)])
def test_weights_lie_anywhere_in_the_bundles_weights(cache: EngineCache, place: tuple[int, int]):
    engines = cache.open(publish_weights(cache, "condition", WEIGHTS, *place))
    assert engines
    (weight,) = engines.manifest.weights["condition"]
    assert (weight.file, weight.offset, weight.length) == (WEIGHTS, *place)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ((WEIGHTS, 0, SIZE + 1), f"{SIZE + 1} bytes at 0 of"),
        ((WEIGHTS, SIZE, 1), f"1 bytes at {SIZE} of"),
        ((WEIGHTS, 2**59, 2**59), "compile the engines again"),
        ((WEIGHTS, -1, 1), ">= 0"),
        ((WEIGHTS, 1, -1), ">= 0"),
        ((WEIGHTS, 0.5, 1), "Expected `int`"),
        (("../x", 0, 1), "'../x'"),
        (("/etc/passwd", 0, 0), "'/etc/passwd'"),
        (("manifest.json", 0, 1), "'manifest.json'"),
        (("tokenizer.json", 0, 1), "'tokenizer.json'"),
        (("graphs/64.scale.onnx", 0, 1), "'graphs/64.scale.onnx'"),
        (("graphs/weights/../weights/transformer.safetensors", 0, 1), "at 0 of 'graphs/weights/.."),
    ],
)
def test_weights_that_lie_elsewhere_are_refused(
    cache: EngineCache, place: tuple[str, int, int], said: str
):
    recipe = publish_weights(cache, "condition", *place)
    for trust in (False, True):
        assert said in refusal(lambda trust=trust: cache.open(recipe, trust=trust))


def test_weights_of_no_plan_are_refused(cache: EngineCache):
    recipe = publish_weights(cache, "prefill", WEIGHTS, 0, 1)
    assert "['prefill'], which have no plan" in refusal(lambda: cache.open(recipe))


def test_a_set_without_its_checksum_or_manifest_is_refused(cache: EngineCache):
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    for name, said in ((DIGEST, "cannot be read"), (MANIFEST, "it has no manifest.json")):
        (folder / name).unlink()
        assert said in refusal(lambda: read_plan(cache, recipe, "condition", trust=True))


def test_a_plan_that_is_a_link_is_refused(cache: EngineCache, tmp_path: Path):
    """Even a link to the right bytes is refused: someone may change its target later."""
    recipe = recipe_of(cache)
    path = compile_set(cache, recipe) / "condition.plan"
    opened = cache.open(recipe)
    assert opened
    path.rename(tmp_path / "elsewhere.plan")
    path.symlink_to(tmp_path / "elsewhere.plan")
    assert "is a link" in refusal(lambda: opened.plan_bytes("condition"))
    assert "is a link" in refusal(lambda: read_plan(cache, recipe, "condition", trust=True))


def test_a_damaged_set_can_be_made_again(cache: EngineCache):
    recipe = recipe_of(cache)
    (compile_set(cache, recipe) / "condition.plan").write_bytes(b"")
    refusal(lambda: cache.open(recipe))
    compile_set(cache, recipe)
    assert cache.open(recipe)


X = PlanFile("condition.plan", 1)


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        ({"condition": X}, "were expected"),
        (dict.fromkeys(STAGES, PlanFile("../x", 1)), "not in files"),
        (dict.fromkeys((*STAGES, "prefill"), X), "were expected"),
    ],
)
def test_plans_match_the_recipe_and_the_files(
    cache: EngineCache, plans: dict[str, PlanFile], said: str
):
    recipe = recipe_of(cache)
    with cache.create(recipe) as staging:
        staging.file("condition.plan").write_bytes(b"x")
        staging.record("condition.plan")
        with pytest.raises(ValueError, match=said):
            EngineSetManifest(files=staging.files, recipe=recipe, plans=plans)


# Packed plans


def publish_packed(cache: EngineCache, data: bytes, size: int) -> EngineSet:
    """Publish a set with one file for all plans."""
    recipe = recipe_of(cache)
    with cache.create(recipe) as staging:
        staging.file("one.plan.gz").write_bytes(data)
        staging.record("one.plan.gz")
        plans = dict.fromkeys(STAGES, PlanFile("one.plan.gz", size))
        staging.publish(EngineSetManifest(files=staging.files, recipe=recipe, plans=plans))
    engines = cache.open(recipe)
    assert engines
    return engines


SOURCES = b"__global__ void kernel() {}\n" * 10**5
NUMBERS = np.random.default_rng(0).bytes(3 * PIECE + 17)


@pytest.mark.parametrize("whole", [b"", b"x", SOURCES, NUMBERS, NUMBERS + SOURCES + NUMBERS])
def test_a_plan_is_handed_on_as_it_was_packed(cache: EngineCache, whole: bytes):
    packed = pack(whole)
    engines = publish_packed(cache, packed, len(whole))
    assert engines.plan_bytes("condition") == whole
    chunks = [packed[start : start + 1000] for start in range(0, len(packed), 1000)]
    assert unpack(chunks, len(packed), len(whole)) == whole
    assert gzip.decompress(packed) == whole
    earlier = zlib.compress(whole)  # what earlier versions wrote
    assert unpack([earlier], len(earlier), len(whole)) == whole


def test_sources_pack_and_weights_cost_nothing():
    assert len(pack(SOURCES)) < len(SOURCES) / 10
    assert len(pack(NUMBERS)) < 1.001 * len(NUMBERS)
    assert len(pack(NUMBERS + SOURCES)) < len(NUMBERS) + 2 * PIECE


PACKED = pack(b"native code")


@pytest.mark.parametrize(
    ("data", "size", "said"),
    [
        (PACKED, 10, "does not unpack to 10 bytes"),
        (PACKED, 12, "does not unpack to 12 bytes"),
        (PACKED, 0, "does not unpack to 0 bytes"),
        (b"", 11, "does not unpack to 11 bytes"),
        (PACKED + PACKED, 11, "does not unpack to 11 bytes"),
        (PACKED[:-1], 11, "is cut short"),
        (PACKED + b"x", 11, "is cut short"),
        (PACKED, 2**59, f"does not unpack to {2**59} bytes"),
        (b"", 2**59, f"does not unpack to {2**59} bytes"),
        (b"native code", 11, "is not packed"),
    ],
)
def test_what_does_not_unpack_to_its_size_is_refused(
    cache: EngineCache, data: bytes, size: int, said: str
):
    engines = publish_packed(cache, data, size)
    assert said in refusal(lambda: engines.plan_bytes("condition"))


def test_a_plan_is_unpacked_no_further_than_its_size(cache: EngineCache):
    for bomb in (zlib.compress(bytes(10**8)), pack(bytes(10**8))):
        engines = publish_packed(cache, bomb, 1000)
        tracemalloc.start()
        refusal(lambda engines=engines: engines.plan_bytes("condition"))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10 * PIECE


def test_beside_a_plan_only_pieces_of_it_are_held(cache: EngineCache, tmp_path: Path):
    numbers = np.random.default_rng(1).bytes(30 * PIECE)
    tracemalloc.start()
    pack_into(tmp_path / "plan.gz", numbers)
    _, packing = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    engines = publish_packed(cache, (tmp_path / "plan.gz").read_bytes(), len(numbers))
    tracemalloc.start()
    plan = engines.plan_bytes("condition")
    _, unpacking = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    same = plan == numbers
    assert same  # of which pytest would print 30 MB
    assert packing < 3 * PIECE and unpacking - len(plan) < 3 * PIECE


def test_a_bundle_is_no_engine_set(cache: EngineCache):
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    for name in (MANIFEST, DIGEST):
        shutil.copy(cache.bundle.path / name, folder / name)
    assert "unknown field" in refusal(lambda: cache.open(recipe, trust=True))


# Bundles in the place of others

SCALE = "graphs/64.scale_00.onnx"


def test_engines_that_share_a_graph_with_the_newer_bundle_are_kept(cache: EngineCache):
    """All others are deleted with the earlier bundle."""
    every, scale = recipe_of(cache), cache.recipe("64", ["scale_00"], **OF_A_MACHINE)
    kept = contents(compile_set(cache, every))
    compile_set(cache, scale)
    damaged = compile_set(cache, recipe_of(cache, gpu="sm_80"))
    (damaged / MANIFEST).write_bytes(b"")
    newer = EngineCache(Bundle.open(publish(cache.bundle.path, 1, [WEIGHTS])))
    assert newer.folders == sorted(newer.places_of(recipe)[0] for recipe in (every, scale))
    assert newer.open(every) and contents(newer.places_of(every)[0]) == kept
    newest = EngineCache(Bundle.open(publish(cache.bundle.path, 1, [WEIGHTS, SCALE])))
    assert newest.folders == [newest.places_of(every)[0]]
    publish(cache.bundle.path, 2)
    assert not (cache.bundle.path / "engines").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_engines_that_the_newer_bundle_has_already_are_not_replaced(cache: EngineCache):
    """As after an interruption: some sets were moved, and one of the others was made again."""
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    aside = shutil.copytree(cache.bundle.path, set_aside(cache.bundle.path))
    (aside / "engines" / folder.name / "condition.plan").write_bytes(b"")
    with Staging(cache.bundle.path):
        assert not aside.exists()
    assert read_plan(cache, recipe, "condition") == plan("condition")


@pytest.mark.usefixtures("no_flushing")
@FORKS
def test_replacing_a_bundle_killed_anywhere_loses_no_bundle_and_harms_no_engines(
    cache: EngineCache,
):
    """Every attempt starts from what the previous one left."""
    path, recipes = cache.bundle.path, [recipe_of(cache), recipe_of(cache, gpu="sm_80")]
    for recipe in recipes:
        compile_set(cache, recipe)
    left, step, killed = set(), 60, True
    while killed:
        killed = killed_at(step, partial(publish, path, step, [WEIGHTS]))
        Bundle.open(path).verify()
        left.add(sum(is_set_aside(path, recipe) for recipe in recipes))
        step += 1
    assert left == {0, 1, 2}
    cache = EngineCache(Bundle.open(path))
    assert all(cache.open(recipe, verify=True) for recipe in recipes)


def is_set_aside(bundle: Path, recipe: EngineRecipe) -> bool:
    """Return whether a complete set is still in the earlier bundle."""
    name = f"engines/{recipe.backend}-{recipe.key[:16]}"
    (place,) = (place for place in (bundle, set_aside(bundle)) if (place / name).exists())
    EngineSet.open(place / name).verify()
    return place != bundle


# Sets in the user's cache


@pytest.fixture
def cached(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """Pretend that the bundle cannot be written."""
    monkeypatch.setattr(engine_cache, "_writable", lambda folder: False)
    return cache


def test_a_set_in_the_users_cache_serves_every_bundle_that_it_fits(cached: EngineCache):
    recipe, baked = recipe_of(cached), recipe_of(cached, baked=["transformer"])
    folders = sorted(compile_set(cached, recipe) for recipe in (recipe, baked))
    assert cached.folders == folders
    other = publish(cached.bundle.path.parent / "other", 1, [WEIGHTS])
    sets = EngineCache(Bundle.open(other))
    found = sets.open(recipe)
    assert found and found.path in folders
    assert sets.find("64", "tensorrt", OF_A_MACHINE["tools"], "sm_90") == found
    publish(other, 1)
    assert EngineCache(Bundle.open(other)).folders == []


def test_what_is_damaged_in_the_users_cache_is_told_of_the_bundle_that_it_is_of(
    cached: EngineCache,
):
    cut, unknown = (compile_set(cached, recipe_of(cached, gpu=gpu)) for gpu in ("sm_80", "sm_90"))
    (cut / "condition.plan").write_bytes(b"")
    (unknown / MANIFEST).write_bytes(b"")
    assert cached.folders == [cut]
    inside = cached.bundle.path / "engines" / unknown.name
    shutil.copytree(unknown, inside)
    assert set(cached.folders) == {cut, inside}


# Bundles that cannot be written


@pytest.fixture
def without_privileges() -> Iterator[Path]:
    """Become a user who may not write everywhere, unlike root; give a folder where it may."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o777)
        if root:
            os.setresuid(65534, 65534, 0)
        yield place
        if root:
            os.setresuid(0, 0, 0)


def test_the_engines_of_a_read_only_bundle_are_kept_in_the_users_cache(
    without_privileges: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_set, "data_folder", lambda: without_privileges / "data")
    monkeypatch.setattr(engine_set, "cache_folder", lambda: without_privileges / "cache")
    bundle = Bundle.open(publish(without_privileges / "shared" / "bundle"))
    bundle.path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    cache = EngineCache(bundle)
    recipe = recipe_of(cache)
    folder = compile_set(cache, recipe)
    assert folder.parent == without_privileges / "cache" / "engines"
    engines = cache.open(recipe)
    assert engines and engines.path == folder
    assert not (bundle.path / "engines").exists()
    bundle.path.chmod(stat.S_IRWXU)


def test_engines_in_the_users_cache_stand_in_for_damaged_ones_in_the_bundle(
    without_privileges: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_set, "data_folder", lambda: without_privileges / "data")
    monkeypatch.setattr(engine_set, "cache_folder", lambda: without_privileges / "cache")
    cache = EngineCache(Bundle.open(publish(without_privileges / "bundle")))
    recipe = recipe_of(cache)
    damaged = compile_set(cache, recipe)
    (damaged / "condition.plan").write_bytes(b"")
    damaged.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert str(damaged) in refusal(lambda: cache.open(recipe))
    folder = compile_set(cache, recipe)
    found = cache.open(recipe)
    assert found and found.path == folder != damaged
    damaged.parent.chmod(stat.S_IRWXU)

"""nano, the bundle that `varedit-run` ships with: what it is built from, and editing with it."""

from pathlib import Path
from shutil import copytree
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from varedit_export import cli
from varedit_export.options import BuildOptions
from varedit_export.plan import BundlePlan
from varedit_export.resolve_options import plan_of
from varedit_nano import embedded_bundle
from varedit_nano.data import EVALUATION_SEEDS
from varedit_nano.model import NANO, WEIGHTS, load_nano
from varedit_nano.scenes import KINDS, draw_edit
from varedit_nano.scenes.samples import plan_edit
from varedit_reference.weights_file import open_weights
from varedit_runtime import locate
from varedit_runtime.bundle import Bundle
from varedit_runtime.cli import main as run_main
from varedit_runtime.manifest import Manifest
from varedit_runtime.pictures import open_picture
from varedit_runtime.text import Instructions, read_tokenizer

SAMPLE = Path(__file__).parent.parent / "docs" / "samples" / "person.png"
SAMPLE_SEED = 420
# Around an instruction's clause: "i want you to"; around two of them: "first", ",", "then".
SENTENCE_TOKENS, JOINT_TOKENS = 4, 3


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Become a user who never built anything."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv(locate.VARIABLE, raising=False)


def planned(**options: Any) -> BundlePlan:
    """Return the plan of a build of nano."""
    return plan_of(BuildOptions("nano", **options))


def build(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["build", "--size", "nano", *map(str, arguments)])


def edit(*arguments: str | Path) -> Result:
    words = [str(SAMPLE), "add a hat", "--threads", "1", *map(str, arguments)]
    return CliRunner().invoke(run_main, words)


def embedded() -> Bundle:
    return Bundle.open(locate.find_bundle(None).path)


# Building


def test_building_nano_gives_the_embedded_bundle(tmp_path: Path) -> None:
    built = build("-o", tmp_path / "nano")
    assert built.exit_code == 0, built.output
    ours, theirs = Bundle.open(tmp_path / "nano"), embedded()
    assert _essence(ours.manifest) == _essence(theirs.manifest)
    for file in ours.manifest.files:
        assert (ours.path / file).read_bytes() == (theirs.path / file).read_bytes(), file


def test_the_embedded_bundle_comes_from_the_trained_weights(tmp_path: Path) -> None:
    """Of the same request and the same weights, so that it is the bundle of the test above."""
    restored, trained = (
        planned(output=tmp_path / "nano"),
        embedded_bundle.embedded_plan(tmp_path / "nano"),
    )
    assert trained.request == restored.request
    for component in trained.components:
        stored = open_weights(embedded().weights_path(component.name))
        assert stored.keys() == component.module.state_dict().keys()
        assert all(torch.equal(component.make(name), stored[name]) for name in stored)
    assert trained.sources.description == restored.sources.description


def _essence(manifest: Manifest) -> Manifest:
    """Return the manifest without the builder's versions and its rounding."""
    return msgspec.structs.replace(manifest, tools={}, parity=())


def test_the_embedded_bundle_is_for_one_guided_picture() -> None:
    manifest = embedded().manifest
    (variant,) = manifest.variants
    assert (manifest.name, manifest.precision, manifest.model.size) == ("nano", "fp32", "nano")
    assert (variant.picture, variant.batch, variant.rows) == ((128, 128), 1, 2)
    assert variant.text_tokens == embedded_bundle.TEXT_TOKENS


def test_the_embedded_bundle_agrees_with_the_reference() -> None:
    verified = CliRunner().invoke(cli.main, ["verify", str(embedded().path)])
    assert verified.exit_code == 0, verified.output


def test_every_instruction_of_the_scenes_fits() -> None:
    instructions = Instructions(read_tokenizer(embedded().tokenizer_json()), 512)
    rng = np.random.default_rng(0)
    clauses = {
        clause
        for kind in KINDS
        if kind != "compound"
        for _ in range(300)
        for clause in plan_edit(rng, kind)[1].clauses
    }
    longest = max(len(instructions.tokenise(clause)) - 1 for clause in clauses)
    end = 1
    assert SENTENCE_TOKENS + JOINT_TOKENS + 2 * longest + end <= embedded_bundle.TEXT_TOKENS


def test_nano_is_built_of_its_own_weights_by_default() -> None:
    plan = planned()
    assert plan.request.config == NANO
    assert (plan.request.resolution, plan.request.target.name) == (128, "nano-128")
    assert plan.sources.description == "nano's own"
    assert planned(resolutions=(128,), text_tokens=64).request.text_tokens == 64


def test_nano_can_be_built_of_others() -> None:
    plan = planned(
        checkpoint=WEIGHTS / "transformer.safetensors",
        tokenizer=WEIGHTS / "tokenizer.safetensors",
        text_encoder=WEIGHTS / "text_encoder",
    )
    files = "transformer.safetensors, tokenizer.safetensors, text_encoder"
    assert plan.sources.description == files
    assert planned(random_weights=3).sources.description == "random, seed 3"


def test_the_weights_are_known_by_their_contents(tmp_path: Path) -> None:
    own = embedded_bundle.own_sources()
    copy = copytree(WEIGHTS, tmp_path / "copy", copy_function=_copy)
    assert embedded_bundle.own_sources(copy).identity == own.identity
    settings = copy / "text_encoder" / "config.json"
    settings.write_text(settings.read_text() + " ")
    assert embedded_bundle.own_sources(copy).identity != own.identity


def _copy(source: str, target: str) -> None:
    """Copy a file without the time of its last change."""
    Path(target).write_bytes(Path(source).read_bytes())


# Editing


def test_the_sample_is_a_picture_that_nano_never_saw() -> None:
    assert SAMPLE_SEED in EVALUATION_SEEDS
    with Image.open(SAMPLE) as sample:
        assert np.array_equal(np.asarray(sample), draw_edit(SAMPLE_SEED).source)


def test_without_another_bundle_nano_edits(tmp_path: Path) -> None:
    output, both = tmp_path / "hat.png", tmp_path / "both.png"
    done = edit("-o", output, "--compare", both, "--seed", "7")
    assert done.exit_code == 0, done.output
    why = "the embedded nano, a small demonstration model for drawn scenes"
    folder = Path(locate.__file__).parent / "nano"
    assert done.stderr == f"bundle: {folder} ({why}, as no other was named or chosen)\n"
    assert done.stdout.startswith(f"{output}: 128 x 128, seed 7, ")
    source = open_picture(SAMPLE)
    (expected,) = load_nano().edit([source], ["add a hat"], seed=[7])
    with Image.open(output) as edited, Image.open(both) as pair:
        assert np.abs(np.asarray(edited, int) - np.asarray(expected, int)).max() <= 1
        assert pair.crop((0, 0, 128, 128)).tobytes() == source.tobytes()
        assert pair.crop((128, 0, 256, 128)).tobytes() == edited.tobytes() != source.tobytes()


def test_a_chosen_bundle_comes_before_nano(tmp_path: Path) -> None:
    built = copytree(embedded().path, tmp_path / "built")
    locate.choose_default(built)
    done = edit("-o", tmp_path / "hat.png")
    assert done.stderr == f"bundle: {built} (your default)\n"

"""Warnings of edits that can be made, but will hardly be what is wanted."""

import io
import json
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundles import small_bundle
from click.testing import CliRunner
from editing import changed_bundle, picture
from fake_bundles import publish_textless
from PIL import Image

from varedit_nano.scenes import draw_edit
from varedit_runtime.cli import main
from varedit_runtime.editing.caution import looks_photographed
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import EditWarning
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import Manifest
from varedit_runtime.text import Instructions, read_tokenizer

RANDOM, PHOTOGRAPH, UNKNOWN = "weights are random", "looks like a photograph", "does not know"


def fractal(width: int = 160, height: int = 120, seed: int = 0) -> Image.Image:
    """Draw random structure on all scales in equal measure, as photographs have on average."""
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    noise = np.random.default_rng(seed).standard_normal((3, height, width))
    waves = np.fft.ifft2(np.fft.fft2(noise) * falling).real
    pixels = 128 + 50 * waves / waves.std((1, 2), keepdims=True)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@cache
def drawn(seed: int) -> Image.Image:
    return Image.fromarray(np.asarray(draw_edit(seed).source))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy nano with a manifest that says what it was trained on."""

    def drawn_scenes(manifest: Manifest) -> Manifest:
        model = msgspec.structs.replace(manifest.model, trained_on="drawn scenes")
        return msgspec.structs.replace(manifest, model=model)

    return changed_bundle(tmp_path_factory.mktemp("bundle"), drawn_scenes, embedded)


@pytest.fixture(scope="module")
def editor(nano: Path) -> Iterator[Editor]:
    with Editor.open(nano, threads=1) as opened:
        yield opened


def warned(editor: Editor, image: Image.Image, prompt: str) -> tuple[str, ...]:
    """Return an edit's warnings, which Python's warnings and the result tell alike."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = editor.edit(image, prompt, seed=0)
    told = tuple(str(one.message) for one in caught if one.category is EditWarning)
    assert told == result.warnings
    assert all(one.filename == __file__ for one in caught)
    return told


def test_random_weights_warn_at_every_edit() -> None:
    with Editor.open(small_bundle(), threads=1) as editor:
        for _ in range(2):
            (told,) = warned(editor, picture(40, 40), "add a hat")
            assert RANDOM in told


def test_other_weights_do_not_warn(tmp_path: Path) -> None:
    def trained(manifest: Manifest) -> Manifest:
        model = msgspec.structs.replace(manifest.model, random=msgspec.UNSET)
        return msgspec.structs.replace(manifest, model=model)

    with Editor.open(small_bundle(), threads=1) as editor:
        assert warned(editor, fractal(), "add a hat") != ()
        editor.swap_weights(changed_bundle(tmp_path, trained))
        assert warned(editor, fractal(), "add a hat") == ()


def test_what_was_not_trained_for_warns(editor: Editor) -> None:
    assert warned(editor, drawn(3), "add a hat") == ()
    (told,) = warned(editor, fractal(), "add a hat")
    assert PHOTOGRAPH in told
    (told,) = warned(editor, drawn(3), "帽子をかぶせて hat")
    assert UNKNOWN in told
    assert len(warned(editor, fractal(), "帽子をかぶせて hat")) == 2


def test_guidance_below_zero_warns(editor: Editor) -> None:
    scales = len(editor.variant.grids)
    edits = [
        editor.prepare(drawn(3), "add a hat", seed=0, guidance_scale=guidance)
        for guidance in (-1, [*[4] * (scales - 1), -0.5], 0)
    ]
    assert ["below 0" in " ".join(one.warnings) for one in edits] == [True, True, False]


def test_of_several_pictures_each_has_its_own_warnings(editor: Editor) -> None:
    pictures = [fractal(), drawn(3)]
    with pytest.warns(EditWarning) as caught:
        results = editor.edit(pictures, "add a hat", num_images_per_prompt=2)
    assert [len(result.warnings) for result in results] == [1, 1, 0, 0]
    assert len(caught) == 1


def test_a_warning_can_be_made_an_error_before_anything_is_computed(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "_edit_all", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        with pytest.raises(EditWarning, match=PHOTOGRAPH):
            editor.edit(fractal(), "add a hat")


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: as_jpeg(image, 90),
        lambda image: as_jpeg(image, 75),
        lambda image: image.resize((512, 512)),
        lambda image: as_jpeg(image.resize((512, 512)), 50),
        lambda image: image.resize((1024, 1024), Image.Resampling.NEAREST),
        lambda image: image.resize((96, 96)),
        lambda image: image.crop((0, 0, 128, 80)),
    ],
)
def test_drawn_scenes_and_copies_of_them_are_no_photographs(change: Any) -> None:
    assert not any(looks_photographed(change(drawn(seed))) for seed in range(20))


def test_structure_everywhere_is_a_photograph() -> None:
    assert all(looks_photographed(fractal(seed=seed)) for seed in range(5))
    assert looks_photographed(fractal(900, 400)) and looks_photographed(as_jpeg(fractal(), 50))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert looks_photographed(Image.fromarray(noise))
    transparent = fractal().convert("RGBA")
    assert looks_photographed(transparent)
    transparent.putalpha(0)  # seen on white
    assert not looks_photographed(transparent)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_small_and_thin_pictures_can_be_looked_at(size: tuple[int, int]) -> None:
    assert not looks_photographed(Image.new("RGB", size))


FUSED = {  # as T5's tokenizer does: one token for all that follows each other
    "version": "1.0",
    "added_tokens": [],
    "model": {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["</s>", 0.0], *([letter, -1.0] for letter in " adht")],
    },
}


def test_characters_are_counted_not_tokens() -> None:
    instructions = Instructions(read_tokenizer(json.dumps(FUSED).encode()), 48)
    assert len(instructions.tokenise("帽子をかぶせて hat")) == len(["<unk>", *" hat", "end"])
    assert instructions.mostly_unknown("帽子をかぶせて hat")
    assert not instructions.mostly_unknown("add a hat 帽子")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    fractal().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_command_tells_warnings_in_one_line_each_and_in_json(nano: Path, photo: Path) -> None:
    words = [str(photo), "帽子をかぶせて hat", "--bundle", str(nano), "--threads", "1", "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0
    _, *lines = done.stderr.splitlines()
    told = [line.removeprefix("Warning: ") for line in lines if line.startswith("Warning: ")]
    assert [UNKNOWN in told[0], PHOTOGRAPH in told[1], len(told)] == [True, True, 2]
    assert json.loads(done.stdout)["warnings"] == told


def test_a_bundle_without_a_text_encoder_is_refused_before_it_is_loaded(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "open", None)
    textless = publish_textless(photo.parent / "bundle")
    done = CliRunner().invoke(main, [str(photo), "add a hat", "--bundle", str(textless)])
    assert done.exit_code == 1
    said = "was built without a text encoder, and takes no instructions: build it with --text-enc"
    assert said in done.stderr and "varedit-run bundles" in done.stderr

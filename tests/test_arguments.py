"""Whatever a caller gives: it works, or it is a VareditError."""

from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hostile import NAMED, junk
from PIL import Image

import varedit_export
from varedit_engines import compile_set
from varedit_export import BuildOptions, EngineOptions, VerifyOptions, resolve_options
from varedit_export.parity import compare_bundle
from varedit_runtime.backends import choose, find_backend
from varedit_runtime.backends.handle import EditHandle
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.preparer import Preparer, read_instructions
from varedit_runtime.errors import LONGEST, VareditError
from varedit_runtime.locate import embedded
from varedit_runtime.pictures import encode_picture, open_mask, open_picture, save_picture

PICTURE = Image.new("RGB", (8, 8))
PNG = (Path(__file__).parent.parent / "docs/samples/person.png").read_bytes()


class Accepted(Exception):
    """All arguments were accepted, and the work would begin."""


def accept(*_: object, **__: object) -> Any:
    raise Accepted


class Idle:
    """A backend that computes nothing."""

    provider, whole, drops_rows = "none", staticmethod(accept), True
    text_lengths, batches = (48,), (1,)
    encode_text = encode_pictures = staticmethod(accept)


@cache
def editor() -> Editor:
    bundle = Bundle.open(embedded())
    variant = bundle.manifest.variants[0]
    instructions = read_instructions(bundle, variant.text_tokens)
    return Editor(bundle, variant, Idle(), instructions)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let work begin nowhere, and make weights once."""
    for name in ("onnxruntime", "tensorrt"):
        monkeypatch.setattr(type(find_backend(name)), "open", accept)
    for name in ("compare_bundle", "compare_chosen", "compare_recording"):
        monkeypatch.setattr(compare_bundle, name, accept)
    monkeypatch.setattr(compare_bundle, "check_weights", bool)
    monkeypatch.setattr(Bundle, "verify", bool)
    monkeypatch.setattr(compile_set, "compile_engine_set", accept)
    for name in ("BundlePlan", "find_weights", "bring_weights"):
        monkeypatch.setattr(resolve_options, name, accept)
    monkeypatch.setattr(resolve_options, "random_sources", cache(resolve_options.random_sources))


def options(kind: type, use: Callable[[Any], object]) -> Callable[..., object]:
    """Return a function of the options' own arguments that makes and uses them."""

    def call(**given: object) -> object:
        return use(kind(**given))

    call.__signature__ = signature(kind)  # type: ignore[attr-defined]
    return call


def backend(name: str) -> Callable[..., object]:
    return options(find_backend(name).options, lambda given: choose(name, **vars(given)))


# Public functions, with arguments that they accept.
CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "Editor.open": (Editor.open, {"bundle": embedded()}),
    "Editor.edit": (
        lambda **given: editor().edit(**given),
        {"image": PICTURE, "prompt": "red"},
    ),
    "Preparer.open": (Preparer.open, {"bundle": embedded()}),
    "Preparer.prepare": (
        Preparer.open(embedded()).prepare,
        {"image": PICTURE, "prompt": "red", "seed": 1},
    ),
    "Editor.edit_prepared": (
        lambda **given: editor().edit_prepared(**given),
        {"edits": [Preparer.open(embedded()).prepare(PICTURE, "red")]},
    ),
    "EditHandle": (EditHandle, {}),
    "Bundle.open": (Bundle.open, {"path": embedded()}),
    "open_picture": (open_picture, {"source": PNG}),
    "open_mask": (open_mask, {"source": PNG}),
    "save_picture": (save_picture, {"image": PICTURE, "path": "missing/picture.png"}),
    "encode_picture": (encode_picture, {"image": PICTURE}),
    "choose": (lambda backend: choose(backend), {"backend": "onnxruntime"}),
    "OnnxRuntimeOptions": (backend("onnxruntime"), {}),
    "EngineBackendOptions": (backend("tensorrt"), {}),
    "build": (varedit_export.build, {"options": BuildOptions(size="nano")}),
    "BuildOptions": (
        options(BuildOptions, varedit_export.build),
        {"size": "tiny-2b", "resolutions": (256,), "random_weights": 0},
    ),
    "verify": (varedit_export.verify, {"bundle": embedded()}),
    "VerifyOptions": (
        options(VerifyOptions, lambda given: varedit_export.verify(embedded(), given)),
        {},
    ),
    "compile_engines": (
        varedit_export.compile_engines,
        {"bundle": embedded(), "options": EngineOptions("tensorrt-rtx", architectures=("sm89",))},
    ),
    "EngineOptions": (
        options(EngineOptions, lambda given: varedit_export.compile_engines(embedded(), given)),
        {"backend": "tensorrt-rtx", "architectures": ("sm89",)},
    ),
}


def parameters(name: str) -> list[str]:
    call = CALLS[name][0]
    if name.startswith("Editor.edit"):
        call = getattr(editor(), name.removeprefix("Editor."))
    return list(signature(call).parameters)


def ends_well(name: str, changes: dict[str, Any]) -> None:
    call, given = CALLS[name]
    try:
        call(**given | changes)
    except VareditError as error:
        assert str(error).isprintable() and 0 < len(str(error)) <= LONGEST
    except Accepted:
        pass


@pytest.mark.parametrize("name", CALLS)
def test_every_odd_value_of_every_argument_works_or_is_refused(name: str) -> None:
    for parameter in parameters(name):
        for odd, make in NAMED.items():
            print(f"{parameter} = {odd}")
            ends_well(name, {parameter: make()})


@pytest.mark.parametrize("name", CALLS)
def test_fuzz_several_odd_arguments(name: str, cases: Callable[[int], Iterator[Random]]) -> None:
    names = parameters(name)
    for random in cases(100):
        changed = random.sample(names, min(len(names), random.choice([1, 2, 3])))
        ends_well(name, {parameter: junk(random) for parameter in changed})

"""What a manifest may say."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_bundles import FILES, STAGES, valid_manifest

from varedit_runtime.errors import LONGEST, BundleError
from varedit_runtime.grids import ASPECT_RATIOS
from varedit_runtime.manifest import (
    SCHEMA_VERSION,
    Manifest,
    Variant,
    canonical_json,
    decode_manifest,
)

Spoil = Callable[[dict[str, Any]], object]


def decode(value: object) -> Manifest:
    return decode_manifest(json.dumps(value).encode(), Manifest)


def refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as refused:
        decode_manifest(data, Manifest)
    message = str(refused.value)
    assert message.isprintable() and len(message) <= LONGEST
    return message


def refusal_of(spoil: Spoil) -> str:
    value = valid_manifest()
    spoil(value)
    return refusal(json.dumps(value).encode())


def every_place(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Yield the paths of all values inside a JSON value."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    return [path, *(p for key, item in items for p in every_place(item, (*path, key)))]


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_a_manifest_is_read_as_it_was_written():
    read = decode(valid_manifest())
    assert decode_manifest(canonical_json(read), Manifest) == read
    assert read.variants[0].graphs["scale"].inputs[0].shape == ("past", 2, 4, 16)
    assert read.guidance_scale == 3.0 and set(read.files) == set(FILES)


def test_equal_manifests_are_written_as_equal_bytes():
    value = valid_manifest()
    backwards = {**value, "files": dict(reversed(value["files"].items()))}
    assert list(backwards["files"]) != list(value["files"])
    assert canonical_json(decode(value)) == canonical_json(decode(backwards))


# Types


WRONG_VALUES = ("1", 1, -1, 0.5, True, None, [], {}, [[]], "\n", 10**400)


def test_a_value_of_another_type_is_refused_wherever_it_is():
    """Put every kind of JSON value at every place of a manifest, unless it is right there."""
    refused = 0
    whole = valid_manifest()
    for path in every_place(whole):
        for wrong in WRONG_VALUES:
            value = valid_manifest()
            if not path:
                value = wrong
            elif type(inside(whole, path)) is type(wrong):
                continue
            else:
                inside(value, path[:-1])[path[-1]] = wrong
            try:
                decode(value)
            except BundleError:
                refused += 1
            else:
                # A name for a dimension, a whole number for a float, a setting or none.
                assert path[-2:-1] == ("shape",) or path[-1] in (
                    *("value", "tolerance", "guidance_scale", "temperature"),
                    *("norm_groups", "text_distance", "text_epsilon"),
                ), (path, wrong)
    assert refused > 2000


def test_a_missing_field_is_refused_wherever_it_is():
    optional = {("tools", "onnx"), ("variants", 0, "graphs", "text_encoder")}
    optional |= {("variants", 0, "graphs", "references")}
    for path in every_place(valid_manifest()):
        if path and isinstance(path[-1], str) and path not in optional:
            value = valid_manifest()
            del inside(value, path[:-1])[path[-1]]
            with pytest.raises(BundleError):
                decode(value)


def test_an_unknown_field_is_refused_wherever_it_is():
    whole = valid_manifest()
    mappings = [p for p in every_place(whole) if isinstance(inside(whole, p), dict)]
    assert len(mappings) == 66
    for path in mappings:
        if path == ("tools",):
            continue
        value = valid_manifest()
        inside(value, path)["unknown"] = 1
        with pytest.raises(BundleError):
            decode(value)
    assert "`licence`" in refusal_of(lambda m: m.update(licence="none"))


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"nul"])
@pytest.mark.parametrize("field", [b'"guidance_scale":', b'"value":', b'"tolerance":'])
def test_numbers_are_finite(number: bytes, field: bytes):
    data = canonical_json(decode(valid_manifest()))
    start = data.index(field) + len(field)
    end = min(data.index(stop, start) for stop in (b",", b"}") if stop in data[start:])
    refusal(data[:start] + number + data[end:])


def test_what_cannot_be_written_in_json_cannot_be_published():
    value = msgspec.structs.replace(decode(valid_manifest()), guidance_scale=float("nan"))
    refusal(canonical_json(value))


# Versions


@pytest.mark.parametrize("version", [3, 4, 10**30])
def test_a_newer_schema_says_so_whatever_else_it_holds(version: int):
    message = refusal(json.dumps({"schema_version": version, "new": [{}]}).encode())
    assert f"version {version}" in message and f"version {SCHEMA_VERSION}" in message
    assert "upgrade varedit-export" in message


@pytest.mark.parametrize("version", [1, 0, -1])
def test_an_older_schema_must_be_built_again(version: int):
    message = refusal_of(lambda m: m.update(schema_version=version))
    command = "varedit-export build --size tiny --res 64 --precision fp32 --text-tokens 24"
    assert f"build it again, of the same weights, with `{command}`" in message


def test_a_rebuild_is_told_all_that_the_bundle_was():
    def change(manifest: Any) -> None:
        manifest.update(schema_version=1, precision="fp16", tools="none of its business")
        manifest["variants"].append({**variant(manifest), "resolution": 128})
        variant(manifest).update(aspect="3:2", batch=4, rows=4)

    assert (
        "`varedit-export build --size tiny --res 64 --res 128 --aspect 3:2 --precision fp16 "
        "--batch 4 --text-tokens 24 --no-guidance`" in refusal_of(change)
    )


@pytest.mark.parametrize("size", [3, "a b", "x`; rm", "\x1b[2J"])
def test_what_an_older_manifest_has_in_place_of_a_size_is_not_repeated(size: object):
    message = refusal_of(lambda m: (m.update(schema_version=1), m["model"].update(size=size)))
    assert message.endswith("build it again")


@pytest.mark.parametrize("version", ["1", 1.5, None, True, [1]])
def test_the_schema_version_is_a_number(version: object):
    assert "valid manifest" in refusal_of(lambda m: m.update(schema_version=version))


def test_a_json_file_of_another_program_is_refused():
    refusal(b'{"name": "package", "version": "1.0.0"}')


# Damage


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{", b"\xff\xfe{}", b"\x89PNG\r\n", b"\0" * 1000],
    ids=repr,
)
def test_what_is_no_json_object_is_refused(data: bytes):
    refusal(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 4_000_000,
        b'{"schema_version":1,"name":' + b"[" * 4_000_000,
        b'{"schema_version":1,"new":' + b'{"a":' * 1_000_000,
        b'{"new":' + b"[" * 100_000 + b"]" * 100_000 + b',"schema_version":1}',
    ],
    ids=["list", "in a field", "in an unknown field", "closed"],
)
def test_deep_nesting_is_refused(data: bytes):
    refusal(data)


def test_fuzz_a_truncated_manifest_is_refused(cases: Callable[[int], Iterator[random.Random]]):
    data = canonical_json(decode(valid_manifest()))
    for numbers in cases(300):
        refusal(data[: numbers.randrange(len(data))])


def test_fuzz_a_damaged_manifest_is_refused_or_still_a_manifest(
    cases: Callable[[int], Iterator[random.Random]],
):
    """Digests find the rest: a flipped bit in a name leaves a manifest like any other."""
    data = canonical_json(decode(valid_manifest()))
    refused = 0
    for numbers in cases(500):
        damaged = bytearray(data)
        damaged[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
        try:
            assert isinstance(decode_manifest(bytes(damaged), Manifest), Manifest)
        except BundleError:
            refused += 1
    assert refused > 250


def test_an_error_does_not_pass_on_what_a_terminal_would_obey():
    message = refusal_of(lambda m: m.update({"a\x1b[2J\nb" + "c" * 10**6: 1}))
    assert "unknown field" in message


# Paths


OUTSIDE = [
    *("", ".", "..", "/", "//", "/etc/passwd", "../x", "../../x", "graphs/../../x", "graphs/.."),
    *("./graphs/x", "graphs//x", "graphs/", "graphs/./x", "~/x", "~", "-x", ".hidden", "a/.b"),
    *("C:/x", "C:x", "c:\\x", "\\\\host\\x", "graphs\\x", "..\\x", "//host/x", "file:///x"),
    *("x\0", "x\n", "\nx", "x y", " x", "x ", "x.", "x..y", "a/x.", "\u2024\u2024/x", "é", "x:y"),
    *("%2e%2e/x", "$HOME/x", "x*", "x?", "a|b", "x" * 150 + "/é"),
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: ascii(path[:20]))
def test_a_path_that_could_leave_the_folder_is_refused(path: str):
    def as_a_file(value: dict[str, Any]) -> None:
        value["files"][path] = {"sha256": "0" * 64, "size": 1}

    def as_a_graph(value: dict[str, Any]) -> None:
        as_a_file(value)
        value["variants"][0]["graphs"]["scale"]["file"] = path

    assert "relative path" in refusal_of(as_a_file)
    assert "relative path" in refusal_of(as_a_graph)


@pytest.mark.parametrize("path", ["manifest.json", "manifest.sha256", "engines/x/plan"])
def test_a_path_with_another_use_is_refused(path: str):
    entry = {"sha256": "0" * 64, "size": 1}
    assert "cannot be" in refusal_of(lambda m: m["files"].update({path: entry}))


@pytest.mark.parametrize(
    "sha256",
    ["", *("0" * n for n in (63, 65)), *(c * 64 for c in "Ag\uff10"), "0" * 64 + "\n", "0x" * 32],
)
def test_digests_are_64_hexadecimal_digits(sha256: str):
    refusal_of(lambda m: m["files"]["tokenizer.json"].update(sha256=sha256))


@pytest.mark.parametrize("size", [-1, 2**60, 10**400, 1.0])
def test_sizes_are_sizes_of_files(size: float):
    refusal_of(lambda m: m["files"]["tokenizer.json"].update(size=size))


# What fields say about each other


def variant(value: dict[str, Any]) -> dict[str, Any]:
    return value["variants"][0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.update(variants=[]), "length"),
        (lambda m: m["variants"].append(variant(m)), "have the same name: ['64']"),
        (lambda m: variant(m).update(rows=3), "3 rows for a batch of 1"),
        (lambda m: variant(m).update(batch=0), ">= 1"),
        (lambda m: variant(m).update(picture=[64, 128]), "64 x 128 px"),
        (lambda m: variant(m).update(grids=[]), "length"),
        (lambda m: variant(m)["grids"].append([4, 4]), "missing scale_03"),
        (lambda m: variant(m)["grids"].pop(1), "not known ['scale_02', 'scale_02_un"),
        (lambda m: variant(m)["graphs"].pop("scale_01"), "missing scale_01"),
        (lambda m: variant(m)["graphs"].pop("prefill"), "missing prefill"),
        (lambda m: variant(m)["graphs"].update(x=variant(m)["graphs"]["scale"]), "not known ['x']"),
        (lambda m: m["files"].pop("graphs/64.scale.onnx"), "is not in files"),
        (lambda m: m["files"].pop("tokenizer.json"), "tokenizer.json is not in files"),
        (
            lambda m: m["files"].pop("graphs/weights/transformer.safetensors"),
            "the transformer's weights, graphs/weights/transformer.safetensors, are not in files",
        ),
        (lambda m: m["model"].update(conditioning="finest"), "only sar uses"),
        (lambda m: m["model"].update(token_channels=17), "make 16"),
        (lambda m: m.update(temperature=0), "> 0"),
        (lambda m: m.update(precision="fp8"), "fp8"),
        (
            lambda m: variant(m)["graphs"]["scale"].update(
                inputs=variant(m)["graphs"]["scale"]["inputs"] * 2
            ),
            "several inputs have the same name: ['past_key.0']",
        ),
    ],
)
def test_contradictions_are_refused(spoil: Spoil, said: str):
    assert said in refusal_of(spoil)


def tensor(value: dict[str, Any]) -> dict[str, Any]:
    return variant(value)["graphs"]["condition"]["inputs"][0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: tensor(m).update(shape=[]), "length"),
        (lambda m: tensor(m).update(shape=[1] * 9), "length"),
        (lambda m: variant(m).update(batch=1025, rows=1025), "<= 1024"),
        (lambda m: variant(m).update(batch=1024, rows=2049), "<= 2048"),
        (lambda m: variant(m).update(text_tokens=4097), "<= 4096"),
        (lambda m: variant(m).update(grids=[[1, 1], [2, 2], [4, 513]]), "<= 512"),
        (lambda m: variant(m).update(picture=[64, 8193]), "<= 8192"),
        (lambda m: m["model"].update(patch=5), "<= 4"),
        (lambda m: m["model"].update(downsampling=65), "<= 64"),
        (lambda m: m["model"].update(bits=257), "<= 256"),
        (lambda m: m["model"].update(token_channels=257), "<= 256"),
    ],
)
def test_what_would_make_lists_and_arrays_of_any_size_is_refused(spoil: Spoil, said: str):
    assert said in refusal_of(spoil)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\x9b1m", "\0", "a\x7f"], ids=repr)
def test_texts_hold_nothing_that_a_terminal_obeys(text: str):
    assert "valid manifest" in refusal_of(lambda m: m.update(name=text))
    assert "valid manifest" in refusal_of(lambda m: m.update(tools={text: "1"}))


def test_the_largest_of_the_family_are_far_within_the_bounds():
    value = valid_manifest()
    tensor(value).update(shape=[1] * 8)
    variant(value).update(batch=1024, rows=2048, text_tokens=4096)
    value["model"].update(downsampling=16, patch=1, bits=32, token_channels=32)
    for grids in ASPECT_RATIOS.values():
        finest = [4 * side for side in grids[-1]]
        picture = [16 * side for side in finest]
        variant(value).update(grids=[[1, 1], [2, 2], finest], picture=picture)
        assert decode(value).variants[0].picture == tuple(picture)


def test_a_bundle_may_start_at_text_features():
    value = valid_manifest()
    del variant(value)["graphs"]["text_encoder"], value["files"]["tokenizer.json"]
    assert "text_encoder" not in decode(value).variants[0].graphs


def test_what_does_not_exist_is_answered_with_what_does():
    read = decode(valid_manifest())
    with pytest.raises(BundleError, match="no variant '512'; it has 64"):
        read.variant("512")
    with pytest.raises(BundleError, match=f"no graph 'scale_99'; it has .*{STAGES[-1]}"):
        read.variant("64").graph("scale_99")


def test_importing_the_package_does_not_import_msgspec(tmp_path: Path):
    code = "import sys, varedit_runtime; print('msgspec' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("struct", [Manifest, Variant])
def test_the_documentation_names_every_field(struct: type[msgspec.Struct]):
    documentation = (Path(__file__).parent.parent / "docs" / "bundle.md").read_text()
    for field in struct.__struct_fields__:
        assert f"`{field}`" in documentation

"""Instructions and tokenizers of strangers: whatever they hold, a typed error and no worse."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from varedit_runtime import text
from varedit_runtime.errors import SignalArrived, TextError
from varedit_runtime.locate import embedded
from varedit_runtime.text import CHARACTERS_PER_TOKEN, Instructions, read_tokenizer

UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0]]}
BPE = {"type": "BPE", "vocab": {"</s>": 0, "a": 1, "é": 2, "aé": 3}, "merges": []}
# The prefix is cut off in the middle of a character, and what panics then panics again.
ABORTS = BPE | {"continuing_subword_prefix": "b", "merges": [["a", "é"]]}
# Panics when it is read, and when it is used.
BAD_MAP, BAD_WHEN_USED = "AAAA", "BAAAAP////8="


def tokenizer_json(model: object, **parts: Any) -> bytes:
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    nothing = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({**file, **nothing, **parts, "model": model}).encode()


def precompiled(charsmap: str) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


def removing(character: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": character}, "content": ""}


def instructions(tokenizer: bytes, limit: int = 48) -> Instructions:
    return Instructions(read_tokenizer(tokenizer), limit)


def nano() -> bytes:
    return (Path(embedded()) / "tokenizer.json").read_bytes()


def test_the_models_of_t5_and_nano_are_read() -> None:
    assert instructions(tokenizer_json(UNIGRAM)).tokenise("aa") == [2, 2, 1]
    untyped = {name: value for name, value in UNIGRAM.items() if name != "type"}
    assert instructions(tokenizer_json(untyped)).tokenise("aa") == [2, 2, 1]
    both = {"continuing_subword_prefix": "", "end_of_word_suffix": None}
    both["dropout"] = None
    assert instructions(tokenizer_json(BPE | both)).tokenise("aé") == [1, 2, 0]
    assert len(instructions(nano()).tokenise("add a hat")) == 4


def test_a_tokenizer_that_would_abort_the_process_is_refused(tmp_path: Path) -> None:
    """Reads it in another process, as an abort would end this one."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(ABORTS))
    code = (
        "from pathlib import Path; from varedit_runtime.text import read_tokenizer\n"
        "try: read_tokenizer(Path('tokenizer.json').read_bytes())\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "is not a tokenizer\n", "")


def twice(model: object) -> bytes:
    """Hide a model behind a harmless one under the same key: parsers take either of the two."""
    both = tokenizer_json(UNIGRAM).decode()
    return f'{{"model": {json.dumps(model)}, {both[1:]}'.encode()


@pytest.mark.parametrize(
    "content",
    [
        tokenizer_json(BPE | {"continuing_subword_prefix": "long" * 100, "merges": [["a", "é"]]}),
        tokenizer_json(BPE | {"end_of_word_suffix": "</w>"}),
        tokenizer_json({"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "<unk>"}),
        tokenizer_json({"type": "WordPiece", "vocab": {"</s>": 0}, "unk_token": "<unk>"}),
        tokenizer_json(dict(list(BPE.items())[1:])),
        tokenizer_json(UNIGRAM | {"unk_id": 99}),
        tokenizer_json(UNIGRAM, normalizer=precompiled(BAD_MAP)),
        tokenizer_json([]),
        tokenizer_json(None),
        b"[]",
        b"3",
        b"\xff",
        b"[" * 10**6,
        b'{"model": {"type": ["BPE"]}}',
    ],
    ids=lambda content: str(content[-40:]),
)
def test_what_is_no_t5_tokenizer_is_a_typed_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^is not a tokenizer$"):
        read_tokenizer(content)


EIGHT_GB, EMPTY_TRIE, UNALIGNED = "////////", "AAAAAAAAAAA=", "AwAAAAAAAAA="
NO_LENGTH = {"type": "FixedLength", "length": 0}
HOSTILE = {
    "dropout": {"model": BPE | {"dropout": 0.5}},
    "length": {"pre_tokenizer": NO_LENGTH},
    "inner length": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [NO_LENGTH]}},
    "untyped": {"normalizer": {"precompiled_charsmap": EIGHT_GB}},
    "list": {"normalizer": [EIGHT_GB]},
    "typed list": {"normalizer": ["Precompiled", EIGHT_GB]},
    "inner list": {"normalizer": {"type": "Sequence", "normalizers": [[EIGHT_GB]]}},
    "not base64": {"normalizer": precompiled("BAAA?APAAAAA=")},
    **{map_: {"normalizer": precompiled(map_)} for map_ in ("", EIGHT_GB, EMPTY_TRIE, UNALIGNED)},
    "inner": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [precompiled(EIGHT_GB)]}],
        }
    },
}


@pytest.mark.parametrize("parts", HOSTILE.values(), ids=HOSTILE)
def test_what_would_harm_the_library_never_reaches_it(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would allocate gigabytes, panic, or return other tokens at every call."""
    reached = list[str]()
    monkeypatch.setattr(text, "Tokenizer", SimpleNamespace(from_str=reached.append))
    with pytest.raises(ValueError, match=r"^is not a tokenizer$"):
        read_tokenizer(tokenizer_json(**{"model": UNIGRAM, **parts}))
    assert not reached


def test_of_a_key_given_twice_what_was_checked_is_read() -> None:
    assert instructions(twice(ABORTS)).tokenise("aa") == [2, 2, 1]


@pytest.mark.parametrize(
    "content",
    [
        tokenizer_json(UNIGRAM | {"unk_id": None}),
        tokenizer_json(BPE | {"unk_token": "<unk>"}),
        tokenizer_json(UNIGRAM, normalizer=precompiled(BAD_WHEN_USED)),
    ],
    ids=["no unknown", "missing unknown", "panic"],
)
def test_a_tokenizer_that_fails_on_an_instruction_is_a_typed_error(content: bytes) -> None:
    with pytest.raises(TextError, match="tokenizer fails on the instruction"):
        instructions(content).tokenise("a z é")


@pytest.mark.parametrize("prompt", ["\u200b", "\ufeff", "\x1b", "▁", " ▁ ", "\xa0", "中"])
@pytest.mark.parametrize("truncate", [False, True])
def test_what_the_tokenizer_knows_nothing_of_is_no_instruction(prompt: str, truncate: bool) -> None:
    with pytest.raises(TextError, match="say what to change in the picture"):
        instructions(nano()).tokenise(prompt, truncate=truncate)


def test_nor_is_what_has_no_tokens() -> None:
    without = instructions(tokenizer_json(UNIGRAM, normalizer=removing("\u200b")))
    assert without.tokenise("\u200ba") == [2, 1]
    with pytest.raises(TextError, match="nothing that the model can read"):
        without.tokenise("\u200b")


class Stub:
    """A stand-in for a tokenizer."""

    def __init__(self, raised: BaseException | None = None) -> None:
        self.raised, self.seen = raised, ""
        self.ids = [7] * 1000

    def token_to_id(self, token: str) -> int:
        return 1

    def encode(self, text: str, add_special_tokens: bool) -> "Stub":
        self.seen = text
        if self.raised:
            raise self.raised
        return self


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(), SignalArrived()])
def test_who_wants_to_end_the_program_can(raised: BaseException) -> None:
    with pytest.raises(type(raised)):
        Instructions(Stub(raised), 48).tokenise("red")  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["\ud800", "add \udfff a hat"])
@pytest.mark.parametrize("truncate", [False, True])
def test_half_a_surrogate_pair_is_no_text(prompt: str, truncate: bool) -> None:
    with pytest.raises(TextError, match="not valid Unicode") as caught:
        instructions(nano()).tokenise(prompt, truncate=truncate)
    str(caught.value).encode()


def test_what_is_far_too_long_is_not_tokenised() -> None:
    stub, most = Stub(), 48 * CHARACTERS_PER_TOKEN
    tokenise = Instructions(stub, 48).tokenise  # type: ignore[arg-type]
    for prompt in ("a" * (most + 1), " " * 10**6):
        with pytest.raises(TextError, match=rf"has {len(prompt)} characters, of at most {most} "):
            tokenise(prompt)
    assert stub.seen == ""
    assert tokenise("b" * 10**6, truncate=True) == [7] * 47 + [1]
    assert stub.seen == "b" * most
    with pytest.raises(TextError, match="1001 tokens, end token included, of at most 48"):
        tokenise("c" * most)


def test_an_instruction_of_the_longest_words_is_not_too_long() -> None:
    """In nano's tokenizer the longest piece is a word and the space before it."""
    tokeniser = read_tokenizer(nano())
    assert max(map(len, tokeniser.get_vocab())) < CHARACTERS_PER_TOKEN // 2
    assert len(Instructions(tokeniser, 48).tokenise(" ".join(["background"] * 47))) == 48

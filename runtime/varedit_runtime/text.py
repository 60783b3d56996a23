"""Tokenise instructions with a model's own tokenizer.json.

A bundle's tokenizer.json may come from a stranger, so it is checked before it is loaded.
"""

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from tokenizers import Encoding, Tokenizer

from varedit_runtime.errors import SignalArrived, TextError, shown

END_TOKEN = "</s>"
UNKNOWN = "<unk>"  # the token of what the tokenizer does not know

MODELS = ("Unigram", "BPE")  # T5's and nano's kinds of tokenizer

# Longer texts are refused or cut before they are tokenised, as the work grows with the length. T5's
# pieces have at most 16 characters; as many again allow for white space between them.
CHARACTERS_PER_TOKEN = 32


class Instructions:
    """Tokenises instructions as T5 does: as they are, followed by the end token.

    limit: the most tokens that an instruction may have, end token included.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer, self.limit = tokenizer, limit
        self._end = _end_token(tokenizer)
        self._unknown = tokenizer.token_to_id(UNKNOWN)
        self._nothing = {tokenizer.token_to_id("▁"), self._unknown}

    def tokenise(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Return an instruction's token ids, end token included.

        truncate: cut an instruction that is too long. Raises TextError on an instruction that is
        empty or has nothing that the tokenizer knows, on a long one unless truncate, on invalid
        Unicode, and if the tokenizer fails.
        """
        most = self.limit * CHARACTERS_PER_TOKEN
        if len(prompt) > most and not truncate:
            raise TextError(
                f"the instruction has {len(prompt)} characters, of at most {most} for "
                f"{self.limit} tokens: shorten it"
            )
        prompt = prompt[:most]
        check_instruction(prompt)
        ids = self._encode(prompt).ids
        if self._nothing.issuperset(ids):
            raise TextError(
                "the instruction has nothing that the model can read, such as a word: say what to "
                "change in the picture"
            )
        if len(ids) >= self.limit and not truncate:
            raise TextError(
                f"the instruction has {len(ids) + 1} tokens, end token included, of at most "
                f"{self.limit}: shorten it"
            )
        return [*ids[: self.limit - 1], self._end]

    def pieces(self, prompt: str) -> list[str]:
        """Return the texts of an instruction's tokens, end token included. Raises TextError."""
        return [self._tokenizer.id_to_token(token) or UNKNOWN for token in self.tokenise(prompt)]

    def mostly_unknown(self, prompt: str) -> bool:
        """Return whether the tokenizer does not know most of an instruction's characters.

        Characters are counted, as some tokenizers make one token of several that they do not know.
        Raises TextError as `tokenise` does.
        """
        encoded = self._encode(prompt)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        unknown = sum(end - start for token, (start, end) in spans if token == self._unknown)
        return 2 * unknown > len("".join(prompt.split()))

    def _encode(self, prompt: str) -> Encoding:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise TextError(
                "the instruction is not valid Unicode (such as half of a surrogate pair): correct "
                "its encoding"
            ) from error
        failed = TextError(
            "the model's tokenizer fails on the instruction: word it differently, or build the "
            "bundle again"
        )
        with _any_failure_as(failed):
            return self._tokenizer.encode(prompt, add_special_tokens=False)


def check_instruction(text: str) -> None:
    """Raise TextError on an instruction that no model can follow: one that is empty."""
    if not text.strip():
        raise TextError("the instruction is empty: say what to change in the picture")


def read_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """Read a tokenizer.json, ignoring the truncation and padding that it may ask for.

    Raises ValueError unless it is a T5 tokenizer; the message is to follow the file's name.
    """
    with _any_failure_as(ValueError("is not a tokenizer")):
        tokenizer = Tokenizer.from_str(_checked(tokenizer_json))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    _end_token(tokenizer)
    return tokenizer


@contextmanager
def _any_failure_as(failed: Exception) -> Iterator[None]:
    """Turn any failure into this error: tokenizers' panics are not even Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, SignalArrived):
        raise
    except BaseException as error:
        raise failed from error


def _checked(tokenizer_json: bytes) -> str:
    """Check a tokenizer.json; return what was checked, encoded anew.

    Another JSON parser could read the original differently, as when a key appears twice. A BPE
    model with a prefix or suffix, which no T5 has, can abort the process when it is loaded; with
    dropout it returns other tokens at every call. Raises ValueError, or an error of msgspec's,
    unless it is a T5 tokenizer.
    """
    file = msgspec.json.decode(tokenizer_json)
    model = file["model"]
    model.setdefault("type", "Unigram")  # which t5-small's file leaves out
    if model["type"] not in MODELS:
        raise ValueError(f"a model of type {shown(model['type'])}, not {' or '.join(MODELS)}")
    for unwanted in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(unwanted):
            raise ValueError(f"a model with {unwanted}")
    for name in ("normalizer", "pre_tokenizer"):
        if file.get(name) is not None:
            _check_part(file[name])
    return msgspec.json.encode(file).decode()


def _check_part(part: Any) -> None:
    """Check a normalizer or pre-tokenizer, and the parts of a sequence of them.

    The library may also read a part from a list of its values, and guess a type that is left out:
    only objects are taken, and each is checked by its keys. Raises ValueError.
    """
    if not isinstance(part, dict):
        raise ValueError("a normalizer or pre-tokenizer that is no object")
    if "precompiled_charsmap" in part:
        _check_charsmap(b64decode(part["precompiled_charsmap"], validate=True))
    if part.get("length") == 0:
        raise ValueError("a pre-tokenizer of pieces without characters")
    for inner in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
        _check_part(inner)


def _check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError unless a map of characters holds the trie whose bytes it counts first.

    The library allocates as many bytes as are counted before it reads them.
    """
    trie = int.from_bytes(charsmap[:4], "little")
    if trie % 4 or not 0 < trie <= len(charsmap) - 4:
        raise ValueError("a map of characters that is cut off")


def _end_token(tokenizer: Tokenizer) -> int:
    token = tokenizer.token_to_id(END_TOKEN)
    if token is None:
        raise ValueError(f"has no end token {END_TOKEN}")
    return token

"""Instructions to token ids, with a model's own tokenizer.json."""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from tokenizers import Tokenizer

from varedit_runtime.errors import TextError

END_TOKEN = "</s>"

# What models that T5's tokenizers are made with: T5's own, and nano's.
MODELS = ("Unigram", "BPE")

# Tokenising costs time and memory in proportion, so that what is far too long is not tokenised. A
# piece of T5's has at most 16 characters; as many again are for the white space between them.
CHARACTERS_PER_TOKEN = 32


class Instructions:
    """Tokenises instructions as T5 does: as they are, with the end token behind.

    limit: the most tokens of an instruction, end token included.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer, self.limit = tokenizer, limit
        self._end = _end_token(tokenizer)

    def tokenise(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Token ids, end token included.

        truncate: cut a long instruction. Raises TextError on an empty instruction, on a long one
        unless truncate, and on one that is no text or that the tokenizer fails on.
        """
        prompt = self._cut(prompt, truncate)
        if not prompt.strip():
            raise TextError("the instruction is empty: say what to change in the picture")
        ids = self._encode(prompt)
        if len(ids) >= self.limit and not truncate:
            raise TextError(
                f"the instruction has {len(ids) + 1} tokens, end token included, of at most "
                f"{self.limit}: shorten it"
            )
        return [*ids[: self.limit - 1], self._end]

    def _cut(self, prompt: str, truncate: bool) -> str:
        """No longer than what is worth tokenising."""
        most = self.limit * CHARACTERS_PER_TOKEN
        if len(prompt) > most and not truncate:
            raise TextError(
                f"the instruction has {len(prompt)} characters, of at most {most} for "
                f"{self.limit} tokens: shorten it"
            )
        return prompt[:most]

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise TextError(
                "the instruction holds characters that are no text, such as half of a surrogate "
                "pair: give it as valid Unicode"
            ) from error
        failed = TextError(
            "the model's tokenizer fails on the instruction: word it otherwise, or build the "
            "bundle again"
        )
        with _any_failure_as(failed):
            return self._tokenizer.encode(prompt, add_special_tokens=False).ids


def read_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """A model's tokenizer, without the truncation and padding that its file may ask for.

    Raises ValueError, whose text says what the file is or lacks, unless it is a T5 tokenizer.
    """
    with _any_failure_as(ValueError("is not a tokenizer")):
        tokenizer = Tokenizer.from_str(_checked(tokenizer_json))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    _end_token(tokenizer)
    return tokenizer


@contextmanager
def _any_failure_as(failed: Exception) -> Iterator[None]:
    """Tokenizers raises bare Exceptions, and panics, which are not even those."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise failed from error


def _checked(tokenizer_json: bytes) -> str:
    """The file, written anew so that tokenizers reads what was checked: a key may stand twice.

    Raises ValueError, or what msgspec does, on what is no T5 tokenizer. A BPE model with a prefix
    or suffix, which T5's never has, can abort the process when it is loaded.
    """
    file = msgspec.json.decode(tokenizer_json)
    model = file["model"]
    if model["type"] not in MODELS:
        raise ValueError(f"a model of type {model['type']!r}, not {' or '.join(MODELS)}")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            raise ValueError(f"a model with {affix}")
    return msgspec.json.encode(file).decode()


def _end_token(tokenizer: Tokenizer) -> int:
    token = tokenizer.token_to_id(END_TOKEN)
    if token is None:
        raise ValueError(f"has no end token {END_TOKEN}")
    return token

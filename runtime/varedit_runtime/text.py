"""Instructions to token ids, with a model's own tokenizer.json."""

from tokenizers import Tokenizer

from varedit_runtime.errors import TextError

END_TOKEN = "</s>"


class Instructions:
    """Tokenises instructions as T5 does: as they are, with the end token behind.

    limit: the most tokens of an instruction, end token included.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer, self.limit = tokenizer, limit
        self._end = _end_token(tokenizer)

    def tokenise(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Token ids, end token included.

        truncate: cut a long instruction. Raises TextError on an empty instruction, and on a long
        one unless truncate.
        """
        if not prompt.strip():
            raise TextError("the instruction is empty: say what to change in the picture")
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        if len(ids) >= self.limit and not truncate:
            raise TextError(
                f"the instruction has {len(ids) + 1} tokens, end token included, of at most "
                f"{self.limit}: shorten it"
            )
        return [*ids[: self.limit - 1], self._end]


def read_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """A model's tokenizer, without the truncation and padding that its file may ask for.

    Raises ValueError, whose text says what the file is or lacks, unless it is a T5 tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError("is not a tokenizer") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _end_token(tokenizer)
    return tokenizer


def _end_token(tokenizer: Tokenizer) -> int:
    token = tokenizer.token_to_id(END_TOKEN)
    if token is None:
        raise ValueError(f"has no end token {END_TOKEN}")
    return token

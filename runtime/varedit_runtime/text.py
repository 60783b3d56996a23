"""Instructions to token ids, with a model's own tokenizer.json."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from varedit_runtime.errors import BundleError, TextError

END_TOKEN = "</s>"


class Instructions:
    """Tokenises instructions as T5 does: as they are, with the end token behind."""

    def __init__(self, tokenizer_json: bytes, limit: int) -> None:
        """limit: the most tokens of an instruction, end token included.

        Raises BundleError if the tokenizer cannot be read or has no end token.
        """
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(
                "tokenizer.json is not a tokenizer: build the bundle again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = self._tokenizer.token_to_id(END_TOKEN)
        if self._end is None:
            raise BundleError(
                f"tokenizer.json has no end token {END_TOKEN}: build the bundle again"
            )
        self.limit = limit

    def tokenise(self, prompt: str) -> list[int]:
        """Token ids, end token included. Raises TextError on an empty or too long instruction."""
        if not prompt.strip():
            raise TextError("the instruction is empty: say what to change in the picture")
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        if len(ids) >= self.limit:
            raise TextError(
                f"the instruction has {len(ids) + 1} tokens, end token included, and this bundle "
                f"takes {self.limit}: shorten it, or build with a larger --text-tokens"
            )
        return [*ids, self._end]

    def batch(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 and mask bool [B, limit], padded with zeros. Raises as tokenise does."""
        ids = np.zeros((len(prompts), self.limit), np.int64)
        mask = np.zeros((len(prompts), self.limit), np.bool_)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenise(prompt)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

"""Ask a model behind an OpenAI-compatible chat endpoint about pictures.

OpenAI's own client waits and asks again where a server is busy, late or broken: 408, 409, 429 (as
long as Retry-After says, up to two minutes), 500 and higher, and no connection. `reading.py` bounds
what a server can send.
"""

import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from varedit_export.errors import JudgeError
from varedit_runtime.errors import ConfigError, needs_extra, reason

if TYPE_CHECKING:
    from openai import OpenAI

KEY, OPENAI_KEY, OPENAI = "VAREDIT_JUDGE_KEY", "OPENAI_API_KEY", "api.openai.com"
TIMEOUT = 180.0  # seconds that one answer may take
RETRIES = 6
AGAIN = "x-stainless-retry-count"  # the header in which OpenAI's client counts its retries
# What a server says of one request alone: its pictures or its text are refused or too large.
REFUSALS = (400, 413, 422)


@dataclass(frozen=True)
class Reply:
    """A reply's text, and the tokens that it took as the server counts them."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Endpoint:
    """A model to ask. Threads may share it.

    answered: whether it ever has, also in an earlier process; then what it refuses is about one
    request alone.
    """

    def __init__(
        self,
        url: str,
        model: str,
        notice: Callable[[str], None] = lambda line: None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        """url: the address under which /chat/completions is, such as http://127.0.0.1:8000/v1.

        notice: told that a request is made again, once for all threads that do so.
        Raises ConfigError if it is none, MissingExtraError without the openai package.
        """
        self.host, host = _hosts(url)
        self.model, self.answered = model, False
        key = os.environ.get(KEY)
        if key is None and host == OPENAI:
            key = os.environ.get(OPENAI_KEY)
        self._notice, self._retries, self._again = notice, retries, 0
        self._client = _client(url, key or "none", timeout, retries, self._sending)

    def ask(self, text: str, pictures: Sequence[bytes]) -> Reply | None:
        """Return the reply to a text and PNG files; None if it refuses these alone.

        Raises JudgeError if it cannot be asked, or refuses before it has ever answered.
        """
        import openai

        try:
            answer = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[{"role": "user", "content": _content(text, pictures)}]
            )
        except openai.APIStatusError as error:
            if self.answered and error.status_code in REFUSALS:
                return None
            said = f"it answers {error.status_code}"
            raise JudgeError(f"the judge at {self.host}: {said}{_advice(error)}") from None
        except openai.APIConnectionError:  # timeouts too
            raise JudgeError(
                f"the judge at {self.host} cannot be reached, or does not answer in time: check "
                "the address and that it runs, and give the same command again to continue"
            ) from None
        except (openai.OpenAIError, ValueError) as error:
            raise JudgeError(f"the judge at {self.host}: {reason(error)}") from None
        reply = _reply(answer.content, self.host)
        self.answered, self._again = True, 0
        return reply

    def _sending(self, headers: Mapping[str, str]) -> None:
        """Say that a request is sent again, as its headers tell."""
        again = int(headers.get(AGAIN, 0))
        if again > self._again:
            self._again = again
            self._notice(
                f"the judge at {self.host} is busy or does not answer: "
                f"asking again, {again} of {self._retries}"
            )


def _hosts(url: str) -> tuple[str, str]:
    """Return an address's host with its port, and without. Raises ConfigError if it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port, (parts.hostname or "").encode("ascii")  # both raise ValueError
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ConfigError(
            "--judge: give an address such as http://127.0.0.1:8000/v1, and a key, if it needs "
            f"one, in the environment as {KEY}"
        )
    return parts.netloc, parts.hostname


def _client(
    url: str,
    key: str,
    timeout: float,
    retries: int,
    sending: Callable[[Mapping[str, str]], None],
) -> "OpenAI":
    with needs_extra("evaluate"):
        from openai import OpenAI

        from varedit_export.evaluation.judge.reading import client
    return OpenAI(
        base_url=url,
        api_key=key,
        timeout=timeout,
        max_retries=retries,
        http_client=client(timeout, sending),
    )


def _content(text: str, pictures: Sequence[bytes]) -> Any:
    urls = (f"data:image/png;base64,{b64encode(picture).decode()}" for picture in pictures)
    images = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
    return [{"type": "text", "text": text}, *images]


def _reply(content: bytes, host: str) -> Reply:
    from varedit_export.evaluation.judge.reading import parse

    completion = parse(content)
    if completion is None:
        raise JudgeError(
            f"the judge at {host} does not answer as chat completions do: check its address, which "
            "often ends in /v1"
        )
    text = completion.choices[0].message.content or ""
    if (usage := completion.usage) is None:
        return Reply(text)
    return Reply(text, usage.prompt_tokens or 0, usage.completion_tokens or 0)


def _advice(error: Any) -> str:
    """Return what to do about a status; the server's own words may hold what was sent."""
    if error.status_code in (401, 403):
        return f": give its key in the environment as {KEY}"
    if error.status_code < 400:
        return ": it is elsewhere, and is not followed there; give its new address"
    if error.status_code == 404:
        return ": check the address, which often ends in /v1, and the model's name"
    if error.status_code in REFUSALS:
        return ": it takes no such request; does the model take pictures?"
    return ", also after asking again: continue the run later"

"""API keys: hashed when they are read, compared in constant time, each with its own rate."""

import hmac
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import monotonic

from varedit_runtime.errors import ConfigError
from varedit_serve.errors import ApiError, wrong

VARIABLE = "VAREDIT_SERVE_KEYS"

_FORM = re.compile(r"(?P<name>[\w.-]{1,64}) (?P<key>\S{16,512})(?: (?P<rate>[1-9]\d{0,8}))?")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass
class Key:
    """One client's key. digest: of the key. rate: results a minute; None if it is not bounded.

    A client that has waited may ask for a minute's results at once.
    """

    name: str
    digest: bytes
    rate: int | None
    _left: float = field(default=0.0)
    _since: float = field(default=0.0)

    def charge(self, results: int, charged: int = 0) -> None:
        """Count a request's results against the rate, of which some were charged before.

        Raises ApiError 429 if they are too many, after giving back those; 400 if they always are.
        """
        if self.rate is None:
            return
        now = monotonic()
        left = self._left + (now - self._since) * self.rate / 60 if self._since else self.rate
        self._left, self._since = min(left + charged, self.rate), now
        if results > self.rate:
            raise wrong("n", f"n is {results}; this key may ask for {self.rate} results a minute")
        if results > self._left:
            wait = (results - self._left) * 60 / self.rate
            raise ApiError(
                429,
                f"this key may ask for {self.rate} results a minute: try again later",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        self._left -= results


class Keys:
    """All keys that are let in; without any, everybody is."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, authorization: str) -> Key | None:
        """Return the key that a header names, None if no key is needed. Raises ApiError 401."""
        if not self._keys:
            return None
        scheme, _, key = authorization.partition(" ")
        given = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that time does not tell which was close.
        found = [known for known in self._keys if hmac.compare_digest(known.digest, given)]
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401, "give a valid API key: Authorization: Bearer KEY", code="invalid_api_key"
            )
        return found[0]


def read_keys(file: Path | None, environment: str) -> Keys:
    """Read keys from a file and the text of an environment variable, one a line or after a comma.

    Each is `NAME KEY [RATE]`, where KEY has at least 16 characters or is sha256: and the digest of
    the key, in hexadecimal. A line that begins with # is a comment. Raises ConfigError, which never
    shows a key.
    """
    lines = environment.replace(",", "\n").splitlines()
    where = [(f"{VARIABLE}, key {number}", line) for number, line in enumerate(lines, 1)]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
            raise ConfigError(f"{file} cannot be read: {why}") from error
        where += [(f"{file}, line {number}", line) for number, line in enumerate(lines, 1)]
        if not any(map(_entry, lines)):
            raise ConfigError(f"{file} has no key; write NAME KEY on a line")
    keys, places = [], dict[str | bytes, str]()
    for place, line in where:
        if _entry(line):
            keys.append(key := _key(place, line))
            for own in (key.name, key.digest):
                if own in places:
                    raise ConfigError(f"{place} has the name or the key of {places[own]}")
                places[own] = place
    return Keys(keys)


def _entry(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _key(place: str, line: str) -> Key:
    parts = _FORM.fullmatch(" ".join(line.split()))
    if parts is None:
        raise ConfigError(
            f"{place} is not NAME KEY [RATE], with a KEY of 16 to 512 characters and a RATE of "
            "results a minute"
        )
    hashed = _HASHED.fullmatch(parts["key"])
    if hashed is None and parts["key"].startswith("sha256:"):
        raise ConfigError(f"{place} has no digest after sha256:, of 64 hexadecimal digits")
    digest = bytes.fromhex(hashed[1]) if hashed else sha256(parts["key"].encode()).digest()
    return Key(parts["name"], digest, int(parts["rate"]) if parts["rate"] else None)

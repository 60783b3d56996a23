"""All limits of the server, with their defaults; each is an option of `varedit-serve`."""

from dataclasses import dataclass, field, fields
from typing import Any

from varedit_runtime.errors import ConfigError
from varedit_runtime.values import CheckedOptions

MB = 10**6


def _limit(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def option(name: str) -> str:
    """Return the option of `varedit-serve` for a limit."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Limits(CheckedOptions):
    """What one client, and all of them together, may take. Raises ConfigError on none at all."""

    max_body: int = _limit(20 * MB, "Bytes of a request.")
    max_pixels: int = _limit(2**24, "Pixels of a picture.")
    max_side: int = _limit(8192, "Pixels of a picture's longer side.")
    max_fields: int = _limit(40, "Fields of a form.")
    max_n: int = _limit(4, "Results of a request.")
    max_queue: int = _limit(32, "Results that are waited for at a time.")
    max_queue_bytes: int = _limit(512 * MB, "Memory of all requests and answers.")
    max_connections: int = _limit(512, "Open connections.")
    upload_seconds: float = _limit(30.0, "Seconds for a request to arrive, an answer to be read.")
    deadline: float = _limit(60.0, "Seconds after which an admitted request is refused.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for limit in fields(self):
            if not 0 < getattr(self, limit.name) < 2**63:
                told = f"{option(limit.name)} is {getattr(self, limit.name)}"
                raise ConfigError(f"{told}; give a number over 0 and below 2^63")

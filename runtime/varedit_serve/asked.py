"""What is known of a request while it is answered, for the log and for whoever answers."""

import re
import secrets
from dataclasses import dataclass

from varedit_serve.errors import ApiError
from varedit_serve.keys import Key

ASKED = "varedit.asked"  # where the scope has a request's Asked

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FIELD = re.compile(r"[a-z_]{1,32}(\[\])?")  # anything else may be what a client should not tell


@dataclass
class Asked:
    """A request. key: the client's, None if none is needed. error: the last one that was told."""

    id: str
    key: Key | None = None
    error: ApiError | None = None

    @classmethod
    def of(cls, wanted: str) -> "Asked":
        """Take a client's id for its request if it is harmless in a log, else draw one."""
        return cls(wanted if _ID.fullmatch(wanted) else f"req_{secrets.token_hex(12)}")

    def line(self, status: str, seconds: float) -> str:
        """Return the log's line, which has nothing of what was sent but a field's name."""
        told = {"id": self.id, "key": self.key and self.key.name, "status": status}
        if self.error is not None:
            param = self.error.param or ""
            told |= {"code": self.error.code, "param": _FIELD.fullmatch(param) and param}
        told["seconds"] = f"{seconds:.2f}"
        return " ".join(f"{name}={value}" for name, value in told.items() if value)

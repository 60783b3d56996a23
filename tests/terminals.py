"""Read what is shown on a pseudo-terminal."""

import os
from contextlib import suppress


def read_terminal(ours: int) -> bytes:
    """Return all that is shown on a terminal until its other end is closed; close ours."""
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return shown

"""Read the numbers in a judge's reply."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_CHARACTERS = 20_000  # of a reply that are read: its numbers stand at its end


def read_reply(text: str, names: Sequence[str], low: float, high: float) -> dict[str, float] | None:
    """Return the numbers of the JSON object in a reply, whatever prose is around it.

    None unless there is one with all names, each a number from low to high. Objects of which one
    contradicts another are no answer.
    """
    values = _objects(text[-MOST_CHARACTERS:])
    found = [one for value in values if (one := numbers(value, names, low, high))]
    return found[0] if found and all(one == found[0] for one in found) else None


def numbers(
    value: Mapping[str, Any], names: Sequence[str], low: float, high: float
) -> dict[str, float] | None:
    """Return the numbers with these names; None unless each is there, and from low to high."""
    if not all(_number(value.get(name), low, high) for name in names):
        return None
    return {name: float(value[name]) for name in names}


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        if isinstance(value, dict):
            yield value
        start = text.find("{", end)

"""Exported graphs to compiled engines, and the bundle that holds them."""

from collections.abc import Callable

# Called before every step with (what is being done, steps done, steps in all).
OnStep = Callable[[str, int, int], None]

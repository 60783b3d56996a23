"""How long work tells how far it is."""

from collections.abc import Callable

# Called before every step with (what is being done, steps done, steps in all).
OnStep = Callable[[str, int, int], None]

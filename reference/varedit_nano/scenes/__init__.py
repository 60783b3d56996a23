"""Drawn scenes and their edits: any number of them, each made from a seed.

A scene is a frozen description (`scene`), an edit a pure function from scene to scene with its
wordings (`edits`, `wording`), and a picture a pure function of a scene and a size (`render`).
"""

from varedit_nano.scenes.samples import (
    KINDS,
    EditSample,
    draw_alternatives,
    draw_edit,
    draw_kind,
    draw_picture,
    draw_turns,
    vocabulary_text,
)

__all__ = [
    "KINDS",
    "EditSample",
    "draw_alternatives",
    "draw_edit",
    "draw_kind",
    "draw_picture",
    "draw_turns",
    "vocabulary_text",
]

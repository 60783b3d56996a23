"""Edits, as a library: `editor.py` has the `Editor`."""

"""Compiled engines on a GPU."""

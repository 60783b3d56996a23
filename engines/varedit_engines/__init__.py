"""Exported graphs to compiled engines, and the bundle that holds them."""

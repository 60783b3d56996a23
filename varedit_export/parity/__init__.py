"""Prove that graphs compute what the reference computes."""

"""Recordings of the released implementation, and the check of the reference against them."""

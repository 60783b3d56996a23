"""Data sets of strangers, to score and to train on: where they are, their tables and rows."""

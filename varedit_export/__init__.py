"""From released checkpoints to the files that run: the `varedit-export` command (`cli.py`)."""

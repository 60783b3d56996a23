"""What edits a picture, without PyTorch, and what every other part must agree with it on.

- `pictures.py`: pictures in and out, exactly as the released models see them.
- `grids.py`: the token grids of every resolution and aspect ratio.
- `noise.py`: the uniform noise of a seed.
- `errors.py`: every error a caller may want to catch.
- `command.py`, `cli.py`: the `varedit-run` command.
"""

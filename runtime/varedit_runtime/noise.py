"""The uniform noise that a picture's bits are drawn with: equal on every machine and backend."""

import numpy as np

from varedit_runtime.errors import ConfigError


def uniform_noise(seed: int, scale: int, tokens: int, channels: int) -> np.ndarray:
    """Return one picture's noise for one scale: float32 [tokens, channels] in [0, 1).

    u = (raw >> 40) · 2^-24, where raw are the 64-bit outputs of Philox4x64-10 with the key (seed,
    scale), in order, row-major. Philox counts instead of carrying a state, so a scale's noise needs
    no other scale's; and it depends on nothing else, such as the place in a batch. scale counts
    from 0, the coarsest. Raises ConfigError unless 0 <= seed < 2^64.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"the seed is {seed}; it must be at least 0 and less than 2^64")
    key = np.array([seed, scale], dtype=np.uint64)
    # No Generator: NumPy may change its streams, but never the bit generator's output. 24 bits are
    # what fp32 holds exactly, so that every language can make the same numbers.
    raw = np.random.Philox(key=key).random_raw(tokens * channels)
    return ((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32).reshape(tokens, channels)

"""The uniform noise that decides a picture's bits: the same on every machine and backend."""

import numpy as np

from varedit_runtime.errors import ConfigError


def uniform_noise(seed: int, scale: int, tokens: int, channels: int) -> np.ndarray:
    """Noise in [0, 1) of one picture at one scale: float32 [tokens, channels].

    The raw 64-bit outputs of Philox4x64-10 under the key (seed, scale), in order, token by token
    and within it channel by channel: u = (raw >> 40) · 2^-24. Nothing else, such as the place in
    a batch, enters. scale counts from 0, the coarsest. Raises ConfigError unless
    0 <= seed < 2^64.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"the seed is {seed}; it must be at least 0 and less than 2^64")
    key = np.array([seed, scale], dtype=np.uint64)
    # Not a Generator: NumPy may change its streams, the bit generator's output is fixed.
    raw = np.random.Philox(key=key).random_raw(tokens * channels)
    return ((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32).reshape(tokens, channels)

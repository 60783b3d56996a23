import numpy as np
import pytest

from varedit_runtime.errors import ConfigError
from varedit_runtime.noise import uniform_noise

MASK = 2**64 - 1


def philox4x64(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) as NumPy runs it: the first block has counter 1."""
    words: list[int] = []
    for block in range(1, count // 4 + 2):
        c0, c1, c2, c3 = block, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & MASK, (p0 >> 64) ^ c3 ^ k1, p0 & MASK
            k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
        words += [c0, c1, c2, c3]
    return words[:count]


@pytest.mark.parametrize(("seed", "scale"), [(0, 0), (7, 3), (2**64 - 1, 12)])
def test_noise_is_the_top_24_bits_of_philox(seed: int, scale: int):
    noise = uniform_noise(seed, scale, tokens=5, channels=6)
    expected = [(word >> 40) / 2**24 for word in philox4x64((seed, scale), 30)]
    assert noise.dtype == np.float32
    assert noise.tolist() == np.reshape(expected, (5, 6)).tolist()


def test_recorded_values():
    assert (uniform_noise(0, 0, 2, 2) * 2**24).tolist() == [[193722, 4052523], [1869415, 9469306]]
    assert (uniform_noise(2**64 - 1, 9, 1, 3) * 2**24).tolist() == [[7106554, 803039, 10597954]]


def test_a_longer_draw_starts_with_the_shorter_one():
    shorter, longer = uniform_noise(1, 2, 3, 8), uniform_noise(1, 2, 9, 8)
    assert np.array_equal(longer[:3], shorter)


def test_seed_and_scale_both_matter():
    draws = [uniform_noise(seed, scale, 4, 4) for seed in (0, 1) for scale in (0, 1)]
    assert len({draw.tobytes() for draw in draws}) == 4


def test_noise_is_uniform_below_one():
    noise = uniform_noise(5, 12, 4096, 32)
    assert noise.min() >= 0 and noise.max() < 1
    counts, _ = np.histogram(noise, bins=16, range=(0, 1))
    assert np.allclose(counts / noise.size, 1 / 16, atol=0.005)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int):
    with pytest.raises(ConfigError, match=str(seed)):
        uniform_noise(seed, 0, 1, 1)

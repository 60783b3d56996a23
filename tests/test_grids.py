from fractions import Fraction
from itertools import pairwise

import pytest

from varedit_runtime.errors import ConfigError
from varedit_runtime.grids import ASPECT_RATIOS, is_trained, picture_size, scale_grids


def ratio(aspect: str) -> Fraction:
    height, width = aspect.split(":")
    return Fraction(int(height), int(width))


def test_the_squares_of_the_published_models():
    assert scale_grids(256) == tuple((s, s) for s in (1, 2, 4, 6, 8, 12, 16))
    assert scale_grids(512) == (*scale_grids(256), (20, 20), (24, 24), (32, 32))
    assert scale_grids(1024) == (*scale_grids(512), (40, 40), (48, 48), (64, 64))


def test_there_are_seven_ratios_their_inverses_and_the_square():
    upright = {"5:4", "4:3", "3:2", "7:4", "2:1", "5:2", "3:1"}
    assert set(ASPECT_RATIOS) == upright | {a[::-1] for a in upright} | {"1:1"}
    for aspect, grids in ASPECT_RATIOS.items():
        assert ASPECT_RATIOS[aspect[::-1]] == tuple((w, h) for h, w in grids)


@pytest.mark.parametrize("aspect", ASPECT_RATIOS)
def test_grids_grow_from_one_token(aspect: str):
    grids = ASPECT_RATIOS[aspect]
    assert len(grids) == 13
    assert grids[0] == (1, 1)
    for (height, width), (next_height, next_width) in pairwise(grids):
        assert next_height >= height and next_width >= width
        assert next_height * next_width > height * width


@pytest.mark.parametrize("aspect", ASPECT_RATIOS)
def test_from_the_fourth_scale_on_grids_have_the_shape_of_their_name(aspect: str):
    for height, width in ASPECT_RATIOS[aspect][3:]:
        exact_height, exact_width = width * ratio(aspect), height / ratio(aspect)
        assert abs(height - exact_height) < 1 or abs(width - exact_width) < 1


@pytest.mark.parametrize("aspect", ASPECT_RATIOS)
@pytest.mark.parametrize(("resolution", "tolerance"), [(256, 0.25), (512, 0.06), (1024, 0.06)])
def test_pictures_have_the_ratio_of_their_name_and_about_the_pixels_of_the_square(
    resolution: int, tolerance: float, aspect: str
):
    height, width = picture_size(resolution, aspect)
    assert Fraction(height, width) == ratio(aspect)
    assert height * width == pytest.approx(resolution**2, rel=tolerance)


def test_only_squares_are_trained():
    assert [aspect for aspect in ASPECT_RATIOS if is_trained(aspect)] == ["1:1"]


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(ConfigError, match="256, 512, 1024"):
        scale_grids(768)
    with pytest.raises(ConfigError, match=r"1:1, 5:4, .*1:3"):
        scale_grids(512, "16:9")
    with pytest.raises(ConfigError, match="16:9"):
        is_trained("16:9")

"""JPEG compression as a degradation."""

import numpy as np
import pytest

from tsdsr.imaging import jpeg_round_trip


def error(rgb, quality):
    return np.abs(jpeg_round_trip(rgb, quality).astype(int) - rgb).mean()


def test_shape_type_and_a_new_array(ramp):
    before = ramp.copy()
    result = jpeg_round_trip(ramp, 60)
    assert result.shape == ramp.shape and result.dtype == np.uint8
    result[:] = 0  # writable, and not the input
    assert np.array_equal(ramp, before)


def test_repeatable(noise):
    assert np.array_equal(jpeg_round_trip(noise, 30), jpeg_round_trip(noise, 30))


def test_lower_quality_loses_more(noise):
    errors = [error(noise, quality) for quality in (95, 50, 10)]
    assert errors[0] < errors[1] < errors[2]


def test_smooth_pictures_survive_high_quality(ramp):
    assert error(ramp, 100) < 2


def test_chroma_is_halved(noise):
    """With 4:2:0, pixels of one 2x2 block share their chroma: colour noise is lost even at quality 100."""
    assert error(noise, 100) > 15


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 3)])
def test_odd_sizes(size):
    assert jpeg_round_trip(np.full((*size, 3), 200, np.uint8), 90).shape == (*size, 3)


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_refuses_a_quality(ramp, quality):
    with pytest.raises(ValueError, match=r"1\.\.100"):
        jpeg_round_trip(ramp, quality)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_refuses_an_array(array):
    with pytest.raises(ValueError, match="uint8"):
        jpeg_round_trip(array, 50)

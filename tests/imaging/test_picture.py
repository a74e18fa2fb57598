"""The picture itself: what it refuses, and what it keeps when its pixels change."""

import numpy as np
import pytest

from tsdsr.imaging import Picture
from tsdsr.imaging.picture import luma


def pixels(height=4, width=6, value=0.5):
    return np.full((height, width, 3), value, dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"rgb": np.zeros((4, 6), np.float32)}, "height, width, 3"),
        ({"rgb": np.zeros((4, 6, 4), np.float32)}, "height, width, 3"),
        ({"rgb": np.zeros((0, 6, 3), np.float32)}, "height, width, 3"),
        ({"rgb": np.zeros((4, 6, 3), np.uint8)}, "floating point"),
        ({"rgb": pixels(), "alpha": np.zeros((6, 4), np.float32)}, "alpha"),
        ({"rgb": pixels(), "bit_depth": 12}, "bit_depth"),
    ],
)
def test_refuses(arguments, part):
    with pytest.raises(ValueError, match=part):
        Picture(**arguments)


def test_double_precision_becomes_single():
    picture = Picture(pixels().astype(np.float64), alpha=np.ones((4, 6)))
    assert picture.rgb.dtype == picture.alpha.dtype == np.float32
    assert (picture.height, picture.width) == (4, 6)


def test_luma_leaves_grey_alone_and_weighs_colour():
    values = np.linspace(0, 1, 65536, dtype=np.float32).reshape(256, 256)
    same = luma(np.repeat(values[..., None], 3, axis=2))
    assert np.array_equal(np.rint(same * 65535), np.rint(values * 65535))
    np.testing.assert_allclose(luma(np.eye(3, dtype=np.float32)[None])[0], [0.299, 0.587, 0.114], atol=1e-6)


def test_with_rgb_keeps_everything_else():
    picture = Picture(
        pixels(), bit_depth=16, icc_profile=b"profile", exif=b"Exif\0\0", dpi=(300.0, 150.0), text={"Author": "me"}
    )
    larger = picture.with_rgb(pixels(16, 24, 0.25))
    assert (larger.height, larger.width) == (16, 24)
    assert np.all(larger.rgb == 0.25)
    assert (larger.bit_depth, larger.icc_profile, larger.exif) == (16, b"profile", b"Exif\0\0")
    assert larger.text == {"Author": "me"} and larger.text is not picture.text
    assert larger.alpha is None and not larger.grey
    assert np.all(picture.rgb == 0.5) and picture.rgb.shape == (4, 6, 3)


def test_resolution_keeps_the_printed_size():
    picture = Picture(pixels(4, 6), dpi=(300.0, 150.0))
    larger = picture.with_rgb(pixels(10, 24))
    assert larger.dpi == pytest.approx((1200.0, 375.0))
    assert picture.with_rgb(pixels(4, 6)).dpi == (300.0, 150.0)


def test_alpha_of_the_same_size_is_untouched():
    alpha = np.random.default_rng(1).random((4, 6), dtype=np.float32)
    assert np.array_equal(Picture(pixels(), alpha=alpha).with_rgb(pixels(value=1.0)).alpha, alpha)


def test_alpha_is_resized_with_its_edges_in_place():
    alpha = np.zeros((8, 8), dtype=np.float32)
    alpha[:, 4:] = 1
    larger = Picture(pixels(8, 8), alpha=alpha).with_rgb(pixels(32, 24)).alpha
    assert larger.shape == (32, 24) and larger.dtype == np.float32
    assert larger.min() == 0 and larger.max() == 1  # the overshoot of the bicubic filter is clipped
    assert np.all(larger[:, :9] < 0.1) and np.all(larger[:, 15:] > 0.9)
    np.testing.assert_allclose(larger[:, 11] + larger[:, 12], 1, atol=1e-5)


def test_alpha_is_finer_than_8_bits():
    alpha = np.full((4, 4), 0.3, dtype=np.float32)
    np.testing.assert_allclose(Picture(pixels(4, 4), alpha=alpha).with_rgb(pixels(9, 9)).alpha, 0.3, atol=1e-6)


def test_grey_stays_grey():
    picture = Picture(pixels(), grey=True)
    red = np.zeros((4, 6, 3), dtype=np.float32)
    red[..., 0] = 1
    result = picture.with_rgb(red)
    assert result.grey
    np.testing.assert_allclose(result.rgb, 0.299, atol=1e-6)


def test_values_outside_are_clipped():
    result = Picture(pixels()).with_rgb(np.array([[[-1.0, 0.5, 2.0]]]))
    assert result.rgb.tolist() == [[[0.0, 0.5, 1.0]]]


def test_with_rgb_refuses_what_a_picture_refuses():
    with pytest.raises(ValueError, match="floating point"):
        Picture(pixels()).with_rgb(np.zeros((4, 6, 3), np.uint8))


def test_pixels_stay_in_their_depth():
    """A photograph of 8 bits takes three bytes a pixel, however it is looked at."""
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    picture = Picture(pixels=pixels)
    rows = picture.rows(1, 3)
    assert picture.pixels is pixels and picture.bit_depth == 8 and (picture.height, picture.width) == (4, 5)
    assert rows.dtype == np.float32 and rows.flags.c_contiguous
    assert np.array_equal(rows, pixels[1:3] / np.float32(255))
    assert np.array_equal(picture.rgb, pixels / np.float32(255)) and picture.alpha is None


def test_grey_and_alpha_of_16_bits():
    pixels = np.array([[[0, 65535], [65535, 0]]], dtype=np.uint16)
    picture = Picture(pixels=pixels)
    assert picture.grey and picture.has_alpha and picture.bit_depth == 16
    assert picture.rgb.tolist() == [[[0, 0, 0], [1, 1, 1]]] and picture.alpha.tolist() == [[1, 0]]
    assert picture.rows(0, 1).tolist() == [[[0, 0, 0], [0, 0, 0]]]  # what is hidden is as its neighbour


def test_nothing_visible_is_grey():
    picture = Picture(pixels=np.full((3, 4, 4), (255, 0, 0, 0), np.uint8))
    assert np.array_equal(picture.rows(0, 3), np.full((3, 4, 3), 0.5, np.float32))


@pytest.mark.parametrize("bounds", [(-1, 2), (0, 5), (3, 2)])
def test_rows_that_are_not_there(bounds):
    with pytest.raises(ValueError, match="rows"):
        Picture(pixels=np.zeros((4, 4, 3), np.uint8)).rows(*bounds)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((4, 4), np.uint8), "shape"),
        (np.zeros((4, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros((4, 4, 3), np.int32), "int32"),
    ],
)
def test_refuses_pixels(pixels, words):
    with pytest.raises(ValueError, match=words):
        Picture(pixels=pixels)

"""Sizes and tiles: pure functions."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tsdsr.pipelines.tiling import (
    count_tiles,
    gaussian_weights,
    pad_to_multiple,
    reduce_bicubic,
    run_tiled,
    tile_starts,
    working_size,
)


@pytest.mark.parametrize(
    ("size", "upscale", "process_size", "expected"),
    [
        ((128, 128), 4, 512, (512, 512)),
        ((200, 300), 4, 512, (800, 1200)),
        ((70, 131), 4, 512, (512, 956)),  # published: int(131 * 128 / 70) * 4
        ((64, 64), 2, 512, (512, 512)),
        ((64, 64), 4, 0, (256, 256)),
        ((1, 1), 4, 512, (512, 512)),
        ((100, 100), 1000, 512, (100000, 100000)),
    ],
)
def test_working_size(size, upscale, process_size, expected):
    target = (round(size[0] * upscale), round(size[1] * upscale))
    assert working_size(size, target, upscale, process_size) == expected


def test_working_size_of_a_strip_is_bounded():
    height, width = working_size((1, 700), (4, 2800), 4, 512)
    assert width == 2800 and height < 512
    height, width = working_size((3, 100), (12, 400), 4, 512)
    assert width <= 4 * 512 and height >= 12


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (8, 8), (5, 13)])
def test_padding_keeps_the_picture_in_the_corner(height, width):
    images = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(images, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert padded.shape[-2] < height + 8 and padded.shape[-1] < width + 8
    assert torch.equal(padded[..., :height, :width], images)
    assert set(padded.unique().tolist()) <= set(images.unique().tolist())


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(64, 64, 8), (65, 64, 8), (500, 64, 8), (120, 64, 0), (7, 9, 1)]
)
def test_tiles_cover_every_pixel_and_end_at_the_border(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    covered = torch.zeros(length)
    for start in starts:
        covered[start : start + tile] += 1
        assert start >= 0 and (start + tile <= length or len(starts) == 1)
    assert covered.min() >= 1
    assert all(later - earlier <= tile - overlap for earlier, later in pairwise(starts))


def test_weights_are_centred_on_the_tile():
    weights = gaussian_weights(6, 9)
    assert torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))
    assert weights.argmax() in (2 * 9 + 4, 3 * 9 + 4)
    # variance 0.01 in units of the side: exp(-0.5 * (1/9)^2 / 0.01) one pixel beside the centre
    assert weights[2, 5] / weights[2, 4] == pytest.approx(torch.exp(torch.tensor(-((1 / 9) ** 2) / 0.02)).item())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pointwise_functions_do_not_notice_tiling(batch_size):
    x = torch.rand(2, 3, 37, 50)
    counts = []
    result = run_tiled(
        lambda t: 2 * t + 1, x, 16, 4, batch_size, on_tiles_done=lambda corners, _, __: counts.append(len(corners))
    )
    torch.testing.assert_close(result, 2 * x + 1)
    assert sum(counts) == count_tiles(37, 50, 16, 4) and max(counts) <= batch_size


@pytest.mark.parametrize("scale", [Fraction(2), Fraction(1, 2)])
def test_scaling_functions_land_in_their_place(scale):
    x = torch.rand(1, 3, 40, 56)

    def resize(t):
        return torch.nn.functional.interpolate(t, scale_factor=float(scale), mode="area" if scale < 1 else "nearest")

    torch.testing.assert_close(run_tiled(resize, x, 16, 4, scale=scale), resize(x))


def test_neighbours_are_blended_smoothly():
    """Two tiles that disagree by one level meet without a step."""
    calls = iter((0.0, 1.0))
    result = run_tiled(lambda t: torch.full_like(t, next(calls)), torch.zeros(1, 1, 64, 112), 64, 16)[0, 0, 0]
    assert result[0] == 0 and result[-1] == 1
    assert (result.diff() >= 0).all() and result.diff().max() < 0.35


def test_reduction_is_what_pillow_does():
    """Also on hard edges, where the filter overshoots: within one level of 8-bit Pillow."""
    image = (torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pillow = Image.fromarray((image[0] * 255).permute(1, 2, 0).byte().numpy()).resize((25, 17))
    ours = reduce_bicubic(image, (17, 25))[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(ours, np.asarray(pillow), atol=1.01)

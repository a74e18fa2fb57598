"""Sizes and tiles: pure functions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tsdsr.pipelines.strips import Rows, Work
from tsdsr.pipelines.tiling import (
    TilePlan,
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
    ("length", "tile", "overlap", "grain"),
    [
        (64, 64, 8, 2),
        (66, 64, 8, 2),
        (500, 64, 8, 2),
        (120, 64, 0, 1),
        (7, 9, 1, 1),
        (1000, 64, 16, 4),
        (121, 40, 39, 1),
    ],
)
def test_tiles_cover_every_pixel_evenly(length, tile, overlap, grain):
    starts = tile_starts(length, tile, overlap, grain)
    assert starts[0] == 0 and starts[-1] == max(0, length - tile)
    assert all(start % grain == 0 for start in starts)
    steps = [later - earlier for earlier, later in pairwise(starts)]
    assert all(0 < step <= tile - overlap for step in steps)
    # No sliver: all steps alike, and one tile fewer would not do.
    assert not steps or max(steps) - min(steps) <= grain
    assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) + tile < length


def test_weights_are_centred_on_the_tile():
    weights = gaussian_weights(9)
    assert torch.equal(weights, weights.flip(0)) and weights.argmax() == 4
    # variance 0.01 in units of the side: exp(-0.5 * (1/9)^2 / 0.01) one pixel beside the centre
    assert weights[5] / weights[4] == pytest.approx(torch.exp(torch.tensor(-((1 / 9) ** 2) / 0.02)).item())


@pytest.mark.parametrize(("height", "width"), [(37, 50), (16, 50), (16, 16), (200, 40)])
def test_weights_of_a_pixel_sum_to_one_and_change_smoothly(height, width):
    plan = TilePlan.even((height, width), 16, 4)
    total = torch.zeros(height, width)
    down, across = plan.weights()
    for top, rows in zip(plan.tops, down, strict=True):
        for left, columns in zip(plan.lefts, across, strict=True):
            total[top : top + 16, left : left + 16] += torch.outer(rows, columns)
            # At a tile's edge it hardly counts, so that it brings no step with it.
            assert top == 0 or rows[0] < 0.02
            assert left + 16 == width or columns[-1] < 0.02
    torch.testing.assert_close(total, torch.ones(height, width))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("by_rows", [False, True])
def test_pointwise_functions_do_not_notice_tiling(batch_size, by_rows):
    x = torch.rand(2, 3, 37, 50)
    counts, plan = [], TilePlan.even((37, 50), 16, 4)
    result = run_tiled(
        lambda t: 2 * t + 1,
        Rows.of(x, Work(strips=9)) if by_rows else x,
        plan,
        batch_size,
        on_tiles_done=lambda corners, _, __: counts.append(len(corners)),
    )
    torch.testing.assert_close(result.whole() if by_rows else result, 2 * x + 1)
    assert sum(counts) == len(plan.corners) == 12 and max(counts) <= batch_size
    assert len(counts) == -(-12 // batch_size)


def test_tiles_of_a_map_are_run_only_when_their_rows_are_read():
    x, seen = torch.rand(1, 3, 64, 16), []
    blended = run_tiled(
        lambda t: t,
        Rows.of(x),
        TilePlan.even((64, 16), 16, 4),
        on_tiles_done=lambda corners, _, __: seen.extend(corners),
    )
    torch.testing.assert_close(blended.rows(0, 10), x[..., :10, :])
    assert seen == [(0, 0)]
    torch.testing.assert_close(blended.rows(10, 30), x[..., 10:30, :])
    assert [top for top, _ in seen] == [0, 12, 24]


def test_neighbours_are_blended_smoothly():
    """Two tiles that disagree by one level meet without a step."""
    calls = iter((0.0, 1.0))
    plan = TilePlan.even((64, 112), 64, 16)
    result = run_tiled(lambda t: torch.full_like(t, next(calls)), torch.zeros(1, 1, 64, 112), plan)[0, 0, 0]
    assert result[0] == 0 and result[-1] == 1
    assert (result.diff() >= 0).all() and result.diff().max() < 0.35


def test_reduction_is_what_pillow_does():
    """Also on hard edges, where the filter overshoots: within one level of 8-bit Pillow."""
    image = (torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pillow = Image.fromarray((image[0] * 255).permute(1, 2, 0).byte().numpy()).resize((25, 17))
    ours = reduce_bicubic(image, (17, 25))[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(ours, np.asarray(pillow), atol=1.01)

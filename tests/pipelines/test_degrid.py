"""The network's grid taken off, as a function and as an option of the pipeline."""

from pathlib import Path

import pytest
import torch

from tsdsr import TSDSRPipeline
from tsdsr.evaluation.metrics.artefacts import grid_score
from tsdsr.imaging import read
from tsdsr.pipelines.degrid import GRID_PERIOD, period_mean, remove_grid
from tsdsr.pipelines.strips import Rows, Work

SMALL = {"process_size": 32, "tile_size": 64, "tile_overlap": 16}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pattern(period, height, width, levels=1.0, seed=0):
    """Grey noise (1, 1, height, width) of this deviation in levels, the same in every window of `period`."""
    tile = noise(period, period, seed=seed)
    tile = (tile - tile.mean()) / tile.std() * levels / 255
    return tile.repeat(height // period + 1, width // period + 1)[None, None, :height, :width]


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_grid_on_flat_parts_goes_up_to_the_borders(period):
    flat = torch.tensor([0.3, 0.5, 0.6]).view(1, 3, 1, 1).expand(2, 3, 150, 131)
    spoiled = flat + pattern(period, 150, 131)
    rest = (remove_grid(spoiled, 8.0) - flat) * 255
    # Means over a period are of what is repeated beyond borders.
    assert rest.abs().max() < 0.6 and rest[..., 48:-48, 48:-48].abs().max() < 0.02


def test_the_mean_over_a_period_of_what_is_periodic_is_one_number():
    means = period_mean(pattern(GRID_PERIOD, 96, 96, levels=255))[..., 8:-8, 8:-8]
    assert float(means.std()) < 1e-5


def test_texture_neither_hides_the_grid_beside_it_nor_goes():
    picture = torch.full((1, 3, 160, 320), 0.5)
    picture[..., 160:] += 30 / 255 * noise(1, 3, 160, 160)
    spoiled = picture + pattern(16, 160, 320)
    change = (remove_grid(spoiled, 8.0) - spoiled) * 255
    rest = (remove_grid(spoiled, 8.0) - picture) * 255
    assert float(rest[..., :144].std()) < 0.15  # of 1
    # Of noise with a deviation of 30 (17 of its mean over three channels), 25 windows share a fifth.
    assert float(change[..., 176:].std()) < 17 / 4


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_no_more_than_the_limit_is_taken_off(limit):
    images = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    change = (remove_grid(images, limit) - images).abs().max() * 255
    assert limit * 0.99 < float(change) < limit + 1e-3
    assert remove_grid(images, 0.0) is images


def test_what_repeats_otherwise_stays():
    columns = torch.arange(240.0)
    for stripes in (torch.sin(columns * 2 * torch.pi / 10), columns / 240):
        picture = (0.5 + 0.1 * stripes).expand(1, 3, 160, 240)
        change = (remove_grid(picture, 5.0) - picture) * 255
        assert float(change[..., 48:-48].abs().max()) < 0.3


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (40, 17), (200, 60)])
def test_strips_are_the_whole(size):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    whole = remove_grid(images, 4.0)
    strips = remove_grid(Rows.of(images, Work(strips=7)), 4.0)
    assert isinstance(strips, Rows)
    torch.testing.assert_close(strips.whole(), whole, atol=1e-6, rtol=0)


def test_a_photograph_loses_its_grid_and_nothing_else():
    picture = read(Path(__file__).parents[1] / "fixtures" / "flower.webp").rgb
    photo = torch.from_numpy(picture).movedim(-1, 0)[None]
    clean, spoiled = grid_score(photo), photo + pattern(16, *photo.shape[-2:], levels=1.5)
    mended = remove_grid(spoiled, 4.0)
    assert grid_score(spoiled) > clean + 0.3 and grid_score(mended) < clean + 0.02
    assert (mended - photo).square().mean() < 0.5 * (spoiled - photo).square().mean()


def test_pipeline_does_what_its_config_says_unless_a_call_says_otherwise(make_pipeline, picture, tmp_path):
    image = picture(24, 20)
    plain = make_pipeline("tiny")
    assert plain.config.degrid == 0
    arguments = {"output_type": "pt", "color_fix": "none", **SMALL}
    without = plain(image, **arguments).images
    plain.register_to_config(degrid=2.0)
    plain.save_pretrained(tmp_path / "model")
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.config.degrid == 2
    assert not torch.equal(remove_grid(without, 2.0), without)
    torch.testing.assert_close(pipeline(image, **arguments).images, remove_grid(without, 2.0))
    torch.testing.assert_close(pipeline(image, degrid=0, **arguments).images, without)
    torch.testing.assert_close(pipeline(image, degrid=7.5, **arguments).images, remove_grid(without, 7.5))


def test_it_is_done_at_the_size_that_the_network_works_at(make_pipeline, picture):
    pipeline = make_pipeline("tiny")
    image, arguments = picture(24, 20), {"output_type": "pt", "color_fix": "none", "tile_size": 64, "tile_overlap": 16}
    large = pipeline(image, process_size=160, upscale=8, degrid=5.0, **arguments).images
    reduced = torch.nn.functional.interpolate(large, (96, 80), mode="bicubic", antialias=True).clamp(0, 1)
    found = pipeline(image, process_size=160, upscale=4, degrid=5.0, **arguments).images
    torch.testing.assert_close(found, reduced, atol=1e-3, rtol=0)

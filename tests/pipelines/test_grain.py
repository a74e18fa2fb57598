"""Grain as a function and as an option of the pipeline."""

import math

import numpy as np
import pytest
import torch

from tsdsr import TSDSRPipeline
from tsdsr.pipelines.grain import BLUR, PERIOD, UNBLURRED, add_grain, grain_texture

SMALL = {"process_size": 32, "tile_size": 64, "tile_overlap": 16}


def test_texture_is_blurred_noise_that_repeats():
    texture = grain_texture()
    assert texture.shape == (PERIOD, PERIOD)
    assert abs(float(texture.mean())) < 1e-5 and float(texture.std()) == pytest.approx(1, abs=1e-4)
    for distance in (1, 2, 4):  # over its border too
        for dim in (0, 1):
            alike = float((texture * texture.roll(distance, dim)).mean())
            blurred = math.exp(-(distance**2) / (4 * BLUR**2)) / (1 + UNBLURRED**2)
            assert alike == pytest.approx(blurred, abs=0.03)
    assert float((texture[0] * texture[-1]).mean()) > 0.7


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 1.0])
def test_deviation_is_in_levels_and_follows_the_luma(level):
    grain = (add_grain(torch.full((2, 3, 300, 280), level), 4.0) - level) * 255
    assert float(grain.std()) == pytest.approx(4 * 2 * math.sqrt(level * (1 - level)), rel=0.05, abs=1e-6)
    assert torch.equal(grain[:, 0], grain[:, 2]) and torch.equal(grain[0], grain[1])


def test_result_is_clamped_and_none_is_none():
    images = torch.rand(1, 3, 40, 600, generator=torch.Generator().manual_seed(0))
    assert add_grain(images, 0.0) is images
    strong = add_grain(images, 200.0)
    assert float(strong.min()) == 0 and float(strong.max()) == 1
    grey = add_grain(torch.full((1, 3, 4, PERIOD + 9), 0.5), 2.0)
    torch.testing.assert_close(grey[..., :9], grey[..., PERIOD:])


def test_pipeline_adds_what_its_config_says_unless_a_call_says_otherwise(make_pipeline, picture, tmp_path):
    image = picture(24, 20)
    plain = make_pipeline("tiny")
    assert plain.config.grain == 0
    without = plain(image, output_type="pt", **SMALL).images
    plain.register_to_config(grain=2.0)
    plain.save_pretrained(tmp_path / "model")
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.config.grain == 2
    torch.testing.assert_close(pipeline(image, output_type="pt", **SMALL).images, add_grain(without, 2.0))
    torch.testing.assert_close(pipeline(image, output_type="pt", grain=0, **SMALL).images, without)
    torch.testing.assert_close(pipeline(image, output_type="pt", grain=7.5, **SMALL).images, add_grain(without, 7.5))
    pipeline.bake()
    pipeline.save_pretrained(tmp_path / "baked")
    assert TSDSRPipeline.from_pretrained(tmp_path / "baked").config.grain == 2


def test_grain_does_not_depend_on_tiles_or_neighbours(make_pipeline, picture):
    pipeline, images = make_pipeline("tiny", grain=30.0), [picture(40, 40), picture(24, 20, seed=1)]
    arguments = {**SMALL, "output_type": "pt", "vae_tile_size": 32}
    for image, result in zip(images, pipeline(images, **arguments).images, strict=True):
        plain = pipeline(image, grain=0, **arguments).images
        torch.testing.assert_close(result[None], add_grain(plain, 30.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["grain", "degrid"])
@pytest.mark.parametrize("levels", [-1, 256, "much", float("nan")])
def test_what_is_no_number_of_levels_is_said(make_pipeline, name, levels):
    with pytest.raises(ValueError, match=f"`{name}` must be a number from 0 to 255 levels, not"):
        make_pipeline("tiny")(np.zeros((16, 16, 3), np.uint8), **{name: levels})

"""The model that ships with the package, on a photograph it was not trained on."""

from pathlib import Path

import pytest
import torch

from tsdsr import describe, load_pipeline
from tsdsr.imaging import read
from tsdsr.training.degradation import DegradationConfig, degrade
from tsdsr.training.validation import bicubic, psnr_y


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline("embedded", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def photograph():
    rgb = read(Path(__file__).parent / "fixtures" / "flower.webp").rgb
    return torch.from_numpy(rgb).permute(2, 0, 1)[None]


def test_better_than_bicubic_on_damaged_photographs(pipeline, photograph):
    gains = []
    for seed in range(4):
        lq = degrade(photograph, torch.Generator().manual_seed(seed))
        result = pipeline(lq, output_type="pt").images
        gains.append(psnr_y(result, photograph) - psnr_y(bicubic(lq, photograph.shape[-2:]), photograph))
    assert sum(gains) / len(gains) > 0.5, gains


def test_sharper_than_bicubic_and_still_faithful_on_mildly_damaged_ones(pipeline, photograph):
    lq = degrade(photograph, torch.Generator().manual_seed(0), DegradationConfig.mild())
    plain = bicubic(lq, photograph.shape[-2:])
    result = pipeline(lq, output_type="pt").images
    assert psnr_y(result, photograph) > psnr_y(plain, photograph) - 2  # the cost of sharp edges a little off

    def edges(image):
        return float(image.diff(dim=-1).square().mean() + image.diff(dim=-2).square().mean())

    assert 1.5 * edges(plain) < edges(result) < 1.5 * edges(photograph)


def test_colours_stay(pipeline, photograph):
    lq = degrade(photograph, torch.Generator().manual_seed(0), DegradationConfig.mild())
    result = pipeline(lq, output_type="pt", color_fix="none").images
    assert (result.mean((0, 2, 3)) - lq.mean((0, 2, 3))).abs().max() < 0.02


def test_description():
    facts = describe("embedded")
    assert facts["kind"] == "TSD-SR pipeline folder" and facts["dtype"] == "float16"
    assert facts["size_bytes"] <= 16 * 2**20
    assert facts["licence"] not in (None, "unknown")

"""Colour corrections as pure functions, against their definitions and scikit-image."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from tsdsr.pipelines.color import COLOR_FIXES, lab_to_rgb, rgb_to_lab, wavelet_low_frequencies


def smooth(height, width, seed=0):
    noise = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)


def test_low_frequencies_are_the_published_kernel():
    """One level equals the 3x3 kernel (1 2 1)/4 x (1 2 1)/4; five levels keep a constant and weigh to one."""
    image = torch.zeros(1, 3, 9, 9)
    image[0, 1, 4, 4] = 16
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(wavelet_low_frequencies(image, levels=1)[0, 1, 3:6, 3:6], expected)
    flat = torch.full((1, 3, 5, 7), 0.3)
    torch.testing.assert_close(wavelet_low_frequencies(flat), flat)


def test_wavelet_takes_colour_from_the_reference_and_detail_from_the_picture():
    reference = smooth(20, 24)
    detail = 0.02 * torch.randn(2, 3, 80, 96, generator=torch.Generator().manual_seed(1))
    enlarged = torch.nn.functional.interpolate(reference, size=(80, 96), mode="bicubic", antialias=True)
    cast = torch.tensor([0.1, -0.05, 0.02]).view(1, 3, 1, 1)
    fixed = COLOR_FIXES["wavelet"](enlarged * 0.8 + 0.1 + detail + cast, (reference * 0.8 + 0.1))
    torch.testing.assert_close(fixed, enlarged * 0.8 + 0.1 + detail, atol=0.03, rtol=0)
    assert (fixed - (enlarged * 0.8 + 0.1 + detail)).mean((0, 2, 3)).abs().max() < 1e-3


def test_adain_gives_mean_and_deviation_of_the_reference():
    images, reference = smooth(40, 40) * 0.3 + 0.2, smooth(10, 10, seed=2) * 0.3 + 0.4
    fixed = COLOR_FIXES["adain"](images, reference)
    torch.testing.assert_close(fixed.mean((2, 3)), reference.mean((2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(fixed.std((2, 3)), reference.std((2, 3)), atol=1e-3, rtol=0)


def test_lab_agrees_with_scikit_image():
    rgb = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = rgb2lab(rgb[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(rgb_to_lab(rgb)[0].permute(1, 2, 0).numpy(), expected, atol=0.02)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb)), rgb, atol=1e-4, rtol=0)


def test_lab_moves_mean_lightness_to_the_reference():
    images, reference = smooth(40, 40) * 0.3 + 0.1, smooth(10, 10, seed=2) * 0.3 + 0.4
    fixed = COLOR_FIXES["lab"](images, reference)
    torch.testing.assert_close(rgb_to_lab(fixed).mean((2, 3)), rgb_to_lab(reference).mean((2, 3)), atol=0.3, rtol=0)


@pytest.mark.parametrize("name", COLOR_FIXES)
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (33, 17)])
def test_every_size_and_every_batch_alone(name, size):
    """Finite for pictures of one pixel and for constant ones; a batch equals its pictures one by one."""
    images, reference = smooth(4 * size[0], 4 * size[1]), smooth(*size, seed=1)
    fixed = COLOR_FIXES[name](images, reference)
    assert fixed.shape == images.shape and torch.isfinite(fixed).all() and fixed.min() >= 0 and fixed.max() <= 1
    torch.testing.assert_close(fixed[1:], COLOR_FIXES[name](images[1:], reference[1:]))
    assert torch.isfinite(COLOR_FIXES[name](torch.full_like(images, 0.5), torch.zeros_like(reference))).all()

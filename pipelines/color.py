"""Colour correction of an enlarged picture by the small one it came from.

Pure functions on batches (B, 3, H, W), float, values 0..1, any device; results are clamped to 0..1. Maps that are
worked on strip by strip (`Rows`) come out as such.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .strips import Rows, per_pixel

WAVELET_LEVELS = 5


def wavelet_low_frequencies(images: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """A-trous low-pass (published `wavelet_blur`): the 3x3 binomial with dilations 1, 2, 4, ..., borders repeated."""
    taps = images.new_tensor([0.25, 0.5, 0.25])
    # The kernel is separable: two passes of three taps give the 3x3 binomial.
    horizontal = taps.view(1, 1, 1, 3).repeat(images.shape[1], 1, 1, 1)
    vertical = taps.view(1, 1, 3, 1).repeat(images.shape[1], 1, 1, 1)
    for level in range(levels):
        radius = 2**level
        images = F.pad(images, (radius, radius, radius, radius), mode="replicate")
        images = F.conv2d(images, horizontal, dilation=(1, radius), groups=images.shape[1])
        images = F.conv2d(images, vertical, dilation=(radius, 1), groups=images.shape[1])
    return images


def wavelet_color_fix(images: Tensor, reference: Tensor) -> Tensor:
    """High frequencies of `images` on the low frequencies of `reference`, which is enlarged (bicubic) to their size."""
    # Antialiased bicubic is the convolution that image libraries use (a = -0.5); enlarging, it only interpolates.
    reference = F.interpolate(reference, size=images.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return (images + wavelet_low_frequencies(reference - images)).clamp(0, 1)


def _match_statistics(images: Tensor, reference: Tensor) -> Tensor:
    """Per channel, give `images` the mean and standard deviation (variance + 1e-5) of `reference`."""

    def mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(x, Rows):
            mean, variance = x.moments()
        else:
            flat = x.flatten(2)
            mean, variance = flat.mean(dim=2), flat.var(dim=2, correction=min(1, flat.shape[2] - 1))
        return mean[..., None, None], (variance + 1e-5).sqrt()[..., None, None]

    mean, std = mean_and_std(images)
    reference_mean, reference_std = mean_and_std(reference)
    return (images - mean) / std * reference_std + reference_mean


def adain_color_fix(images: Tensor, reference: Tensor) -> Tensor:
    """Mean and standard deviation of each RGB channel of the small picture (published `adain_color_fix`)."""
    return _match_statistics(images, reference).clamp(0, 1)


# sRGB (IEC 61966-2-1) to CIE XYZ, scaled so that white (D65) is (1, 1, 1).
_RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_WHITE = (0.9504700, 1.0, 1.0888300)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB 0..1 to CIELAB (D65): L 0..100, a and b about -128..127."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images.clamp(min=0) + 0.055) / 1.055).pow(2.4))
    matrix = images.new_tensor(_RGB_TO_XYZ) / images.new_tensor(_WHITE)[:, None]
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-8).pow(1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(images: Tensor) -> Tensor:
    """CIELAB (D65) to sRGB; colours outside sRGB come out below 0 or above 1."""
    lightness, a, b = images.unbind(1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    xyz = torch.where(f > 6 / 29, f.pow(3), 3 * (6 / 29) ** 2 * (f - 4 / 29))
    matrix = torch.linalg.inv(images.new_tensor(_RGB_TO_XYZ) / images.new_tensor(_WHITE)[:, None])
    linear = torch.einsum("ij,bjhw->bihw", matrix, xyz)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=1e-8).pow(1 / 2.4) - 0.055)


def lab_color_fix(images: Tensor, reference: Tensor) -> Tensor:
    """Mean and standard deviation of L, a and b of the small picture: colours move together with lightness."""
    matched = _match_statistics(per_pixel(rgb_to_lab, images), per_pixel(rgb_to_lab, reference))
    return per_pixel(lab_to_rgb, matched).clamp(0, 1)


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, "lab": lab_color_fix}

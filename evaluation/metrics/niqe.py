"""NIQE: how far the statistics of a picture are from those of undistorted photographs; no ground truth, no network.

`niqe_parameters.safetensors` holds mean and covariance of the photographs' features: the numbers of the authors'
release, with its notice in the metadata.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from .luma import check, filtered, gaussian, levels


def niqe(sr: Tensor) -> float:
    """Natural image quality evaluator (Mittal et al. 2013) of a picture (1, 3, H, W), 0..1; lower is more natural.

    Distance between Gaussian models of 36 features of 96x96 blocks, of the picture's and of photographs' (equation 10).
    As pyiqa's "niqe", with which OSEDiff, TSD-SR and others measured: on the luma of YIQ, 0..255. Programs that take Y
    of YCbCr find about 0.04 more. What is left of whole blocks at the right and the bottom does not count.

    Raises:
        ValueError: for several pictures, one of less than 96x96 pixels, or one that is flat in every block.
    """
    check(sr, least=96)
    y = _rounded_luma(sr)
    y = y[..., : y.shape[2] // 96 * 96, : y.shape[3] // 96 * 96]
    features = torch.cat([_features(_blocks(_normalised(y), 96)), _features(_blocks(_normalised(_half(y)), 48))], 1)
    whole = features[~features.isnan().any(1)]
    if not len(whole):
        raise ValueError("The picture is flat in every block of 96x96 pixels, so that NIQE is not defined for it.")
    covariance = torch.cov(whole.T, correction=1 if len(whole) > 1 else 0)
    photographs = load_file(Path(__file__).with_name("niqe_parameters.safetensors"), device=str(y.device))
    difference = photographs["mean"] - features.nanmean(0)
    pooled = (photographs["covariance"] + covariance) / 2
    return float((difference @ torch.linalg.pinv(pooled) @ difference).sqrt())


def _rounded_luma(picture: Tensor) -> Tensor:
    """Y of YIQ (1, 1, H, W) in whole levels.

    One colour in a thousand lies half-way between two levels, where the last bit decides, and that moves NIQE by up to
    0.03. The published figures were measured on a GPU: this rounds as it does (product with the reciprocal of 255,
    fused multiply-adds, float32), on any device.
    """
    rgb = levels(picture).float() * (1 / 255)
    y = torch.zeros_like(rgb[:, 0])
    for channel, weight in zip(rgb.unbind(1), torch.tensor([0.299, 0.587, 0.114]).double().tolist(), strict=True):
        y = (channel.double() * weight + y).float()
    return (y * 255).round().double()[:, None]


def _normalised(y: Tensor) -> Tensor:
    """Luma less its local mean, by its local deviation (equation 1), with a Gaussian window of 7x7."""
    window = gaussian(7, 7 / 6)
    # A window rounded to float32 sums to 1 + 1e-8, which is what makes flat areas count as below their mean in pyiqa.
    exact = torch.tensor(window, dtype=torch.float64)
    rounded_sum = float(torch.outer(exact, exact).float().double().sum())
    window = [weight * rounded_sum**0.5 for weight in window]
    padded = F.pad(y, (3, 3, 3, 3), mode="replicate")
    mean = filtered(padded, window, window)
    return (y - mean) / ((filtered(padded**2, window, window) - mean**2).abs().sqrt() + 1)


def _half(y: Tensor) -> Tensor:
    """Half the size, as MATLAB's `imresize`: bicubic over 8 pixels, mirrored at the borders."""
    inner = [1.5 * x**3 - 2.5 * x**2 + 1 for x in (0.75, 0.25, 0.25, 0.75)]
    outer = [-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 for x in (1.75, 1.25)]
    window = [weight / 2 for weight in (*outer, *inner, *reversed(outer))]
    for dim in (2, 3):
        first, last = y.narrow(dim, 0, 3), y.narrow(dim, y.shape[dim] - 3, 3)
        y = torch.cat([first.flip(dim), y, last.flip(dim)], dim)
    return filtered(y, window, window)[..., ::2, ::2]


def _blocks(y: Tensor, size: int) -> Tensor:
    """(1, 1, H, W) -> (blocks, size, size)."""
    return y[0, 0].unfold(0, size, size).unfold(1, size, size).flatten(0, 1)


def _features(blocks: Tensor) -> Tensor:
    """(blocks, size, size) -> 18 features each: of the coefficients, and of products of neighbours in 4 directions."""
    shifts = ((0, 1), (1, 0), (1, 1), (1, -1))
    products = [blocks * blocks.roll(shift, (1, 2)) for shift in shifts]
    alpha, left, right = _asymmetric_gaussian(torch.stack([blocks, *products], 1))
    mean = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()  # equation 8
    of_coefficients = torch.stack([alpha[:, 0], (left[:, 0] + right[:, 0]) / 2], 1)
    return torch.cat([of_coefficients, torch.stack([alpha, mean, left, right], 2)[:, 1:].flatten(1)], 1)


def _asymmetric_gaussian(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left and right scale (...) of generalised Gaussians fitted to (..., size, size) by their moments.

    NaN where a side is empty.
    """
    squares = x**2
    left, right = (((squares * side).sum((-1, -2)) / side.sum((-1, -2))).sqrt() for side in (x < 0, x > 0))
    skew = left / right
    ratio = x.abs().mean((-1, -2)) ** 2 / squares.mean((-1, -2))
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes = torch.arange(0.2, 10.001, 0.001, dtype=torch.float32).to(x)  # rounded as in pyiqa: some fits are ties
    ratios = (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()
    nearest = torch.bucketize(ratio.nan_to_num(0), (ratios[1:] + ratios[:-1]) / 2)
    alpha = shapes[nearest]
    scale = ((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2).exp()
    return alpha, left * scale, right * scale

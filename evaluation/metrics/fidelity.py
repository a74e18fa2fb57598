"""How close a result is to the ground truth: full-reference metrics that need no weights.

All take a result and a ground truth (1, 3, H, W), RGB, 0..1, and return one number. They raise ValueError for pictures
of different sizes, for several at once, and for sides shorter than each says. Published figures are of 8-bit files.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .luma import check, filtered, gaussian, gradients, luma, studio_luma, yiq


def psnr(sr: Tensor, hr: Tensor) -> float:
    """Peak signal-to-noise ratio of the luma in dB, at most 80: 10 log10(1 / (MSE + 1e-8)).

    Y of YCbCr (BT.601, 16..235), divided by 255, not rounded; no border is left out. As pyiqa's "psnr" with
    `test_y_channel=True, color_space="ycbcr"`, with which OSEDiff, TSD-SR and others measured. The 1e-8 is theirs too:
    identical pictures have 80 dB, not infinity.
    """
    check(sr, hr)
    error = (studio_luma(sr) - studio_luma(hr)) / 255
    return float(-10 * torch.log10(error.square().mean() + 1e-8))


def ssim(sr: Tensor, hr: Tensor) -> float:
    """Structural similarity of the luma (Wang et al. 2004), 0..1, 1 for identical pictures; from 11x11 pixels.

    Y of YCbCr (BT.601, 16..235) rounded to levels; Gaussian window of 11x11 and sigma 1.5, no padding;
    C1 = (0.01 255)^2, C2 = (0.03 255)^2; negative covariances count as 0. As pyiqa's "ssim" with
    `color_space="ycbcr"`, with which OSEDiff, TSD-SR and others measured.
    """
    check(sr, hr, least=11)
    return float(_ssim(studio_luma(sr).round(), studio_luma(hr).round())[0])


def ms_ssim(sr: Tensor, hr: Tensor) -> float:
    """Structural similarity at five scales (Wang et al. 2003), 0..1, 1 for identical pictures; from 161x161 pixels.

    Contrast and structure at the scales 1 to 4, SSIM at scale 5, each to the power of its weight. Luma and window as in
    `ssim`; each scale is the mean over 2x2 of the last (pyiqa's "ms_ssim" with `color_space="ycbcr"`).
    """
    check(sr, hr, least=161)
    x, y = studio_luma(sr).round(), studio_luma(hr).round()
    result = torch.ones((), dtype=x.dtype, device=x.device)
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        result = result * _ssim(x, y)[1] ** weight
        odd = (x.shape[2] % 2, x.shape[3] % 2)
        x, y = (F.avg_pool2d(picture, 2, padding=odd) for picture in (x, y))
    return float(result * _ssim(x, y)[0] ** 0.1333)


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM, and its part without the luminance, of lumas (1, 1, H, W) in levels."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    window = gaussian(11, 1.5)
    mean_x, mean_y, xx, yy, xy = (filtered(z, window, window) for z in (x, y, x * x, y * y, x * y))
    covariance, variances = xy - mean_x * mean_y, xx + yy - mean_x**2 - mean_y**2
    contrast = ((2 * covariance + c2) / (variances + c2)).clamp(min=0)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean(), contrast.mean()


def gmsd(sr: Tensor, hr: Tensor) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014): 0 for identical pictures, higher is worse.

    Standard deviation over the picture of (2 g h + 170) / (g^2 + h^2 + 170), where g and h are the gradients (Prewitt)
    of the two lumas (BT.601, 0..255) after a mean over 2x2, zeros beyond the border. As the authors' and piq's. From
    2x2 pixels.
    """
    check(sr, hr, least=2)
    g, h = (gradients(F.pad(_halved(luma(picture)), (1, 1, 1, 1)), [1 / 3, 1 / 3, 1 / 3]) for picture in (sr, hr))
    return float(_similarity(g, h, 170).std(correction=0))


def haarpsi(sr: Tensor, hr: Tensor) -> float:
    """Haar wavelet-based perceptual similarity index (Reisenhofer et al. 2018), 0..1, 1 for identical pictures.

    Similarity of the Haar coefficients of the luma at two scales, horizontal and vertical, and of the local means of
    the colours I and Q, each weighted by the coefficients of the third scale; constants of the paper: C = 30,
    alpha = 4.2. Y, I and Q in levels after a mean over 2x2. As the authors' for colour pictures, and piq's. From 16x16
    pixels.
    """
    check(sr, hr, least=16)
    c, alpha = 30, 4.2
    x, y = (_halved(yiq(picture)) for picture in (sr, hr))
    similarities, weights = [], []
    for axis in (2, 3):
        (fine_x, fine_y), (middle_x, middle_y), (coarse_x, coarse_y) = (
            (_haar(x[:, :1], size, axis), _haar(y[:, :1], size, axis)) for size in (2, 4, 8)
        )
        similarities.append((_similarity(fine_x, fine_y, c) + _similarity(middle_x, middle_y, c)) / 2)
        weights.append(torch.maximum(coarse_x, coarse_y))
    colours_x, colours_y = (F.avg_pool2d(F.pad(z[:, 1:], (0, 1, 0, 1)), 2, stride=1).abs() for z in (x, y))
    similarities.append(_similarity(colours_x, colours_y, c).mean(1, keepdim=True))
    weights.append((weights[0] + weights[1]) / 2)

    similarity, weight = torch.cat(similarities, 1), torch.cat(weights, 1)
    total = weight.sum()
    if total == 0:  # both pictures are black: nothing differs
        return 1.0
    return float((torch.logit(((alpha * similarity).sigmoid() * weight).sum() / total) / alpha) ** 2)


def _haar(x: Tensor, size: int, axis: int) -> Tensor:
    """Magnitudes of the Haar coefficients (N, 1, H, W) of a size across an axis, zeros beyond the border."""
    mean = [1 / size] * size
    difference = [1.0] * (size // 2) + [-1.0] * (size // 2)
    before, behind = size // 2 - 1, size // 2
    padded = F.pad(x, (before, behind, before, behind))
    return (filtered(padded, difference, mean) if axis == 2 else filtered(padded, mean, difference)).abs()


def _halved(x: Tensor) -> Tensor:
    """Means over 2x2, zeros beyond an odd border as MATLAB's `conv2(..., "same")` has them."""
    return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)


def _similarity(x: Tensor, y: Tensor, c: float) -> Tensor:
    return (2 * x * y + c) / (x**2 + y**2 + c)

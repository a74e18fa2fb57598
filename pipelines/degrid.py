"""Patterns of a network's patches, taken off flat parts of a picture.

One-step transformers print the grid of their patches on the picture (16 pixels in SD3), decoders that of their latents.
On batches (B, 3, H, W), float, values 0..1, any device. Maps that are worked on strip by strip (`Rows`) come out as
such, with the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .strips import per_pixel

# Pixels: a patch of SD3 (8 of the VAE, times 2). What repeats every 8 or 4 pixels repeats every 16 too.
GRID_PERIOD = 16
# A pattern is what so many periods, along and across, have in common.
GRID_PERIODS = 5


def _filtered(x: Tensor, taps: list[float], dilation: int = 1, repeat: bool = True) -> Tensor:
    """A map (B, 1, H, W) through the same odd number of taps along and across; beyond borders repeated, or 0."""
    kernel, radius = x.new_tensor(taps), len(taps) // 2 * dilation
    x = F.pad(x, (radius, radius, radius, radius), mode="replicate" if repeat else "constant")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1), dilation=(1, dilation))
    return F.conv2d(x, kernel.view(1, 1, -1, 1), dilation=(dilation, 1))


def period_mean(x: Tensor) -> Tensor:
    """The mean over one period around each pixel, which is the same everywhere where `x` (B, 1, H, W) is periodic."""
    return _filtered(x, [0.5 / GRID_PERIOD, *[1 / GRID_PERIOD] * (GRID_PERIOD - 1), 0.5 / GRID_PERIOD])


def remove_grid(images: Tensor, limit: float) -> Tensor:
    """Takes off what pixels that are whole periods apart have in common, and what is between them has not.

    With d the luma (the mean of R, G and B) without its mean over a period, and e the mean of d^2 over a period, both
    in levels of 255, the pattern at a pixel is the mean of d over the 5x5 pixels that are 0, 1 and 2 periods away,
    weighted by 1 / (e + 1): flat parts, where grids are seen, say what it is. At most `limit` is taken off, so that
    content that happens to repeat as often keeps all but that. Not published.

    Args:
        images: (B, 3, H, W), 0..1, at the size that the network worked at.
        limit: in levels of 255, at least 0; 0 returns `images`.
    """
    if not limit:
        return images
    luma = per_pixel(lambda x: 255 * x.mean(dim=1, keepdim=True), images)
    detail = luma - period_mean(luma)
    weights = per_pixel(lambda energy: 1 / (energy + 1), period_mean(detail * detail))
    common = [1 / GRID_PERIODS] * GRID_PERIODS
    pattern = per_pixel(
        torch.div,
        _filtered(weights * detail, common, GRID_PERIOD, repeat=False),
        _filtered(weights, common, GRID_PERIOD, repeat=False),
    )

    def without(x: Tensor, pattern: Tensor, mean: Tensor) -> Tensor:
        return (x - (pattern - mean).clamp(-limit, limit) / 255).clamp(0, 1)

    return per_pixel(without, images, pattern, period_mean(pattern))

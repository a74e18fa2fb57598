"""Grain: what photographs have and deterministic networks cannot make, a little noise in all that looks flat.

On batches (B, 3, H, W), float, values 0..1, any device. Maps that are worked on strip by strip (`Rows`) come out as
such, with the same numbers.
"""

from functools import cache

import torch
from torch import Tensor

from .strips import Rows, per_pixel

# Standard deviation of its blur in pixels: the noise of enlarged and of reprocessed photographs is little finer. What
# is not blurred, so much of it, keeps what is left of a grid from standing out where blurred noise has nothing.
BLUR, UNBLURRED = 1.6, 0.25
# It repeats after so many pixels; a prime, so that no tile, patch or latent has the same grain at the same place.
PERIOD = 509


@cache
def grain_texture() -> Tensor:
    """Gaussian noise (PERIOD, PERIOD) of deviation 1, blurred around its borders, so that it repeats, and unblurred."""
    coarse, fine = torch.randn(2, PERIOD, PERIOD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = torch.fft.fftfreq(PERIOD, dtype=torch.float64)
    response = torch.exp(-2 * (torch.pi * BLUR * frequencies) ** 2)
    blurred = torch.fft.ifft2(torch.fft.fft2(coarse) * torch.outer(response, response)).real
    texture = blurred / blurred.std() + UNBLURRED * fine
    return ((texture - texture.mean()) / texture.std()).float()


def add_grain(images: Tensor, strength: float) -> Tensor:
    """Grey grain of this deviation, in levels of 255: all of it on mid-grey, none on black and white.

    At luma y (the mean of R, G and B) it is 2 sqrt(y (1 - y)) times `strength`. The grain is always the same, so that
    results can be repeated, tiles and strips agree, and films do not flicker.

    Args:
        images: (B, 3, H, W), 0..1.
        strength: at least 0; 0 returns `images`.
    """
    if not strength:
        return images
    texture = grain_texture().to(images.device)
    height, width = images.shape[-2:]
    columns = torch.arange(width, device=images.device) % PERIOD

    def rows(top: int, bottom: int) -> Tensor:
        return texture[torch.arange(top, bottom, device=images.device) % PERIOD][:, columns][None, None]

    def grained(x: Tensor, grain: Tensor) -> Tensor:
        y = x.mean(dim=1, keepdim=True).clamp(0, 1)
        return (x + 2 * strength / 255 * (y * (1 - y)).sqrt() * grain).clamp(0, 1)

    if isinstance(images, Rows):
        return per_pixel(grained, images, Rows((1, 1, height, width), texture.dtype, images.device, rows))
    return grained(images, rows(0, height))

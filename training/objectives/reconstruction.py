"""How far a picture, or its latents, are from the HQ ones; every term is a mean over all elements."""

import torch
from torch import Tensor


def latent_mse(student_latents: Tensor, hq_latents: Tensor) -> Tensor:
    """mean( (z^ - z)^2 ), the second term of equation 7."""
    return (student_latents.float() - hq_latents.float()).square().mean()


def pixel_l1(output: Tensor, target: Tensor) -> Tensor:
    """mean |output - target|, (B, 3, H, W)."""
    return (output.float() - target.float()).abs().mean()


def gradient_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences, (B, C, H, W)."""
    loss = output.new_zeros(())
    for dim in (2, 3):
        loss = loss + (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
    return loss


def frequency_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the orthonormal 2-D Fourier transforms, (B, C, H, W)."""
    return (torch.fft.rfft2(output, norm="ortho") - torch.fft.rfft2(target, norm="ortho")).abs().mean()

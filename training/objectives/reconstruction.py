"""How far a picture, or its latents, are from the HQ ones; every term is a mean over all elements."""

import copy

import torch
import torch.nn.functional as F
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


def grid_l1(output: Tensor, target: Tensor, period: int) -> Tensor:
    """Mean absolute value of what windows of `period` x `period` pixels of output - target share, beside colour.

    A network that works in patches of that many pixels can draw the same pattern into each of them; adversarial terms
    ask for texture, and that is the cheapest there is. The mean over a picture's windows shows such a pattern, and
    next to nothing of its content. A window counts by 1 / (deviation of the target in it + 1 level of 255)^2: on flat
    parts a pattern is seen, and there content does not hide it from the mean either. Not published.

    Args:
        output, target: (B, C, H, W), in [-1, 1].
        period: pixels, at most H and W; sides are cut to multiples of it.
    """
    output, target = output.float(), target.float()
    rows, columns = (side // period for side in target.shape[-2:])

    def windows(picture: Tensor) -> Tensor:  # (B, C, rows, period, columns, period)
        whole = picture[..., : rows * period, : columns * period]
        return whole.unflatten(-1, (columns, period)).unflatten(-3, (rows, period))

    weights = (windows(target).std(dim=(1, 3, 5), correction=0, keepdim=True) + 2 / 255) ** -2
    weights = weights / weights.sum(dim=(2, 4), keepdim=True)
    pattern = (weights * windows(output - target)).sum(dim=(2, 4))
    return (pattern - pattern.mean(dim=(-2, -1), keepdim=True)).abs().mean()


class EncoderFeatureDistance(torch.nn.Module):
    """A perceptual distance that needs no download: LPIPS's formula (arXiv 1801.03924, equation 1, with all channels
    weighted alike) in the feature maps of a frozen VAE encoder, one map for each resolution.

    mean over maps of mean over positions of sum over channels of ( f(output)/|f(output)| - f(target)/|f(target)| )^2

    Args:
        vae: an AutoencoderKL or AutoencoderTiny; its encoder is copied, so that training the VAE does not move the
            yardstick.
    """

    def __init__(self, vae: torch.nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(vae.encoder).requires_grad_(False).eval()
        if hasattr(self.encoder, "down_blocks"):
            stages = list(self.encoder.down_blocks)
        else:
            # A flat sequence: a stage ends where a strided convolution follows, and at the end.
            layers = list(self.encoder.layers)
            strided = [index for index, layer in enumerate(layers) if getattr(layer, "stride", (1,))[0] == 2]
            stages = [layers[index - 1] for index in strided if index] + layers[-1:]
        self._maps: list[Tensor] = []
        for stage in stages:
            stage.register_forward_hook(lambda _, __, output: self._maps.append(output))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of (B, 3, H, W) in -1..1, each normalised over its channels."""
        self._maps.clear()
        self.encoder(images)
        maps = [F.normalize(found.float(), dim=1) for found in self._maps]
        self._maps.clear()
        return maps

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The distance of two pictures (B, 3, H, W) in -1..1; gradient flows into `output` alone."""
        with torch.no_grad():
            wanted = self.features(target)
        each = [
            (ours - theirs).square().sum(dim=1).mean()
            for ours, theirs in zip(self.features(output), wanted, strict=True)
        ]
        return torch.stack(each).mean()

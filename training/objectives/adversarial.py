"""Student against discriminator. Logits are high where a picture looks real, and every loss is a mean over them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean max(0, 1 - real) + mean max(0, 1 + fake) (geometric GAN, arXiv 1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_student_loss(fake: Tensor) -> Tensor:
    """-mean fake, the other side of the hinge loss."""
    return -fake.mean()


def relativistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean log(1 + exp(fake - real)): a photograph has to look more real than the student's picture of the same place,
    not real in itself (RpGAN, arXiv 1807.00734).
    """
    return F.softplus(fake - real).mean()


def relativistic_student_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean log(1 + exp(real - fake)), the other side of RpGAN."""
    return F.softplus(real - fake).mean()


def r1_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """Half the squared length of the logits' gradient at photographs (R1, arXiv 1801.04406, equation 9).

    Args:
        logits: (B, 1, h, w); their sum is differentiated, and what comes of it divided by their number, so that the
            penalty does not depend on the pictures' size.
        pictures: (B, 3, H, W) they were made of, which want a gradient.

    Returns:
        The mean over the pictures, with gradient to the discriminator's weights.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return gradient.float().square().sum() / (2 * logits.numel())


def feature_matching(maps: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over maps of mean |map - wanted|, in a discriminator's features (pix2pixHD, arXiv 1711.11585)."""
    each = [(ours.float() - theirs.float()).abs().mean() for ours, theirs in zip(maps, wanted, strict=True)]
    return torch.stack(each).mean()

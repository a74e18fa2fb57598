"""Student against discriminator. Logits are high where a picture looks real, and every loss is a mean over them.

`counts` (B,), where it is given, says how much each picture counts: the mean is over pictures times their counts.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLURS = (0.5, 1.0, 1.5)  # sigma in pixels of LQ pictures, beyond what making them small does


def hinge_discriminator_loss(real: Tensor, fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """mean max(0, 1 - real) + mean max(0, 1 + fake) (geometric GAN, arXiv 1705.02894)."""
    return _mean(F.relu(1 - real), counts) + _mean(F.relu(1 + fake), counts)


def hinge_student_loss(fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """-mean fake, the other side of the hinge loss."""
    return _mean(-fake, counts)


def relativistic_discriminator_loss(real: Tensor, fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """mean log(1 + exp(fake - real)): a photograph has to look more real than the student's picture of the same place,
    not real in itself (RpGAN, arXiv 1807.00734).
    """
    return _mean(F.softplus(fake - real), counts)


def relativistic_student_loss(real: Tensor, fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """mean log(1 + exp(real - fake)), the other side of RpGAN."""
    return _mean(F.softplus(real - fake), counts)


def evidence(pictures: Tensor, hq: Tensor, scale: int, lowest: float, full: float) -> Tensor:
    """How much of each photograph its LQ picture still shows: 0 where nearly nothing, 1 where nearly all.

    The photograph is made as small as the LQ picture, and blurred or sharpened by the mixture of Gaussians that makes
    them most alike: the PSNR that is left tells of noise, compression and resampling. It is mapped to 0 at `lowest` and
    1 at `full`, in a line between them. Not published: detail that a discriminator asks for is invented where damage
    left nothing to go by, and costs fidelity there.

    Args:
        pictures: LQ pictures, enlarged, (B, 3, H, W) in -1..1.
        hq: the photographs, the same shape and range.
        scale: how much smaller the LQ pictures were.
        lowest: dB.
        full: dB, above `lowest`.

    Returns:
        (B,), 0..1, without gradient.
    """
    with torch.no_grad():
        small, wanted = (
            F.interpolate(one.float(), scale_factor=1 / scale, mode="bicubic", antialias=True) for one in (pictures, hq)
        )
        # LQ = photograph + sum of c (blurred photograph - photograph): c > 0 blurs, c < 0 sharpens, colours stay.
        changes = torch.stack([gaussian_blur(wanted, sigma) - wanted for sigma in BLURS], -1).flatten(1, 3).double()
        error = (small - wanted).flatten(1)[..., None].double()
        ridge = 1e-8 * changes.shape[1] * torch.eye(len(BLURS), dtype=torch.float64, device=changes.device)
        found = torch.linalg.solve(changes.mT @ changes + ridge, changes.mT @ error)
        left = (error - changes @ found).square().mean((1, 2)).float()
        psnr = 10 * torch.log10(4 / left.clamp_min(1e-10))
        return ((psnr - lowest) / (full - lowest)).clamp(0, 1)


def that_count(counts: Tensor | None, output: Tensor, hq: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """All three without the pictures that count nothing, which need not be judged; one stays at least.

    Counts are scaled so that a mean over the pictures that stay, times their counts, is the one over all.
    """
    if counts is None:
        return counts, output, hq
    stay = counts > 0
    stay[0] |= ~stay.any()
    return counts[stay] * stay.float().mean(), output[stay], hq[stay]


def gaussian_blur(pictures: Tensor, sigma: float) -> Tensor:
    """Pictures (B, C, H, W) under a Gaussian of `sigma` pixels, edges repeated; 0 leaves them as they are."""
    if not sigma:
        return pictures
    radius = math.ceil(3 * sigma)
    taps = torch.arange(-radius, radius + 1, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.softmax(-0.5 * (taps / sigma) ** 2, 0).expand(pictures.shape[1], 1, 1, -1)
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=pictures.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=pictures.shape[1])


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


def feature_matching(maps: Sequence[Tensor], wanted: Sequence[Tensor], counts: Tensor | None = None) -> Tensor:
    """Mean over maps of mean |map - wanted|, in a discriminator's features (pix2pixHD, arXiv 1711.11585)."""
    each = [_mean((ours.float() - theirs.float()).abs(), counts) for ours, theirs in zip(maps, wanted, strict=True)]
    return torch.stack(each).mean()


def _mean(values: Tensor, counts: Tensor | None) -> Tensor:
    return values.mean() if counts is None else (values.flatten(1).mean(1) * counts).mean()

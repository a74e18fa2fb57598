"""Student against discriminator. Logits are high where a picture looks real, and every loss is a mean over them.

`counts` (B,), where it is given, says how much each picture counts: the mean is over pictures times their counts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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


def that_count(counts: Tensor | None, output: Tensor, hq: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """All three without the pictures that count nothing, which need not be judged; one stays at least.

    Counts are scaled so that a mean over the pictures that stay, times their counts, is the one over all.
    """
    if counts is None:
        return counts, output, hq
    stay = counts > 0
    stay[0] |= ~stay.any()
    return counts[stay] * stay.float().mean(), output[stay], hq[stay]


def balanced(loss: Tensor, seen: Tensor, output: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """A loss of pictures whose gradient is as large as that of their mean absolute error.

    How steep a discriminator is changes by orders of magnitude while it learns. Its weight then says how much its
    direction counts beside a pixel term's, as VQGAN's adaptive weight does (arXiv 2012.09841, equation 7), here at the
    pictures themselves.

    Args:
        loss: a scalar that depends on `seen`.
        seen: the pictures, cut off from what made them, requiring gradient.
        output: the same attached to it.
        share: of the gradient's size.

    Returns:
        The loss's value; its gradient with regard to `output` has the root mean square `share` / their number of
        elements.
    """
    (gradient,) = torch.autograd.grad(loss, seen, retain_graph=True)
    size = gradient.float().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny) * gradient.numel()
    pull = (output * (gradient / size * share).detach()).sum()
    return pull + (loss - pull).detach()


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

"""Losses by name: which of them count, and how much, is a phase's business."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, DistillConfig, Phase, reason
from .objectives import (
    EncoderFeatureDistance,
    add_noise,
    balanced,
    dasm_trajectory,
    draw_levels,
    draw_noise,
    fake_score_loss,
    feature_matching,
    frequency_l1,
    gradient_l1,
    grid_l1,
    hinge_discriminator_loss,
    hinge_student_loss,
    hsd_gradient,
    latent_mse,
    noise_levels,
    pixel_l1,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_student_loss,
    sds_gradient,
    tsd_gradient,
    tsd_loss,
)
from .objectives.adversarial import that_count
from .objectives.noise import Velocity
from .objectives.tad import JUDGED_SHARE, LOWEST_SHARE

# Terms of pictures (B, 3, H, W) in -1..1, output first.
PIXEL_TERMS = ("pixel_l1", "gradient_l1", "frequency_l1", "grid_l1", "encoder_features", "lpips")


def plain_terms(grid_period: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Those that are no networks; `grid_period` is the pixels a side of a patch of the network."""
    grid = partial(grid_l1, period=grid_period)
    return {"pixel_l1": pixel_l1, "gradient_l1": gradient_l1, "frequency_l1": frequency_l1, "grid_l1": grid}


class Reconstruction:
    """Equation 7 and its relatives: how far the student's latents and pictures are from the HQ ones.

    Args:
        config: which terms any phase uses; only those are made.
        vae: the base's autoencoder, before it is given adapters; its encoder is copied where its features count.
        device: of the terms that are networks.

    Raises:
        ConfigError: if LPIPS is asked for and cannot be had.
    """

    def __init__(self, config: DistillConfig, vae: nn.Module, device: torch.device):
        self.terms = plain_terms(config.grid_period)
        if config.uses("encoder_features"):
            self.terms["encoder_features"] = EncoderFeatureDistance(vae).to(device)
        if config.uses("lpips"):
            self.terms["lpips"] = lpips(device)

    def __call__(
        self, weights: dict[str, float], latents: Tensor, hq_latents: Tensor, output: Tensor | None, hq: Tensor
    ) -> dict[str, Tensor]:
        """The terms that `weights` names, unweighted; `output`, the decoded latents, only if one looks at pictures."""
        found = {}
        if "latent_mse" in weights:
            found["latent_mse"] = latent_mse(latents, hq_latents)
        if output is not None:
            found |= {name: self.terms[name](output, hq) for name in PIXEL_TERMS if name in weights}
        return found


def adversarial_terms(
    config: DistillConfig,
    weights: dict[str, float],
    judge: Callable[[Tensor], Sequence[Tensor]],
    output: Tensor | None,
    hq: Tensor,
    counts: Tensor | None = None,
    balance: bool = False,
) -> dict[str, Tensor]:
    """What a discriminator says of the student's pictures: the terms that `weights` names, unweighted.

    Args:
        config: adversarial_loss is read from it.
        weights: of the terms that count.
        judge: from pictures to the discriminator's maps, logits last; no gradient reaches its weights.
        output: the student's pictures (B, 3, H, W), about -1..1; None if no term looks at pictures.
        hq: the photographs, -1..1.
        counts: how much each counts, (B,); all the same without it.
        balance: scale the gradient of each term to the size of pixel_l1's.
    """
    if output is None or not weights.keys() & set(Phase.ADVERSARIAL):
        return {}
    counts, output, hq = that_count(counts, output, hq)
    relativistic = config.adversarial_loss == "relativistic"
    made = output
    if balance:
        output = made.detach().requires_grad_()
    *maps, fake = judge(output)
    if relativistic or "feature_matching" in weights:
        with torch.no_grad():
            *wanted, real = judge(hq)
    found = {}
    if "adversarial" in weights:
        fake = fake.float()
        found["adversarial"] = (
            relativistic_student_loss(real, fake, counts) if relativistic else hinge_student_loss(fake, counts)
        )
    if "feature_matching" in weights:
        found["feature_matching"] = feature_matching(maps, wanted, counts)
    if balance:
        share = 1.0 if counts is None else counts.mean()
        found = {name: balanced(value, output, made, share) for name, value in found.items()}
    return found


def discriminator_terms(
    config: DistillConfig,
    judge: Callable[[Tensor], Tensor],
    output: Tensor,
    hq: Tensor,
    r1: bool = True,
    counts: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the discriminator is trained with: `discriminator`, and `r1` where it has a weight; unweighted.

    Args:
        config: adversarial_loss and r1_weight are read from it.
        judge: from pictures to logits; called once, so that DDP sees one forward pass.
        output: the student's pictures (B, 3, H, W), about -1..1; they get no gradient.
        hq: the photographs, -1..1.
        r1: whether the penalty is for this discriminator.
        counts: how much each pair counts, (B,); all the same without it. What counts nothing is not judged.
    """
    r1 = r1 and config.r1_weight > 0
    counts, output, hq = that_count(counts, output, hq)
    hq = hq.detach().requires_grad_(r1)
    real, fake = judge(torch.cat([hq, output.detach()])).float().chunk(2)
    loss = relativistic_discriminator_loss if config.adversarial_loss == "relativistic" else hinge_discriminator_loss
    found = {"discriminator": loss(real, fake, counts)}
    if r1:
        found["r1"] = r1_penalty(real, hq)
    return found


def noised(
    judge: Callable[[Tensor, Tensor], Any],
    scheduler: Any,
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
    share: float = JUDGED_SHARE,
    noise: str = "gaussian",
) -> Callable[[Tensor], Any]:
    """A judge of clean latents out of one of noisy ones, for the two functions above.

    Each sample has a level and noise of its own, and all that is judged gets the same: real and made latents.

    Args:
        judge: of noisy latents (n B, C, h, w) at levels (n B,).
        scheduler: of the base.
        shape: (B, C, h, w) of one batch.
        generator: CPU generator of levels and noise.
        device: of the latents.
        share: the least noisy part of the schedule that levels are drawn from.
        noise: gaussian, or uniform as the released code has it.
    """
    sigma = draw_levels(scheduler, shape[0], share, generator).to(device)
    drawn = draw_noise(shape, generator, noise).to(device)

    def call(latents: Tensor) -> Any:
        batches = len(latents) // len(sigma)
        levels = sigma.repeat(batches)
        return judge(add_noise(latents, drawn.repeat(batches, 1, 1, 1), levels), levels)

    return call


def lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (AlexNet, version 0.1) as the published training uses it, through pyiqa.

    Raises:
        ConfigError: if pyiqa is not installed, or its weights are not on this machine and cannot be fetched.
    """
    try:
        import pyiqa
    except (ImportError, RuntimeError) as error:  # torchvision that does not fit torch is a RuntimeError
        raise ConfigError(
            f"The term lpips needs pyiqa, which cannot be imported ({error}); pip install 'tsdsr[eval]', or use "
            "encoder_features, which needs no download."
        ) from error
    try:
        metric = pyiqa.create_metric("lpips", as_loss=True, device=device)
    except Exception as error:  # what is raised offline depends on where pyiqa looks
        raise ConfigError(
            f"The weights of lpips are not here and could not be fetched ({reason(error)}); run "
            "`python -c \"import pyiqa; pyiqa.create_metric('lpips')\"` once with a network, or use encoder_features, "
            "which needs no download."
        ) from error
    metric.requires_grad_(False)
    return lambda output, target: metric(output.clamp(-1, 1) / 2 + 0.5, target / 2 + 0.5).mean()


def distillation(
    phase: Phase,
    scheduler: Any,
    latents: Tensor,
    hq_latents: Tensor,
    teacher: Velocity,
    fake_score: Velocity,
    generator: torch.Generator,
) -> Tensor:
    """Equation 8's second term for one batch, with a trajectory and noise drawn from `generator` (CPU)."""
    sigmas = dasm_trajectory(
        scheduler, len(latents), phase.dasm_steps, phase.dasm_spacing, phase.dasm_jitter, generator=generator
    )
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    gradient = tsd_gradient(
        latents.detach(),
        hq_latents,
        noise,
        sigmas.to(latents.device),
        teacher,
        fake_score,
        phase.vsd_weight,
        phase.step_weights,
    )
    return tsd_loss(latents, gradient.gradient)


def high_frequency_distillation(
    scheduler: Any,
    latents: Tensor,
    target: Tensor | None,
    teacher: Velocity,
    generator: torch.Generator,
    share: float = LOWEST_SHARE,
    noise: str = "gaussian",
) -> Tensor:
    """TAD-SR's score distillation for one batch, with levels and noise drawn from `generator` (CPU).

    Args:
        scheduler: of the base.
        latents: z^, (B, C, h, w), with gradient.
        target: z*, what the teacher makes in many steps or the HQ latents; None for SDS, which has none.
        teacher: psi, guidance inside.
        generator: CPU generator.
        share: the least noisy part of the schedule that levels are drawn from; 1 for all of it.
        noise: gaussian, or uniform as the released code has it.
    """
    sigma = draw_levels(scheduler, len(latents), share, generator).to(latents.device)
    drawn = draw_noise(latents.shape, generator, noise).to(latents.device)
    if target is None:
        gradient = sds_gradient(latents.detach(), drawn, sigma, teacher)
    else:
        gradient = hsd_gradient(latents.detach(), target, drawn, sigma, teacher)
    return tsd_loss(latents, gradient)


def fake_score_term(scheduler: Any, latents: Tensor, fake_score: Velocity, generator: torch.Generator) -> Tensor:
    """Equation 9 for one batch.

    Drawn from `generator` (CPU), for each sample: a schedule index U{5 %..95 %}, a weight sigmoid(N(0, 1)), noise.
    """
    levels = noise_levels(scheduler)
    margin = len(levels) // 20
    indices = torch.randint(margin, len(levels) - margin, (len(latents),), generator=generator)
    weighting = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return fake_score_loss(latents, noise, levels[indices].to(latents.device), fake_score, weighting)

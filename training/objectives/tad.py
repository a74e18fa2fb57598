"""High-frequency score distillation (TAD-SR, arXiv 2408.07476; the total objective is the paper's equation 12).

z^ are the student's latents, z* those it should come to: what the teacher psi itself makes of the LQ picture in many
steps, or the HQ latents. The teacher's guess of the noise is as wrong at z* as it is at z^; the difference is what the
student lacks. At little noise, that is detail.

With x = psi's clean latents and v = psi's velocity at z_sigma = sigma * noise + (1 - sigma) * z,

    c (z - x) = psi's noise - noise = (1 - sigma) (z + v - noise),      c = (1 - sigma) / sigma

where the last form loses no digits at small sigma. In the scale of `noise` and `residual_shift` this is one c for all:
sqrt(abar / (1 - abar)) for a DDPM that predicts noise or v, (1 - eta) / (kappa sqrt(eta)) for residual shifting.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import Velocity, add_noise, finite, noise_levels, per_sample

# Published: timesteps 0..2 of 15. 1 draws from all of the schedule, the paper's ablation.
LOWEST_SHARE = 0.2
# Of the levels that a discriminator sees: published 0..13 of 15, and 20..880 of 1000.
JUDGED_SHARE = 0.9
NOISES = ("gaussian", "uniform")


def draw_levels(
    scheduler: Any, batch_size: int, share: float = LOWEST_SHARE, generator: torch.Generator | None = None
) -> Tensor:
    """Noise levels (B,) from the least noisy part of a training schedule, each index as likely; float32, 0..1.

    Args:
        scheduler: flow-match, DDPM or `ResidualShift`.
        batch_size: B.
        share: of the schedule's indices, above 0, at most 1; at least one level is left.
        generator: CPU generator.

    Raises:
        ValueError: for another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share:g}.")
    levels = noise_levels(scheduler)
    lowest = levels[-max(1, round(share * len(levels))) :]
    return lowest[torch.randint(len(lowest), (batch_size,), generator=generator)]


def draw_noise(shape: Sequence[int], generator: torch.Generator | None = None, kind: str = "gaussian") -> Tensor:
    """Noise of a shape, on the CPU.

    Args:
        shape: (B, C, h, w).
        generator: CPU generator.
        kind: "gaussian", N(0, 1), which teachers are trained with and the paper writes; or "uniform", 0..1, which the
            released code of TAD-SR draws (`rand_like`), to compare with that.

    Raises:
        ValueError: for another kind.
    """
    if kind not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, not {kind!r}.")
    return (torch.randn if kind == "gaussian" else torch.rand)(tuple(shape), generator=generator)


@torch.no_grad()
def sds_gradient(latents: Tensor, noise: Tensor, sigma: Tensor, teacher: Velocity) -> Tensor:
    """c (z - x): score distillation sampling (DreamFusion, arXiv 2209.14988, equation 3), TAD-SR's ablation.

    Descending along it leads to where the teacher's density is highest, which is smooth.

    Args:
        latents: z, (B, C, h, w); no gradient flows from here.
        noise: (B, C, h, w).
        sigma: (B,).
        teacher: psi, guidance inside.

    Returns:
        (B, C, h, w); float32. NaN and Inf count as 0.

    Raises:
        ValueError: if shapes do not agree.
    """
    return finite(_wrong_guess(latents, noise, sigma, teacher))


@torch.no_grad()
def hsd_gradient(
    student_latents: Tensor, target_latents: Tensor, noise: Tensor, sigma: Tensor, teacher: Velocity
) -> Tensor:
    """c [(z^ - x^) - (z* - x*)]: the direction of SDS at the student, less what it is at the target.

    Descending along it leads to z*, fastest where the teacher expects the least variance.

    Args:
        student_latents: z^, (B, C, h, w); no gradient flows from here.
        target_latents: z*, (B, C, h, w).
        noise: shared by both, (B, C, h, w).
        sigma: shared by both, (B,).
        teacher: psi, guidance inside.

    Returns:
        (B, C, h, w); float32. Where either side is NaN or Inf, the difference counts as 0.

    Raises:
        ValueError: if shapes do not agree.
    """
    student, target = (_wrong_guess(z, noise, sigma, teacher) for z in (student_latents, target_latents))
    return finite(student - target)


def _wrong_guess(latents: Tensor, noise: Tensor, sigma: Tensor, teacher: Velocity) -> Tensor:
    """psi's noise - noise, at z_sigma."""
    if latents.shape != noise.shape or sigma.shape != latents.shape[:1]:
        raise ValueError(
            "latents and noise must have one shape and sigma a level for each sample, "
            f"not {tuple(latents.shape)}, {tuple(noise.shape)} and {tuple(sigma.shape)}."
        )
    latents, noise = latents.float(), noise.float()
    velocity = teacher(add_noise(latents, noise, sigma), sigma).float()
    return (1 - per_sample(sigma, latents)) * (latents + velocity - noise)

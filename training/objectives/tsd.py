"""Target score distillation (TSD-SR, arXiv 2411.18263, equations 3 to 6, 8 and 9 as numbered in the paper's text).

z^ are the student's latents, z those of the HQ picture, psi the frozen teacher, phi the fake-score model that follows
the student. All of it is computed in float32; NaN and Inf of half-precision networks count as 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import Velocity, add_noise, clean_from_velocity, finite, noise_levels, per_sample

# Published: the first point of the trajectory counts fully, the others less (train/train.py).
STEP_WEIGHTS = (1.0, 0.3, 0.3, 0.3)


class TSDGradient(NamedTuple):
    """A gradient with respect to the student's latents, (B, C, h, w) each, and the two parts it is mixed from."""

    gradient: Tensor
    vsd: Tensor
    tsm: Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """v = v_null + w * (v_prompt - v_null), any shape; w = 1 is the prompt alone."""
    return unconditional + guidance_scale * (conditional - unconditional)


def dasm_trajectory(
    scheduler: Any,
    batch_size: int,
    steps: int = 4,
    spacing: int = 50,
    jitter: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise levels for distribution-aware sampling (equation 6): every sample its own trajectory.

    The first index into the schedule is U{50..949}, the last lies `steps * spacing` behind it, plus a jitter of
    U{-spacing/2 .. spacing/2 - 1}, no further than the schedule's end; those between are evenly spaced, rounded down.

    Args:
        scheduler: its training schedule is indexed; index 0 is the noisiest.
        batch_size: B.
        steps: N, points at which scores are compared; 1 is a single random level, without DASM.
        spacing: indices between two points.
        jitter: whether the length of the trajectory varies.
        generator: CPU generator for both draws.

    Returns:
        (N + 1, B), falling; float32, 0..1.

    Raises:
        ValueError: if `steps` or `spacing` is under 1.
    """
    if steps < 1 or spacing < 1:
        raise ValueError(f"steps and spacing must be at least 1, not {steps} and {spacing}.")
    levels = noise_levels(scheduler)
    margin = len(levels) // 20
    first = torch.randint(margin, len(levels) - margin, (batch_size,), generator=generator)
    last = first + steps * spacing
    if jitter:
        last = last + torch.randint(-(spacing // 2), max(1, spacing // 2), (batch_size,), generator=generator)
    last = last.clamp(max=len(levels) - 1)
    part = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    indices = (first + part * (last - first)).long()
    return levels[indices]


@torch.no_grad()
def tsd_gradient(
    student_latents: Tensor,
    hq_latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    teacher: Velocity,
    fake_score: Velocity,
    vsd_weight: float = 0.7,
    step_weights: Sequence[float] = STEP_WEIGHTS,
) -> TSDGradient:
    """The gradient of equation 5 at all points of a trajectory, with respect to the student's latents.

    At each level sigma, with w = step weight * sigma^2:
        VSD (3)  w * (psi(z^_sigma) - phi(z^_sigma))
        TSM (4)  w * (psi(z^_sigma) - psi(z_sigma))
        TSD (5)  vsd_weight * VSD + (1 - vsd_weight) * TSM
    and both branches go on to the next level (6) along phi(z^_sigma) and psi(z_sigma). Velocities point from the clean
    latents to the noise, so descending along psi - phi moves the student's latents from phi's idea of them to psi's.

    Args:
        student_latents: z^, (B, C, h, w); no gradient flows from here.
        hq_latents: z, (B, C, h, w).
        noise: shared by both, (B, C, h, w).
        sigmas: (N + 1, B), the trajectory; its first N levels are compared.
        teacher: psi, guidance inside.
        fake_score: phi, guidance inside.
        vsd_weight: lambda; 1 is VSD alone, 0 TSM alone.
        step_weights: one for each of the N points; further ones are not used.

    Returns:
        The gradient and its VSD and TSM parts, unmixed; float32.

    Raises:
        ValueError: if shapes do not agree, or there are fewer weights than points.
    """
    if sigmas.ndim != 2 or sigmas.shape[0] < 2 or sigmas.shape[1] != student_latents.shape[0]:
        raise ValueError(
            f"sigmas must be (N + 1, B) with N at least 1 and B = {student_latents.shape[0]}, "
            f"not {tuple(sigmas.shape)}."
        )
    if not student_latents.shape == hq_latents.shape == noise.shape:
        raise ValueError(
            "student_latents, hq_latents and noise must have one shape, "
            f"not {tuple(student_latents.shape)}, {tuple(hq_latents.shape)} and {tuple(noise.shape)}."
        )
    if len(step_weights) < len(sigmas) - 1:
        raise ValueError(f"step_weights must hold {len(sigmas) - 1} weights, one for each point, not {step_weights}.")
    student = add_noise(student_latents.float(), noise.float(), sigmas[0])
    hq = add_noise(hq_latents.float(), noise.float(), sigmas[0])
    vsd, tsm = torch.zeros_like(student), torch.zeros_like(student)
    points = len(sigmas) - 1
    for index, (sigma, following, weight) in enumerate(zip(sigmas[:-1], sigmas[1:], step_weights, strict=False)):
        psi, phi, psi_hq = (
            velocity(z, sigma).float() for velocity, z in ((teacher, student), (fake_score, student), (teacher, hq))
        )
        scale = weight * per_sample(sigma, student).square()
        vsd += finite(scale * (psi - phi))
        tsm += finite(scale * (psi - psi_hq))
        if index + 1 < points:
            step = per_sample(sigma - following, student)
            student, hq = student - step * phi, hq - step * psi_hq
    return TSDGradient(vsd_weight * vsd + (1 - vsd_weight) * tsm, vsd, tsm)


def tsd_loss(student_latents: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to z^ is `gradient`, over the number of elements (published).

    0.5 * mean( (z^ - stopgrad(z^ - gradient))^2 )
    """
    student_latents = student_latents.float()
    target = (student_latents - gradient.float()).detach()
    return 0.5 * (student_latents - target).square().mean()


def fake_score_loss(
    student_latents: Tensor, noise: Tensor, sigma: Tensor, fake_score: Velocity, weighting: Tensor | float = 1.0
) -> Tensor:
    """Equation 9: the fake-score model learns to denoise the student's latents. No guidance, no gradient to z^.

    0.5 * m * mean( (z^_sigma - sigma * phi(z^_sigma) - z^)^2 ), m per sample.

    Args:
        student_latents: z^, (B, C, h, w).
        noise: (B, C, h, w).
        sigma: (B,).
        fake_score: phi.
        weighting: m, (B,) or a number; published: sigmoid of a standard normal draw per sample.
    """
    clean = student_latents.detach().float()
    noisy = add_noise(clean, noise.float(), sigma)
    restored = clean_from_velocity(noisy, fake_score(noisy, sigma).float(), sigma)
    each = (restored - clean).square().flatten(1).mean(dim=1)
    return finite(0.5 * torch.as_tensor(weighting, device=each.device) * each).mean()

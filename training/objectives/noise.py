"""Noise levels, and one parametrisation for all families: everything is a rectified flow's velocity.

A DDPM's z_t = alpha * clean + s * noise (alpha^2 + s^2 = 1), divided by alpha + s, is a rectified flow's latent at
sigma = s / (alpha + s). So the distillation objectives need to know of one family only. `residual_shift` is the third.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped so that it multiplies (B, C, h, w)."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z = sigma * noise + (1 - sigma) * clean, for sigma (B,)."""
    level = per_sample(sigma, clean)
    return level * noise + (1 - level) * clean


def clean_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """clean = z - sigma * v: one Euler step from sigma to 0."""
    return noisy - per_sample(sigma, noisy) * velocity


def finite(values: Tensor) -> Tensor:
    """`values` with 0 for NaN and Inf, which half-precision networks give at times."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def noise_levels(scheduler: Any) -> Tensor:
    """The noise levels (T,) of a training schedule, falling, the first the noisiest; float32, 0..1.

    Args:
        scheduler: a flow-match scheduler (its shifted sigmas), a DDPM one (s / (alpha + s) of its timesteps), or a
            `ResidualShift`, which has sigmas like the former.
    """
    # As configured, whatever timesteps this one was set to. What diffusers notes of defaults would reset arguments that
    # were given by position.
    fresh = type(scheduler).from_config({k: v for k, v in scheduler.config.items() if not k.startswith("_")})
    if hasattr(fresh, "alphas_cumprod"):
        return _flow_levels(fresh.alphas_cumprod.float()).flip(0)
    return fresh.sigmas.float()[: fresh.config.num_train_timesteps]


def _flow_levels(alphas_cumprod: Tensor) -> Tensor:
    alpha, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return s / (alpha + s)


def ddpm_velocity(predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any) -> Velocity:
    """The velocity callable of an eps- or v-predicting network.

    Args:
        predict: `(z_t, t) -> prediction` of the network: z_t (B, C, h, w) in the DDPM's own scale, t (B,) integers.
        scheduler: its DDPM scheduler; `prediction_type` "epsilon" or "v_prediction".

    Returns:
        `(z, sigma) -> noise - clean`, where sigma are levels of `noise_levels(scheduler)`.

    Raises:
        ValueError: for other prediction types.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, not {kind!r}.")
    alphas_cumprod = scheduler.alphas_cumprod.float()
    levels = _flow_levels(alphas_cumprod)  # rising with t

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        table = levels.to(sigma.device)
        timestep = (sigma[:, None].float() - table[None]).abs().argmin(dim=1)
        cumulative = alphas_cumprod.to(sigma.device)[timestep]
        alpha, s = per_sample(cumulative.sqrt(), z), per_sample((1 - cumulative).sqrt(), z)
        noisy = z * (alpha + s)
        prediction = predict(noisy, timestep)
        if kind == "epsilon":
            noise, clean = prediction, (noisy - s * prediction) / alpha
        else:  # v = alpha * noise - s * clean
            noise, clean = s * noisy + alpha * prediction, alpha * noisy - s * prediction
        return noise - clean

    return velocity

"""Residual shifting (ResShift, arXiv 2307.12348): a diffusion from the HQ latents to the noisy LQ ones, in few steps.

    x_t = z + eta_t (y - z) + kappa sqrt(eta_t) noise          clean latents z, those of the enlarged LQ picture y

Without eta_t y this is a DDPM's latent, of alpha = 1 - eta_t and s = kappa sqrt(eta_t). Divided by alpha + s, it is a
rectified flow's at sigma = s / (alpha + s), like those of `noise`. So its networks become velocity callables too. Its
deterministic sampler (SinSR, arXiv 2311.14760) is Euler's method along them, begun at y noised to the first level.
"""

import math
from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .noise import Velocity, per_sample


class ResidualShift(SchedulerMixin, ConfigMixin):
    """The schedule, least noisy first: sqrt(eta_t) = first * (last / first)^((t / (T - 1))^power), t = 0..T - 1.

    first = min(min_noise_level / kappa, min_noise_level, sqrt(0.001)). Defaults are those of the released models.

    Args:
        num_train_timesteps: T, at least 2.
        kappa: how much noise there is for one residual.
        power: of the growth; under 1 it is quick at first.
        min_noise_level: of the least noisy latents: kappa * sqrt(eta_0).
        etas_end: last, sqrt(eta) of the noisiest.

    Attributes:
        etas: (T,), rising; float64.
        sigmas: levels (T + 1,) in the scale of `noise`, falling, the last 0, as a flow-match scheduler has them.

    Raises:
        ValueError: if the schedule would not rise.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 15,
        kappa: float = 2.0,
        power: float = 0.3,
        min_noise_level: float = 0.04,
        etas_end: float = 0.99,
    ):
        if num_train_timesteps < 2 or min(kappa, power, min_noise_level) <= 0:
            raise ValueError(
                "A residual-shifting schedule has at least 2 timesteps, and kappa, power and min_noise_level above 0, "
                f"not {num_train_timesteps}, {kappa:g}, {power:g} and {min_noise_level:g}."
            )
        first = min(min_noise_level / kappa, min_noise_level, math.sqrt(0.001))
        if not first < etas_end <= 1:
            raise ValueError(f"etas_end must be above {first:g} and at most 1, not {etas_end:g}.")
        part = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64) ** power
        self.etas = (first * (etas_end / first) ** part).square()
        alpha, s = 1 - self.etas, kappa * self.etas.sqrt()
        self.sigmas = torch.cat([(s / (alpha + s)).flip(0), torch.zeros(1)]).float()


def residual_velocity(predict: Callable[[Tensor, Tensor], Tensor], schedule: ResidualShift, lq: Tensor) -> Velocity:
    """The velocity callable of a network that predicts clean latents.

    Args:
        predict: `(x_t / sqrt(kappa^2 eta_t + 1), t) -> clean` of the network: (B, C, h, w), t (B,) integers. Whatever
            else it reads, such as the LQ picture, is inside.
        schedule: that it was trained with.
        lq: y, latents of the enlarged LQ pictures, (B, C, h, w).

    Returns:
        `(z, sigma) -> noise - clean`, where sigma are levels of `noise_levels(schedule)`.
    """
    levels, kappa = schedule.sigmas[:-1].flip(0), schedule.config.kappa  # rising with t

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        timestep = (sigma[:, None].float() - levels.to(sigma.device)[None]).abs().argmin(dim=1)
        eta = schedule.etas.float().to(sigma.device)[timestep]
        scale, shift = per_sample(1 - eta + kappa * eta.sqrt(), z), per_sample(eta, z)
        spread = per_sample((kappa**2 * eta + 1).sqrt(), z)
        clean = predict((scale * z + shift * lq.to(z)) / spread, timestep)
        return (z - clean) / per_sample(sigma, z)

    return velocity

"""The families of base networks behind one interface: rectified flow (SD3), DDPM (SD2's UNets), residual shifting.

The objectives know velocities only; the student's one step ends at clean latents in all of them.

A base that restores reads the LQ picture's latents y beside the noisy ones, as further channels. Its student begins as
its step from the most noisy state, with the mean of that state, y, in place of a draw. So a student reads y twice. The
network that reads it once and computes the same (`export.without_condition`) is one that pipelines run.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..models import lora_targets
from ..pipelines.text import Prompt
from .objectives import (
    ResidualShift,
    classifier_free_guidance,
    clean_from_velocity,
    ddpm_velocity,
    noise_levels,
    residual_velocity,
)
from .objectives.noise import Velocity

# What a network is told beside noisy latents and their level: the prompt, and latents (B, C, h, w) of the LQ pictures.
Known = Prompt | tuple[Tensor, Tensor | None, Tensor]


class Family(Protocol):
    """What the trainer has to know of a base.

    Attributes:
        component: name of the network in a pipeline folder, and its prefix in LoRA files.
        student_targets, fake_score_targets: layers that the LoRAs of the two are on.
        timestep: the student's one timestep.
        scheduler: of the base; its training schedule gives the noise levels.
        conditioned: whether its network reads the latents of the LQ picture, as further channels.
        strength: sigma at which it begins to restore an LQ picture, unless something else is asked for.
        input_scale: what the student's latents are multiplied by where the network expects noisy ones.
        pipeline_scheduler: that a pipeline takes the student's step with.
    """

    component: str
    student_targets: tuple[str, ...]
    fake_score_targets: tuple[str, ...]
    timestep: float
    scheduler: Any
    conditioned: bool

    @property
    def strength(self) -> float: ...

    @property
    def input_scale(self) -> float: ...

    @property
    def pipeline_scheduler(self) -> Any: ...

    def velocity(self, network: Any, prompt: Known) -> Velocity:
        """The callable `(z, sigma) -> noise - clean` of the network in the role it has when it is called."""

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        """The student's result z^ for encoded pictures (B, C, h, w); float32, with gradient."""


class _Shared:
    """What most families have in common."""

    # Of a base that does not read the LQ picture: from more it leaves the photograph, from less it adds little.
    UNCONDITIONED_STRENGTH = 0.5
    input_scale = 1.0
    conditioned: bool
    scheduler: Any

    @property
    def strength(self) -> float:
        return 1.0 if self.conditioned else self.UNCONDITIONED_STRENGTH

    @property
    def pipeline_scheduler(self) -> Any:
        return self.scheduler

    def _student_knows(self, prompt: Prompt, latents: Tensor) -> Known:
        return (*prompt, latents) if self.conditioned else prompt


class RectifiedFlow(_Shared):
    """SD3's transformers: they predict the velocity itself."""

    component = "transformer"
    student_targets: tuple[str, ...] = lora_targets.STUDENT
    fake_score_targets: tuple[str, ...] = lora_targets.FAKE_SCORE

    def __init__(self, scheduler: Any, timestep: float = 1000.0, conditioned: bool = False):
        self.scheduler, self.timestep, self.conditioned = scheduler, timestep, conditioned

    def velocity(self, network: Any, prompt: Known) -> Velocity:
        embeds, pooled, lq = parts(prompt)

        def predict(z: Tensor, sigma: Tensor) -> Tensor:
            return network(
                hidden_states=beside(z, lq).to(embeds.dtype),
                timestep=(1000 * sigma).to(z.device),  # not in half precision, which has no room for its digits
                encoder_hidden_states=repeated(embeds, len(z)),
                pooled_projections=None if pooled is None else repeated(pooled, len(z)),
                return_dict=False,
            )[0].float()

        return predict

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        sigma = torch.full((len(latents),), self.timestep / 1000, device=latents.device)
        velocity = self.velocity(network, self._student_knows(prompt, latents))
        return clean_from_velocity(latents.float(), velocity(latents, sigma), sigma)


class Ddpm(_Shared):
    """SD2's UNets: they predict noise or v in a DDPM's scale. The LQ latents are taken as its most noisy ones."""

    component = "unet"
    student_targets: tuple[str, ...] = lora_targets.UNET_STUDENT
    fake_score_targets: tuple[str, ...] = lora_targets.UNET_FAKE_SCORE

    def __init__(self, scheduler: Any, timestep: float = 999.0, conditioned: bool = False):
        self.scheduler, self.timestep, self.conditioned = scheduler, timestep, conditioned

    def _predict(self, network: Any, prompt: Known) -> Callable[[Tensor, Tensor], Tensor]:
        """`(z_t, t) -> prediction` of the network: z_t (B, C, h, w) as it was trained to read them, t (B,) integers."""
        embeds, _, lq = parts(prompt)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return network(
                beside(noisy, lq).to(embeds.dtype), timestep, encoder_hidden_states=repeated(embeds, len(noisy))
            ).sample.float()

        return predict

    def velocity(self, network: Any, prompt: Known) -> Velocity:
        return ddpm_velocity(self._predict(network, prompt), self.scheduler)

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        cumulative = self.scheduler.alphas_cumprod[int(self.timestep)].float().item()
        scale = cumulative**0.5 + (1 - cumulative) ** 0.5
        # noise_levels begins with the last timestep.
        sigma = noise_levels(self.scheduler)[len(self.scheduler.alphas_cumprod) - 1 - int(self.timestep)]
        sigma = sigma.to(latents.device).expand(len(latents))
        flow = latents.float() / scale
        velocity = self.velocity(network, self._student_knows(prompt, latents))
        return clean_from_velocity(flow, velocity(flow, sigma), sigma)


class ResidualShifting(Ddpm):
    """UNets that predict clean latents from noisy ones on the way to the LQ picture's, which they read (ResShift)."""

    def __init__(self, scheduler: ResidualShift, timestep: float | None = None, conditioned: bool = True):
        last = scheduler.config.num_train_timesteps - 1
        super().__init__(scheduler, last if timestep is None else timestep, conditioned)

    @property
    def strength(self) -> float:
        """Of the most noisy level: y and noise."""
        return float(self.scheduler.sigmas[0])

    @property
    def input_scale(self) -> float:  # type: ignore[override]
        eta = float(self.scheduler.etas[int(self.timestep)])
        return (self.scheduler.config.kappa**2 * eta + 1) ** -0.5

    @property
    def pipeline_scheduler(self) -> DDPMScheduler:
        """Takes a prediction of clean latents for what it is."""
        steps = self.scheduler.config.num_train_timesteps
        return DDPMScheduler(num_train_timesteps=steps, prediction_type="sample", clip_sample=False)

    def velocity(self, network: Any, prompt: Known) -> Velocity:
        lq, predict = parts(prompt)[2], self._predict(network, prompt)
        assert lq is not None

        def velocity(z: Tensor, sigma: Tensor) -> Tensor:
            return residual_velocity(predict, self.scheduler, repeated(lq, len(z)))(z, sigma)

        return velocity

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        timestep = torch.full((len(latents),), int(self.timestep), device=latents.device)
        predict = self._predict(network, self._student_knows(prompt, latents))
        return predict(self.input_scale * latents.float(), timestep)


def parts(known: Known) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Embeddings, pooled ones, latents of the LQ pictures."""
    return known if len(known) == 3 else (*known, None)


def beside(noisy: Tensor, lq: Tensor | None) -> Tensor:
    """Noisy latents (B, C, h, w), with those of the LQ pictures as further channels where they are read."""
    return noisy if lq is None else torch.cat([noisy, repeated(lq, len(noisy)).to(noisy)], dim=1)


def repeated(known: Tensor, count: int) -> Tensor:
    """What is known of B samples, or of all alike (B = 1), for `count` that are these, once or several times over."""
    if len(known) in (1, count):
        return known.expand(count, *known.shape[1:])
    return known.repeat(count // len(known), *[1] * (known.ndim - 1))


def guided_velocity(
    family: Family, network: nn.Module, prompt: Known, null_prompt: Prompt | None = None, guidance_scale: float = 1.0
) -> Velocity:
    """A velocity callable with classifier-free guidance inside: both prompts in one pass of the network.

    Args:
        family: of the network.
        network: in the role it has when the callable is called.
        prompt: what is guided towards.
        null_prompt: the empty prompt; needed where `guidance_scale` is not 1.
        guidance_scale: w of classifier-free guidance; 1 runs the prompt alone.

    Raises:
        ValueError: if guidance is asked for without a null prompt.
    """
    if guidance_scale == 1:
        return family.velocity(network, prompt)
    if null_prompt is None:
        raise ValueError(f"A guidance_scale of {guidance_scale} needs the embeddings of the null prompt.")
    embeds, pooled = null_prompt

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        def both(null: Tensor | None, wanted: Tensor | None) -> Tensor | None:
            if null is None or wanted is None:
                return None
            return torch.cat([repeated(half, len(z)) for half in (null.to(wanted), wanted)])

        pair: Any = (both(embeds, prompt[0]), both(pooled, prompt[1]), *prompt[2:])
        unconditional, conditional = family.velocity(network, pair)(torch.cat([z, z]), torch.cat([sigma, sigma])).chunk(
            2
        )
        return classifier_free_guidance(unconditional, conditional, guidance_scale)

    return velocity

"""The two families of base networks behind one interface: rectified flow (SD3) and DDPM (SD2's UNets).

The objectives know velocities only; the student's one step ends at clean latents in both.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models import lora_targets
from ..pipelines.text import Prompt
from .objectives import classifier_free_guidance, clean_from_velocity, ddpm_velocity, noise_levels
from .objectives.noise import Velocity


class Family(Protocol):
    """What the trainer has to know of a base.

    Attributes:
        component: name of the network in a pipeline folder, and its prefix in LoRA files.
        student_targets, fake_score_targets: layers that the LoRAs of the two are on.
        timestep: the student's one timestep.
        scheduler: of the base; its training schedule gives the noise levels.
    """

    component: str
    student_targets: tuple[str, ...]
    fake_score_targets: tuple[str, ...]
    timestep: float
    scheduler: Any

    def velocity(self, network: Any, prompt: Prompt) -> Velocity:
        """The callable `(z, sigma) -> noise - clean` of the network in the role it has when it is called."""

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        """The student's result z^ for encoded pictures (B, C, h, w); float32, with gradient."""


class RectifiedFlow:
    """SD3's transformers: they predict the velocity itself."""

    component = "transformer"
    student_targets: tuple[str, ...] = lora_targets.STUDENT
    fake_score_targets: tuple[str, ...] = lora_targets.FAKE_SCORE

    def __init__(self, scheduler: Any, timestep: float = 1000.0):
        self.scheduler, self.timestep = scheduler, timestep

    def velocity(self, network: Any, prompt: Prompt) -> Velocity:
        embeds, pooled = prompt

        def predict(z: Tensor, sigma: Tensor) -> Tensor:
            return network(
                hidden_states=z.to(embeds.dtype),
                timestep=(1000 * sigma).to(z.device),  # not in half precision, which has no room for its digits
                encoder_hidden_states=repeated(embeds, len(z)),
                pooled_projections=None if pooled is None else repeated(pooled, len(z)),
                return_dict=False,
            )[0].float()

        return predict

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        sigma = torch.full((len(latents),), self.timestep / 1000, device=latents.device)
        return clean_from_velocity(latents.float(), self.velocity(network, prompt)(latents, sigma), sigma)


class Ddpm:
    """SD2's UNets: they predict noise or v in a DDPM's scale. The LQ latents are taken as its most noisy ones."""

    component = "unet"
    student_targets: tuple[str, ...] = lora_targets.UNET_STUDENT
    fake_score_targets: tuple[str, ...] = lora_targets.UNET_FAKE_SCORE

    def __init__(self, scheduler: Any, timestep: float = 999.0):
        self.scheduler, self.timestep = scheduler, timestep

    def velocity(self, network: Any, prompt: Prompt) -> Velocity:
        embeds, _ = prompt

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return network(
                noisy.to(embeds.dtype), timestep, encoder_hidden_states=repeated(embeds, len(noisy))
            ).sample.float()

        return ddpm_velocity(predict, self.scheduler)

    def one_step(self, network: Any, latents: Tensor, prompt: Prompt) -> Tensor:
        cumulative = self.scheduler.alphas_cumprod[int(self.timestep)].float().item()
        scale = cumulative**0.5 + (1 - cumulative) ** 0.5
        # noise_levels begins with the last timestep.
        sigma = noise_levels(self.scheduler)[len(self.scheduler.alphas_cumprod) - 1 - int(self.timestep)]
        sigma = sigma.to(latents.device).expand(len(latents))
        flow = latents.float() / scale
        return clean_from_velocity(flow, self.velocity(network, prompt)(flow, sigma), sigma)


def repeated(known: Tensor, count: int) -> Tensor:
    """What is known of B samples, or of all alike (B = 1), for `count` that are these, once or several times over."""
    if len(known) in (1, count):
        return known.expand(count, *known.shape[1:])
    return known.repeat(count // len(known), *[1] * (known.ndim - 1))


def guided_velocity(
    family: Family, network: nn.Module, prompt: Prompt, null_prompt: Prompt | None = None, guidance_scale: float = 1.0
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

        pair: Any = (both(embeds, prompt[0]), both(pooled, prompt[1]))
        unconditional, conditional = family.velocity(network, pair)(torch.cat([z, z]), torch.cat([sigma, sigma])).chunk(
            2
        )
        return classifier_free_guidance(unconditional, conditional, guidance_scale)

    return velocity

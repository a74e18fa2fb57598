"""One copy of the base network in three roles: student, frozen teacher, fake-score model.

The published code holds two copies of the base (student; teacher and fake score). Here all three are peft adapters on
one: the teacher is the base itself, or the base with an adapter of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .objectives import classifier_free_guidance
from .objectives.noise import Velocity, per_sample

STUDENT, TEACHER, FAKE_SCORE = "student", "teacher", "fake_score"


class SharedBase:
    """A network whose roles are adapters.

    Args:
        network: the base, a diffusers model. It is frozen and given the adapters.
        adapters: a LoRA for each role that is not the base itself.

    Raises:
        ValueError: for a role other than student, teacher and fake_score.
    """

    def __init__(self, network: Any, adapters: dict[str, LoraConfig]):
        unknown = sorted(set(adapters) - {STUDENT, TEACHER, FAKE_SCORE})
        if unknown:
            raise ValueError(f"Roles are {STUDENT}, {TEACHER} and {FAKE_SCORE}, not {', '.join(unknown)}.")
        self.network = network.requires_grad_(False)
        for name, config in adapters.items():
            network.add_adapter(config, adapter_name=name)
        self.names = frozenset(adapters)
        self._layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self._role: str | None = None
        self._activate(None)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights of one role's adapter, in a fixed order; none for a role that is the base itself."""
        return [weight for name, weight in self.network.named_parameters() if f".{role}." in name]

    @contextmanager
    def role(self, role: str) -> Iterator[Any]:
        """The network in one role, until the end of the block; then in the role it had before.

        A backward pass that recomputes (gradient checkpointing) has to run in the role of its forward pass.
        """
        before = self._role
        self._activate(role)
        try:
            yield self.network
        finally:
            self._activate(before)

    def _activate(self, role: str | None) -> None:
        self._role = role
        own = role if role in self.names else None
        for layer in self._layers:
            layer.enable_adapters(own is not None)
            if own is not None:
                layer.set_adapter(own)
        # peft freezes what is not active; optimisers and DDP want the set of trainable weights to stay the same.
        for name in self.names - {TEACHER}:
            for weight in self.parameters(name):
                weight.requires_grad_(True)


def flow_velocity(
    network: nn.Module,
    prompt: tuple[Tensor, Tensor],
    null_prompt: tuple[Tensor, Tensor] | None = None,
    guidance_scale: float = 1.0,
) -> Velocity:
    """The velocity callable of an SD3 transformer, guidance inside.

    Args:
        network: the transformer, in the role it has when it is called.
        prompt: embeddings (B or 1, tokens, width) and pooled ones (B or 1, pooled width).
        null_prompt: those of the empty prompt; needed where `guidance_scale` is not 1.
        guidance_scale: w of classifier-free guidance; 1 runs the prompt alone.

    Raises:
        ValueError: if guidance is asked for without a null prompt.
    """
    if guidance_scale != 1 and null_prompt is None:
        raise ValueError(f"A guidance_scale of {guidance_scale} needs the embeddings of the null prompt.")

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        prompts = [prompt] if guidance_scale == 1 or null_prompt is None else [null_prompt, prompt]
        count, batch = len(prompts), z.shape[0]
        dtype = next(network.parameters()).dtype
        embeds, pooled = (
            torch.cat([pair[part].to(z.device, dtype).expand(batch, *pair[part].shape[1:]) for pair in prompts])
            for part in (0, 1)
        )
        predicted = network(
            hidden_states=z.to(dtype).repeat(count, 1, 1, 1),
            timestep=(1000 * sigma).to(z.device, dtype).repeat(count),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        if count == 1:
            return predicted
        return classifier_free_guidance(*predicted.chunk(2), guidance_scale)

    return velocity


def one_step(network: nn.Module, latents: Tensor, prompt: tuple[Tensor, Tensor], sigma: float = 1.0) -> Tensor:
    """The student's result z^ = z_L - sigma * v at its one level, gradient and all: (B, C, h, w), float32."""
    levels = torch.full((latents.shape[0],), sigma, device=latents.device)
    velocity = flow_velocity(network, prompt)(latents, levels)
    return latents.float() - per_sample(levels, velocity) * velocity

"""One copy of the base network in three roles: student, frozen teacher, fake-score model; and discriminators.

The published code holds two copies of the base (student; teacher and fake score). Here all three are peft adapters on
one: the teacher is the base itself, or the base with an adapter of its own. Only a student that trains all of its
weights has a network of its own.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .discriminators import Discriminator
from .families import Family, Known, Prompt

STUDENT, TEACHER, FAKE_SCORE = "student", "teacher", "fake_score"
DISCRIMINATOR, LATENT_DISCRIMINATOR = "discriminator", "latent_discriminator"


class SharedBase:
    """A network whose roles are adapters.

    Args:
        network: the base, a diffusers model. It is frozen and given the adapters. An adapter "teacher" that it has
            already is the teacher's.
        adapters: a LoRA for each role that is not the base itself.
        student: a network of its own for the student, instead of an adapter; what it trains is what in it wants a
            gradient.
        trained: parts of the network (names of its children) whose own weights the student trains, because no other
            role uses them; a student's own network has to share them.

    Raises:
        ValueError: for a role other than student, teacher and fake_score.
    """

    def __init__(
        self, network: Any, adapters: dict[str, LoraConfig], student: Any = None, trained: tuple[str, ...] = ()
    ):
        unknown = sorted(set(adapters) - {STUDENT, TEACHER, FAKE_SCORE})
        if unknown:
            raise ValueError(f"Roles are {STUDENT}, {TEACHER} and {FAKE_SCORE}, not {', '.join(unknown)}.")
        self.network = network.requires_grad_(False)
        self.own_student = student
        for name, config in adapters.items():
            with warnings.catch_warnings():  # peft warns of more than one adapter, which is the point here
                warnings.simplefilter("ignore", UserWarning)
                network.add_adapter(config, adapter_name=name)
        self.names = frozenset(adapters) | ({TEACHER} & set(getattr(network, "peft_config", None) or {}))
        self._layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self._trained = trained
        for name, weight in network.named_parameters():
            if self._own(name):
                weight.requires_grad_(True)
        # Walking through all modules takes milliseconds, and a step changes roles twenty times.
        self._adapted = [weight for name in self.names - {TEACHER} for weight in self.parameters(name)]
        self._role: str | None = None
        self._activate(None)

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The weights of one role, by name in its network; none for a role that is the base itself."""
        if role == STUDENT and self.own_student is not None:
            return {name: weight for name, weight in self.own_student.named_parameters() if weight.requires_grad}
        return {
            name: weight
            for name, weight in self.network.named_parameters()
            if f".{role}." in name or (role == STUDENT and self._own(name))
        }

    def _own(self, name: str) -> bool:
        """Whether a weight of the network itself is the student's."""
        return name.split(".", 1)[0] in self._trained

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights of one role, in a fixed order."""
        return list(self.named_parameters(role).values())

    @contextmanager
    def role(self, role: str) -> Iterator[Any]:
        """The network in one role, until the end of the block; then in the role it had before.

        A backward pass that recomputes (gradient checkpointing) has to run in the role of its forward pass.
        """
        before = self._role
        if role != before:
            self._activate(role)
        try:
            yield self.network if role != STUDENT or self.own_student is None else self.own_student
        finally:
            if role != before:
                self._activate(before)

    def _activate(self, role: str | None) -> None:
        self._role = role
        own = role if role in self.names else None
        for layer in self._layers:
            layer.enable_adapters(own is not None)
            if own is not None:
                layer.set_adapter(own)
            if own == TEACHER:
                layer.requires_grad_(False)  # a gradient may pass through it
        # peft freezes what is not active; optimisers and DDP want the set of trainable weights to stay the same.
        for weight in self._adapted:
            weight.requires_grad_(True)


class Networks(nn.Module):
    """All networks of a distillation. What has a backward pass goes through `forward`, where DDP sees it.

    Args:
        family: of the denoiser.
        denoiser: the transformer or UNet in its three roles.
        vae: the autoencoder; its encoder is the base's, or the student's own (a LoRA, or all of its weights). Its
            decoder is the student's, trained or not: nobody else decodes.
        shift: added to latents before they are scaled, negated (SD3's shift_factor, which TSD-SR does not use).
        discriminator: of the student's pictures, where a loss asks for one.
        latent_discriminator: of its latents, likewise.
    """

    def __init__(
        self,
        family: Family,
        denoiser: SharedBase,
        vae: SharedBase,
        shift: float = 0.0,
        discriminator: Discriminator | None = None,
        latent_discriminator: Discriminator | None = None,
    ):
        super().__init__()
        self.family, self.denoiser, self.codec, self.shift = family, denoiser, vae, shift
        self.scaling = vae.network.config.scaling_factor
        self.network, self.vae = denoiser.network, vae.network
        self.student_network, self.student_vae = denoiser.own_student, vae.own_student
        self.discriminator, self.latent_discriminator = discriminator, latent_discriminator

    @property
    def discriminators(self) -> dict[str, Discriminator]:
        """Those there are, by their roles."""
        found = {DISCRIMINATOR: self.discriminator, LATENT_DISCRIMINATOR: self.latent_discriminator}
        return {role: one for role, one in found.items() if one is not None}

    @contextmanager
    def role(self, role: str) -> Iterator[tuple[Any, Any]]:
        """Denoiser and autoencoder in one role."""
        with self.denoiser.role(role) as denoiser, self.codec.role(role) as vae:
            yield denoiser, vae

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """What is trained in one role."""
        if role in (DISCRIMINATOR, LATENT_DISCRIMINATOR):
            return list(self.discriminators[role].parameters()) if role in self.discriminators else []
        return self.denoiser.parameters(role) + self.codec.parameters(role)

    def trained(self) -> dict[str, Tensor]:
        """What a run changes, by name: what is trained in any role, and what discriminators' norms remember."""
        found: dict[str, Tensor] = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
        for role, discriminator in self.discriminators.items():
            found |= {f"{role}.{name}": buffer for name, buffer in discriminator.named_buffers()}
        return found

    def stepped(self, role: str) -> None:
        """A role's weights have moved: what depends on them follows."""
        if role in self.discriminators:
            self.discriminators[role].renew_norms()

    def forward(
        self,
        role: str,
        inputs: Tensor,
        sigma: Tensor | None = None,
        *,
        prompt: Known | None = None,
        decode: bool = False,
    ) -> Any:
        """What a role computes; called, and followed by its backward pass, within `role(role)`.

        Args:
            role: the student, a discriminator, or one that predicts velocities.
            inputs: pictures (B, 3, H, W) in -1..1 for the student and the discriminator of pictures, latents
                (B, C, h, w) for the others.
            sigma: levels (B,) of the latents.
            prompt: what is conditioned on one: all but a discriminator of pictures.
            decode: whether the student's pictures are wanted.

        Returns:
            The student's latents, and its pictures or None; a discriminator's logits; a velocity.
        """
        if role in self.discriminators:
            known = () if sigma is None else (sigma, prompt)
            return self.discriminators[role](inputs, *known)
        assert prompt is not None
        with self.role(role) as (denoiser, vae):
            if sigma is not None:
                return self.family.velocity(denoiser, prompt)(inputs, sigma)
            latents = self.family.one_step(denoiser, self._encode(vae, inputs), (prompt[0], prompt[1]))
            return latents, self.decode(latents) if decode else None

    def judge(self, role: str, inputs: Tensor, *known: Any) -> list[Tensor]:
        """A discriminator's maps of pictures (B, 3, H, W), or of noisy latents with their levels and prompt; logits
        last. Past DDP: its weights get no gradient.
        """
        return self.discriminators[role].judge(inputs, *known)

    def memory(self) -> str:
        """One sentence on what the shared base saves."""
        one = sum(w.numel() * w.element_size() for n, w in self.network.named_parameters() if ".lora_" not in n) / 1e9
        followed = FAKE_SCORE in self.denoiser.names
        if self.student_network is None:
            others = "teacher and fake score" if followed else "teacher"
            return (
                f"One copy of the base's {self.family.component} serves student{',' if followed else ' and'} {others}: "
                f"{one:.3g} GB of weights, where two copies would take {2 * one:.3g} GB."
            )
        return (
            f"One copy of the base's {self.family.component} ({one:.3g} GB of weights) serves "
            f"{'teacher and fake score' if followed else 'the teacher'}; the student trains all of its own."
        )

    @torch.no_grad()
    def hq_latents(self, pictures: Tensor) -> Tensor:
        """The latents that the base's own encoder gives pictures (B, 3, H, W) in -1..1; float32."""
        with self.codec.role(TEACHER) as vae:
            return self._encode(vae, pictures).float()

    def told(self, prompt: Prompt, pictures: Tensor) -> Known:
        """What a denoiser is told: the prompt, and of one that restores the enlarged LQ pictures, -1..1."""
        return (*prompt, self.hq_latents(pictures)) if self.family.conditioned else prompt

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, float32; with gradient to latents and, if trained, decoder."""
        latents = (latents / self.scaling + self.shift).to(_dtype(self.vae.decoder))
        return self.vae.decode(latents, return_dict=False)[0].float()

    def _encode(self, vae: Any, pictures: Tensor) -> Tensor:
        encoded = vae.encode(pictures.to(_dtype(vae.encoder)))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - self.shift) * self.scaling


def _dtype(part: nn.Module) -> torch.dtype:
    """Of the weights that take pictures or latents in; adapters may have another."""
    return next(part.parameters()).dtype

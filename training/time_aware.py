"""A discriminator of noisy latents that looks through the frozen teacher's eyes and is told how noisy they are.

TAD-SR's (arXiv 2408.07476): what a denoiser attends to, and so what tells real from made, depends on the noise level.
Features of a frozen denoiser are those of latent adversarial distillation (arXiv 2403.12015), the convolutions of the
heads those of StyleGAN-T (arXiv 2301.09515).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import DistillConfig
from .discriminators import FEWEST_POSITIONS, Discriminator, Votes
from .families import Family, Known
from .networks import TEACHER, SharedBase


class _Deepest(Exception):
    """The last map is taken: what follows in the network is not needed."""


class TeacherFeatures:
    """Maps (B, C, h, w) inside the frozen teacher: behind blocks of an MMDiT, or behind stages of a UNet's encoder.

    Not a module: the network belongs to the base that student, teacher and fake score share. Gradient flows through it
    into the latents, whatever role the base has by the time of the backward pass.

    Args:
        family: of the network.
        denoiser: the base in its roles.
        depths: how many maps at most. Of a transformer's blocks they are evenly spaced, ends left out; of a UNet's
            stages the first ones, each before it halves its map.

    Attributes:
        channels: C of each.

    Raises:
        ValueError: if `depths` is under 1.
    """

    def __init__(self, family: Family, denoiser: SharedBase, depths: int = 4):
        if depths < 1:
            raise ValueError(f"depths must be at least 1, not {depths}.")
        self._family, self._denoiser = family, denoiser
        network = denoiser.network
        self._patch = getattr(network.config, "patch_size", None)
        if hasattr(network, "transformer_blocks"):
            blocks = network.transformer_blocks
            chosen = sorted({len(blocks) * (index + 1) // (depths + 1) for index in range(depths)})
            self.channels = [network.inner_dim] * len(chosen)
        else:
            blocks = network.down_blocks
            chosen = list(range(len(blocks)))[:depths]
            self.channels = [network.config.block_out_channels[index] for index in chosen]
        self._blocks = [blocks[index] for index in chosen]

    def __call__(self, latents: Tensor, sigma: Tensor, prompt: Known) -> list[Tensor]:
        """Maps of noisy latents (B, C, h, w) at levels sigma (B,), in the dtype that the network computes in."""
        if self._denoiser.network.is_gradient_checkpointing:
            # All of it at once, so that it is in the teacher's role when it is recomputed.
            return checkpoint(self._maps, latents, sigma, prompt, use_reentrant=False, preserve_rng_state=False)
        return self._maps(latents, sigma, prompt)

    def _maps(self, latents: Tensor, sigma: Tensor, prompt: Known) -> list[Tensor]:
        found: list[Tensor] = []

        def take(block: nn.Module, _: Any, output: Any) -> None:
            found.append(self._map(block, output, latents))
            if len(found) == len(self._blocks):
                raise _Deepest

        # Compiled blocks would be compiled anew for every hook.
        with (
            self._denoiser.role(TEACHER) as network,
            _without_checkpointing(network),
            torch.compiler.set_stance("force_eager"),
        ):
            hooks = [block.register_forward_hook(take) for block in self._blocks]
            try:
                self._family.velocity(network, prompt)(latents, sigma)
            except _Deepest:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
        return found

    def _map(self, block: Any, output: Any, latents: Tensor) -> Tensor:
        if self._patch is None:
            _, maps = output  # of the stage's layers, and of the convolution that halves them
            return maps[-2] if block.downsamplers else maps[-1]
        _, tokens = output
        height, width = (side // self._patch for side in latents.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (height, width))


@contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    switched = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


class Head(nn.Module):
    """Votes on one of the teacher's maps: a normalisation that depends on time, then convolutions.

    Args:
        channels: C of the map.
        width: channels of the convolutions.
        votes: logits for each position.
        time_width: of the time's embedding; 0 for a head that is not told the time.
    """

    def __init__(self, channels: int, width: int, votes: int, time_width: int):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * channels)) if time_width else None
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        # At first it votes alike on everything, so that the student is not pushed about by chance.
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.votes = Votes(width, votes)

    def forward(self, maps: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """From (B, C, h, w) and the time's embedding (B, time_width): what it votes on, (B, width, h * w), and logits
        (B, votes * h * w).
        """
        hidden = self.norm(maps)
        if self.modulation is not None:
            scale, shift = self.modulation(time)[..., None, None].chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        hidden, votes = self.votes(self.conv(nn.functional.silu(hidden)).flatten(2))
        return hidden, votes.flatten(1)


class TimeAwareDiscriminator(Discriminator):
    """Judges noisy latents (B, C, h, w) at levels sigma (B,): a head for each of the teacher's maps.

    Its weights, and so its state dict, are those of the heads. They compute in float32, whatever is cast around them.

    Args:
        teacher: what makes the maps.
        width: channels of the heads' convolutions; None for as many as each map has (published).
        votes: logits for each position of a map (published: 64, and 320 for SD2).
        time_width: of the time's embedding.
        time_aware: whether the heads are told the time; the paper's ablation.

    Raises:
        ValueError: if `width`, `votes` or `time_width` is under 1.
    """

    def __init__(
        self,
        teacher: TeacherFeatures,
        width: int | None = None,
        votes: int = 64,
        time_width: int = 256,
        time_aware: bool = True,
    ):
        super().__init__()
        for name, value in (("width", width), ("votes", votes), ("time_width", time_width)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        self._teacher, self._time_width = teacher, time_width
        told = time_width if time_aware else 0
        self.heads = nn.ModuleList([Head(channels, width or channels, votes, told) for channels in teacher.channels])

    def features(self, latents: Tensor, sigma: Tensor, prompt: Known) -> list[Tensor]:
        """What each head votes on, (B, width, positions), then all votes, (B, votes of all positions of all maps).

        Args:
            latents: noisy ones, (B, C, h, w).
            sigma: their levels, (B,).
            prompt: that the teacher reads.

        Raises:
            ValueError: if a map has fewer positions than the heads look at.
        """
        maps = self._teacher(latents, sigma, prompt)
        with torch.autocast(latents.device.type, enabled=False):
            time = get_timestep_embedding(1000 * sigma.float(), self._time_width, flip_sin_to_cos=True)
            found = []
            for head, one in zip(self.heads, maps, strict=True):
                if one[0, 0].numel() < FEWEST_POSITIONS:
                    raise ValueError(f"Latents of {tuple(latents.shape[-2:])} are too small for the discriminator.")
                # Tokens lie channels last, for which group norms on a CPU have no sound backward pass (torch 2.13).
                found.append(head(one.float().contiguous(), time))
        hidden, votes = zip(*found, strict=True)
        return [*hidden, torch.cat(votes, dim=1)]


def make_latent_discriminator(config: DistillConfig, family: Family, denoiser: SharedBase) -> TimeAwareDiscriminator:
    """As a run's settings ask for it, in eval mode."""
    found = TimeAwareDiscriminator(
        TeacherFeatures(family, denoiser, config.latent_discriminator_depths),
        config.latent_discriminator_width or None,
        config.latent_discriminator_votes,
        time_aware=config.time_aware,
    )
    return found.eval()

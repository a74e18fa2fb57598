"""Networks that tell photographs from what a student makes."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from .config import DistillConfig


class Discriminator(nn.Module):
    """What the trainer has to know of one: its maps. Calling it gives the last of them, the logits.

    In training mode every call takes a step of its spectral norms' power iteration, as torch has it. In eval mode only
    `renew_norms` does, so that a result does not depend on how often, and on how many processes, it was called before.
    """

    def features(self, pictures: Tensor, *known: Any) -> list[Tensor]:
        """Maps of what it judges, logits last; `known` is what it is told of the pictures."""
        raise NotImplementedError

    def forward(self, pictures: Tensor, *known: Any) -> Tensor:
        """The logits, high where something looks real."""
        return self.features(pictures, *known)[-1]

    def judge(self, pictures: Tensor, *known: Any) -> list[Tensor]:
        """`features` for those who are judged: gradient flows into `pictures` alone."""
        self.requires_grad_(False)
        maps = self.features(pictures, *known)
        self.requires_grad_(True)
        return maps

    @torch.no_grad()
    def renew_norms(self) -> None:
        """A step of power iteration for each spectral norm, after its weights moved (arXiv 1802.05957, algorithm 1)."""
        before = self.training
        self.train()
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                _ = module.weight
        self.train(before)


class PatchDiscriminator(Discriminator):
    """Judges patches of pictures (B, 3, H, W) in -1..1: logits (B, 1, H / 2^layers, W / 2^layers).

    Strided convolutions as in pix2pix (arXiv 1611.07004); spectral norms keep it Lipschitz.

    Args:
        width: channels of the first layer; each strided one doubles them, up to eight times.
        layers: how many are strided.
    """

    def __init__(self, width: int = 32, layers: int = 3):
        super().__init__()
        found: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * 2 ** min(i, 3) for i in range(layers + 1)]
        for narrow, wide in pairwise(widths):
            found += [spectral_norm(nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False)), nn.LeakyReLU(0.2)]
        wide = widths[-1]
        found += [spectral_norm(nn.Conv2d(wide, wide // 2, 3, padding=1, bias=False)), nn.LeakyReLU(0.2)]
        found += [nn.Conv2d(wide // 2, 1, 3, padding=1)]
        self.layers = nn.Sequential(*found)

    def features(self, pictures: Tensor, *known: Any) -> list[Tensor]:
        """The map behind every activation, then the logits."""
        maps = []
        for layer in self.layers:
            pictures = layer(pictures)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(pictures)
        return [*maps, pictures]


def make_discriminator(config: DistillConfig) -> Discriminator:
    """As a run's settings ask for it, in eval mode."""
    found = PatchDiscriminator(config.discriminator_width, config.discriminator_layers).eval()
    return found.to(memory_format=torch.channels_last)  # what convolutions are fastest with

"""Networks that tell photographs from what a student makes."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from .config import ConfigError, DistillConfig, reason

GAIN = 2.0  # of a convolution under a spectral norm, which lets little of a picture's usual content through
FEWEST_POSITIONS = 4  # of a map that `Votes` looks at: its convolution wraps around once at most
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that vision transformers are trained with


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

    Strided convolutions as in pix2pix (arXiv 1611.07004); spectral norms keep it Lipschitz. What passes through one is
    doubled: without that, maps shrink from layer to layer, and logits stay alike for thousands of steps.

    Args:
        width: channels of the first layer; each strided one doubles them, up to eight times.
        layers: how many are strided.
        channels: 6 where every picture is followed by the one that it was made of.
    """

    def __init__(self, width: int = 32, layers: int = 3, channels: int = 3):
        super().__init__()
        found: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
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
            if parametrize.is_parametrized(layer):
                pictures = GAIN * pictures
            if isinstance(layer, nn.LeakyReLU):
                maps.append(pictures)
        return [*maps, pictures]


class MultiScaleDiscriminator(Discriminator):
    """Judges patches of pictures (B, 3, H, W) in -1..1 at sizes that halve (pix2pixHD, arXiv 1711.11585).

    Logits are (B, scales, H / 2^layers, W / 2^layers): those of smaller pictures are repeated, so that each size counts
    alike.

    Args:
        width: channels of the first layer for each size.
        layers: how many are strided.
        scales: how many sizes.
        channels: 6 where every picture is followed by the one that it was made of.
    """

    def __init__(self, width: int = 32, layers: int = 3, scales: int = 3, channels: int = 3):
        super().__init__()
        self.scales = nn.ModuleList([PatchDiscriminator(width, layers, channels) for _ in range(scales)])

    def features(self, pictures: Tensor, *known: Any) -> list[Tensor]:
        """The maps of each size, largest first, then the logits."""
        maps: list[Tensor] = []
        logits: list[Tensor] = []
        for discriminator in self.scales:
            if logits:
                pictures = F.avg_pool2d(pictures, 3, stride=2, padding=1, count_include_pad=False)
            *of_size, last = discriminator.features(pictures)
            maps += of_size
            logits.append(F.interpolate(last, size=logits[0].shape[-2:]) if logits else last)
        return [*maps, torch.cat(logits, dim=1)]


class Votes(nn.Module):
    """From features (B, width, n) at n positions, row by row: (B, width, n) once more, and logits (B, votes, n).

    The convolutions of StyleGAN-T's heads (arXiv 2301.09515), which TAD-SR and TinySR took over.

    Args:
        width: channels.
        votes: logits for each position.
    """

    def __init__(self, width: int, votes: int):
        super().__init__()
        self.point, self.line = self._layer(width, 1), self._layer(width, 9)
        self.vote = spectral_norm(nn.Conv1d(width, votes, 1))

    @staticmethod
    def _layer(width: int, kernel: int) -> nn.Sequential:
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        return nn.Sequential(spectral_norm(conv), nn.GroupNorm(math.gcd(4, width), width), nn.LeakyReLU(0.2))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.point(hidden)
        hidden = (hidden + self.line(hidden)) / math.sqrt(2)
        return hidden, self.vote(hidden)


class ProjectedDiscriminator(Discriminator):
    """Judges pictures (B, 3, H, W) in -1..1 through a frozen vision transformer (StyleGAN-T, arXiv 2301.09515).

    A head looks at the embeddings of its patches, and one at the tokens behind every quarter of its blocks. The
    published one crops, cuts out and shrinks pictures to 224 pixels at random; here they are judged as they are: what
    a step does depends on nothing but its number. Its weights, and so its state dict, are those of the heads, which
    compute in float32.

    Args:
        backbone: a ViT or DINOv2 of transformers.
        votes: logits for each position and head.
    """

    _backbone: tuple[nn.Module]

    def __init__(self, backbone: Any, votes: int = 1):
        super().__init__()
        self._backbone = (backbone.eval().requires_grad_(False),)  # in a tuple: not one of its modules
        blocks, width = backbone.config.num_hidden_layers, backbone.config.hidden_size
        self._chosen = sorted({blocks * quarter // 4 for quarter in range(5)})
        self._patch = backbone.config.patch_size
        more = inspect.signature(backbone.forward).parameters  # DINOv2 interpolates its positions without being told
        self._more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in more else {}
        self.heads = nn.ModuleList([Votes(width, votes) for _ in self._chosen])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProjectedDiscriminator":
        """What moves it to a device moves the transformer as well."""
        self._backbone[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def features(self, pictures: Tensor, *known: Any) -> list[Tensor]:
        """What each head votes on, (B, C, n), then all votes, (B, votes of all heads).

        Raises:
            ConfigError: if the pictures have fewer patches than the heads look at.
        """
        height, width = (side // self._patch for side in pictures.shape[-2:])
        if height * width < FEWEST_POSITIONS:
            raise ConfigError(
                f"The discriminator dino looks at patches of {self._patch} pixels and needs crops of at least "
                f"{2 * self._patch}, not {min(pictures.shape[-2:])}."
            )
        whole = (height * self._patch, width * self._patch)
        if pictures.shape[-2:] != whole:
            pictures = F.interpolate(pictures, size=whole, mode="area")
        mean, std = (torch.tensor(one, device=pictures.device).view(3, 1, 1) for one in (MEAN, STD))
        pictures = (pictures / 2 + 0.5 - mean) / std
        states = self._backbone[0](pictures, output_hidden_states=True, **self._more).hidden_states
        found = []
        with torch.autocast(pictures.device.type, enabled=False):
            for head, index in zip(self.heads, self._chosen, strict=True):
                tokens = states[index][:, -height * width :]  # behind the class token and registers
                found.append(head(tokens.float().transpose(1, 2).contiguous()))
        hidden, votes = zip(*found, strict=True)
        return [*hidden, torch.cat([one.flatten(1) for one in votes], dim=1)]


def make_discriminator(config: DistillConfig, channels: int = 3) -> Discriminator:
    """As a run's settings ask for it, in eval mode.

    Args:
        config: discriminator_kind and what belongs to it are read from it.
        channels: of what it judges; 3 for a vision transformer.

    Raises:
        ConfigError: if its vision transformer cannot be had.
    """
    width, layers = config.discriminator_width, config.discriminator_layers
    found: Discriminator
    if config.discriminator_kind == "dino":
        found = ProjectedDiscriminator(load_backbone(config.discriminator_model, twice=config.r1_weight > 0))
    elif config.discriminator_kind == "multiscale":
        found = MultiScaleDiscriminator(width, layers, config.discriminator_scales, channels)
    else:
        found = PatchDiscriminator(width, layers, channels)
    return found.eval().to(memory_format=torch.channels_last)  # what convolutions are fastest with


def load_backbone(name: str, twice: bool = False) -> Any:
    """A vision transformer in float32.

    Args:
        name: folder or Hub id.
        twice: whether it is differentiated twice, which fused attention cannot be.

    Raises:
        ConfigError: if it is not here and cannot be fetched, or is of another kind.
    """
    from transformers import AutoConfig, Dinov2Model, ViTModel

    kinds: dict[str, Callable[..., Any]] = {
        "vit": partial(ViTModel.from_pretrained, add_pooling_layer=False),
        "dinov2": Dinov2Model.from_pretrained,
    }
    more: dict[str, Any] = {"attn_implementation": "eager"} if twice else {}
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        backbone = kinds[kind](name, **more).float() if kind in kinds else None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The vision transformer {name} (discriminator_model) is not here and could not be fetched "
            f"({reason(error)}); name its folder, fetch it once with a network, or use discriminator_kind multiscale, "
            "which needs no download."
        ) from error
    if backbone is None:
        raise ConfigError(f"discriminator_model {name} is a {kind}; the discriminator dino needs a vit or dinov2.")
    return backbone

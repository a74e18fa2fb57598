"""Where small networks begin that are trained from nothing: near something that works, to spend no steps on it."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import nn

# The tokens that heads begin by looking at, (right, down) of their own; the last head, and further ones, are left.
NEIGHBOURS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
SHARPNESS = 1.0  # a token one further away begins with about exp(-SHARPNESS) of the attention


@torch.no_grad()
def start_as_interpolation(vae: AutoencoderTiny) -> None:
    """Initialise so that latents 0..2 are the picture's RGB, averaged, and decoding interpolates them.

    Residual blocks start as identities (Fixup initialisation, Zhang et al. 2019), other channels with random features
    that the last convolution does not read yet. From PyTorch's own initialisation the first thousand steps would be
    spent on finding the mean colour.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            nn.init.zeros_(module.conv[-1].weight)
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    for half in (vae.encoder.layers, vae.decoder.layers):
        convolutions = [layer for layer in half if isinstance(layer, nn.Conv2d)]
        for conv in convolutions:
            weight = conv.weight
            weight[:3] = 0
            for color in range(3):
                if conv.stride == (2, 2):
                    weight[color, color, 1:, 1:] = 1 / 4
                elif half is vae.decoder.layers and conv not in (convolutions[0], convolutions[-1]):
                    weight[color, color] = torch.outer(binomial, binomial)  # smooths the nearest-neighbour upsampling
                else:
                    weight[color, color, 1, 1] = 1


@torch.no_grad()
def start_as_convolution(
    transformer: SD3Transformer2DModel, neighbours: Sequence[tuple[int, int]] = NEIGHBOURS
) -> None:
    """Initialise so that a head looks at one neighbour of each token, wherever it is, as a convolution does.

    After ConViT (d'Ascoli et al. 2021, arXiv 2103.10697, section 3), with SD3's sinusoidal positions: query and key
    read the sines and cosines of the highest frequencies, the query turned by its neighbour's distance d, so that
    their product is a sum of cos(w * (j - i - d)), largest at j = i + d. The patches' embedding leaves these channels
    to the positions. A transformer of a few layers otherwise spends its first steps on finding out which tokens lie
    side by side.
    """
    settings = transformer.config
    width = settings.num_attention_heads * settings.attention_head_dim
    spacing = settings.sample_size / settings.patch_size / settings.pos_embed_max_size
    half, count = width // 4, min(width // 4, settings.attention_head_dim // 4)
    # diffusers' table (get_2d_sincos_pos_embed): sines, then cosines, of the column; the same of the row.
    frequencies = spacing / 10000 ** (torch.arange(count) / half)
    sines = [torch.arange(count) + axis * 2 * half for axis in (0, 1)]
    reserved = torch.cat([indices + shift for indices in sines for shift in (0, half)])
    transformer.pos_embed.proj.weight[reserved] = 0
    transformer.pos_embed.proj.bias[reserved] = 0
    # What the norm before the attention subtracts from all channels comes back as a bias.
    table = transformer.pos_embed.pos_embed
    content = (1 - len(reserved) / width) / 3  # variance that the patches' embedding gives a token, as PyTorch begins
    mean = float(table.mean() / (table.var() + content).sqrt())
    gain = (SHARPNESS * settings.attention_head_dim**0.5 / float((1 - frequencies.cos()).sum())) ** 0.5
    for block in transformer.transformer_blocks:
        query, key = block.attn.to_q.weight, block.attn.to_k.weight
        for head, offsets in enumerate(neighbours[: settings.num_attention_heads - 1]):
            own = slice(head * settings.attention_head_dim, (head + 1) * settings.attention_head_dim)
            for layer in (block.attn.to_q, block.attn.to_k):
                layer.weight[own] = 0
            for axis, offset in enumerate(offsets):
                row = torch.arange(count) + head * settings.attention_head_dim + 2 * axis * count
                sine, cosine = sines[axis], sines[axis] + half
                turn = frequencies * offset
                key[row, sine] += gain
                key[row + count, cosine] += gain
                query[row, sine] += gain * turn.cos()
                query[row, cosine] += gain * turn.sin()
                query[row + count, cosine] += gain * turn.cos()
                query[row + count, sine] -= gain * turn.sin()
            for layer in (block.attn.to_q, block.attn.to_k):
                layer.bias[own] = mean * layer.weight[own].sum(dim=1)

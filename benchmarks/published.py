"""The published inference procedure, step by step as its authors run it: what this project's speed is compared with.

The LoRAs stay beside the weights, the posterior is sampled, tiles go through the transformer one after another and are
all kept until they are stitched, and the colours are corrected on the CPU, with both pictures decomposed. Source: the
release `Microtreei/TSD-SR`, test/test_tsdsr.py and utils/wavelet_color_fix.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from tsdsr.models import lora_targets
from tsdsr.models.prompt_embeddings import PromptEmbeddings
from tsdsr.pipelines.tiling import tile_starts

RANK = 64
LATENT_TILE, LATENT_OVERLAP = 64, 8


@dataclass(frozen=True)
class Networks:
    """What the procedure loads: both networks with their LoRAs active, and the embedded prompt."""

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


def load(model: Path, dtype: torch.dtype, device: torch.device, rank: int = RANK) -> Networks:
    """The networks of a pipeline folder with new LoRAs, which cost what trained ones do, on the published layers.

    Raises:
        OSError: if the folder holds no SD3 transformer, AutoencoderKL or prompt embeddings.
    """
    parts = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}
    transformer, vae = (part.from_pretrained(model, subfolder=name, dtype=dtype) for name, part in parts.items())
    encoder = [
        name
        for name, layer in vae.named_modules()
        if (name.startswith("encoder.") or name == "quant_conv") and isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    for network, targets in ((transformer, list(lora_targets.STUDENT)), (vae, encoder)):
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
        network.to(device, dtype).requires_grad_(False).eval()
    prompt = PromptEmbeddings.from_pretrained(model, subfolder="prompt_embeddings", dtype=dtype)
    return Networks(transformer, vae, *prompt.to(device).requires_grad_(False)())


@torch.no_grad()
def enlarge(
    networks: Networks,
    photograph: Tensor,
    upscale: int = 4,
    process_size: int = 512,
    color_fix: str = "wavelet",
    done: Callable[[str], None] = lambda stage: None,
) -> Tensor:
    """One picture through the published procedure.

    Args:
        networks: what `load` gives.
        photograph: (1, 3, H, W), uint8, on the CPU.
        upscale: the factor.
        process_size: results with a shorter side, in pixels, are made larger and reduced afterwards.
        color_fix: "wavelet" or "none".
        done: called with "encode", "step" or "decode" after each call of a network.

    Returns:
        (1, 3, upscale * H, upscale * W), uint8, on the CPU.
    """
    transformer, vae = networks.transformer, networks.vae
    device, dtype, scaling = transformer.device, transformer.dtype, vae.config.scaling_factor
    height, width = photograph.shape[-2:]
    target = (upscale * height, upscale * width)
    working = target
    if min(height, width) < process_size // upscale:
        factor = (process_size // upscale) / min(height, width)
        working = (upscale * int(factor * height), upscale * int(factor * width))
    working = (working[0] // 8 * 8, working[1] // 8 * 8)

    pixels = (photograph.float() / 255).to(device, dtype)
    pixels = (F.interpolate(pixels, size=working, mode="bicubic", align_corners=False) * 2 - 1).clamp(-1, 1)
    latents = vae.encode(pixels).latent_dist.sample() * scaling
    done("encode")
    latents = latents - _predict(networks, latents, done)
    decoded = vae.decode(latents / scaling, return_dict=False)[0].clamp(-1, 1)
    done("decode")

    # Eight bits, cut off rather than rounded.
    picture = (decoded.cpu().float() / 2 + 0.5).mul(255).byte()
    if working != target:
        picture = F.interpolate(picture, size=target, mode="bicubic", antialias=True)
    if color_fix == "wavelet":
        reference = F.interpolate(photograph, size=target, mode="bicubic", antialias=True)
        high, _ = _frequencies(picture.float() / 255)
        _, low = _frequencies(reference.float() / 255)
        picture = (high + low).clamp(0, 1).mul(255).byte()
    return picture


def _predict(networks: Networks, latents: Tensor, done: Callable[[str], None]) -> Tensor:
    """The velocity; of latents larger than one tile blended from square tiles."""

    def predict(tile: Tensor) -> Tensor:
        velocity = networks.transformer(
            hidden_states=tile,
            timestep=torch.tensor([1000.0], device=tile.device, dtype=tile.dtype),
            encoder_hidden_states=networks.prompt_embeds,
            pooled_projections=networks.pooled_prompt_embeds,
            return_dict=False,
        )[0]
        done("step")
        return velocity

    height, width = latents.shape[-2:]
    if height * width <= LATENT_TILE**2:
        return predict(latents)
    tile = min(LATENT_TILE, height, width)
    corners = [
        (top, left)
        for top in tile_starts(height, tile, LATENT_OVERLAP)
        for left in tile_starts(width, tile, LATENT_OVERLAP)
    ]
    predictions = [predict(latents[..., top : top + tile, left : left + tile]) for top, left in corners]
    # The Gaussian's centre lies half a latent pixel too low, as published.
    across, down = (
        torch.exp(-(((torch.arange(tile, dtype=torch.float64) - centre) / tile) ** 2) / (2 * 0.01))
        for centre in ((tile - 1) / 2, tile / 2)
    )
    weights = torch.outer(down, across).to(latents.device)
    total, weight_sum = (torch.zeros(latents.shape, device=latents.device) for _ in range(2))
    for (top, left), prediction in zip(corners, predictions, strict=True):
        box = (..., slice(top, top + tile), slice(left, left + tile))
        total[box] += prediction * weights
        weight_sum[box] += weights
    return (total / weight_sum).to(latents.dtype)


def _frequencies(image: Tensor) -> tuple[Tensor, Tensor]:
    """High and low frequencies of (1, 3, H, W): five levels of the 3x3 binomial with holes, borders repeated."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    high = torch.zeros_like(image)
    for level in range(5):
        radius = 2**level
        low = F.conv2d(F.pad(image, (radius,) * 4, mode="replicate"), kernel, groups=3, dilation=radius)
        high += image - low
        image = low
    return high, image

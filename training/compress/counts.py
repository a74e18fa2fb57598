"""How large a model is: parameters, and multiply-accumulates for one picture."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..one_step import latent_side

# What papers count: linear layers and convolutions. Profilers leave out the products inside of attention.
LAYERS = ("aten.convolution", "aten.addmm", "aten.mm")
PIXELS = 512


def counts(vae: Any, transformer: Any, prompt_tokens: int = 0, pixels: int = PIXELS) -> dict[str, Any]:
    """Parameters and multiply-accumulates of one-step upscaling; nothing is computed.

    Args:
        vae: AutoencoderKL or AutoencoderTiny.
        transformer: SD3's, or a baked one.
        prompt_tokens: that SD3's takes; a baked one holds its own.
        pixels: side of the result; less where the transformer has no positions for it.

    Returns:
        {"parameters": {"transformer", "encoder", "decoder", "total"}, "macs": the same of one picture, linear layers
        and convolutions alone, "pixels": its side}.
    """
    factor = latent_side(vae)
    patch = factor * transformer.config.patch_size
    pixels = min(pixels, transformer.config.pos_embed_max_size * patch) // patch * patch
    with torch.device("meta"):
        # The same networks without weights; in float32, whatever the originals are in.
        codec, network = (type(one).from_config(one.config) for one in (vae, transformer))
        channels = network.config.in_channels
        pictures, latents = (
            torch.zeros(1, 3, pixels, pixels),
            torch.zeros(1, channels, pixels // factor, pixels // factor),
        )
        given: dict[str, Any] = {}
        if isinstance(network, SD3Transformer2DModel):
            settings = network.config
            given = {
                "timestep": torch.zeros(1),
                "encoder_hidden_states": torch.zeros(1, prompt_tokens, settings.joint_attention_dim),
                "pooled_projections": torch.zeros(1, settings.pooled_projection_dim),
            }
        macs = {
            "transformer": _macs(lambda: network(latents, **given)),
            "encoder": _macs(lambda: codec.encode(pictures)),
            "decoder": _macs(lambda: codec.decode(latents)),
        }
    halves = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
    parameters = {"transformer": _parameters(transformer)}
    for half, names in halves.items():
        parameters[half] = sum(_parameters(part) for name in names if (part := getattr(vae, name, None)) is not None)
    for found in (parameters, macs):
        found["total"] = sum(found.values())
    return {"parameters": parameters, "macs": macs, "pixels": pixels}


def in_words(found: dict[str, Any]) -> str:
    """One line: `341.5 M parameters, 426.6 G multiply-accumulates for 512x512 pixels`."""
    side = found["pixels"]
    return (
        f"{found['parameters']['total'] / 1e6:.4g} M parameters, {found['macs']['total'] / 1e9:.4g} G "
        f"multiply-accumulates for {side}x{side} pixels"
    )


def _parameters(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def _macs(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    flops = counter.get_flop_counts().get("Global", {})
    return sum(count for name, count in flops.items() if str(name) in LAYERS) // 2

"""SD3 networks from single files in Stability AI's own layout, or in diffusers' keys; nothing is fetched.

ComfyUI keeps them in `checkpoints` (everything in one file), `diffusion_models` (the transformer) and `vae`. What a
config would say is read off the shapes of the weights.
"""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .headers import Header, read_header

# SD3's heads and text tokens are the same in all released sizes.
_HEAD_DIM = 64
_TRANSFORMER_PREFIXES = ("model.diffusion_model.", "")
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
# SD3's VAE (stable-diffusion-3-medium, vae/config.json); its sizes are read off the file.
_VAE_CONSTANTS = {
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def holds(header: Header) -> set[str]:
    """Which of "transformer" and "vae" of an SD3 model a safetensors file has."""
    found = set()
    if _prefix(header, _TRANSFORMER_PREFIXES, "joint_blocks.0.x_block.attn.qkv.weight") is not None or (
        "transformer_blocks.0.attn.add_k_proj.weight" in header.tensors and "pos_embed.proj.weight" in header.tensors
    ):
        found.add("transformer")
    prefix = _prefix(header, _VAE_PREFIXES, "decoder.conv_in.weight")
    # SD3's latents have 16 channels; SD1's and SDXL's VAE have 4.
    if prefix is not None and header.tensors[f"{prefix}decoder.conv_in.weight"].shape[1] == 16:
        found.add("vae")
    return found


def load_transformer(path: Path, dtype: torch.dtype) -> SD3Transformer2DModel:
    """The MMDiT of a single file, with or without the rest of SD3 in it.

    Raises:
        CheckpointError: if the file holds no SD3 transformer, or not a whole one.
    """
    header = read_header(path)
    prefix = _prefix(header, _TRANSFORMER_PREFIXES, "joint_blocks.0.x_block.attn.qkv.weight")
    if "transformer" not in holds(header):
        raise CheckpointError(
            f"{path} is {_what(header)}, but an SD3 transformer was expected; use sd3_medium.safetensors or another"
            " SD3-medium checkpoint."
        )
    config = _transformer_config(header, prefix)
    convert = None if prefix is None else convert_sd3_transformer_checkpoint_to_diffusers
    return _load(SD3Transformer2DModel, header, prefix or "", config, convert, dtype)


def load_vae(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a single file: a whole SD3 checkpoint, or a file of its own in either layout.

    Raises:
        CheckpointError: if the file holds no VAE with SD3's 16 latent channels, or not a whole one.
    """
    header = read_header(path)
    if "vae" not in holds(header):
        raise CheckpointError(
            f"{path} is {_what(header)}, but the VAE of SD3 (16 latent channels) was expected; use sd3_vae.safetensors "
            "or a whole SD3-medium checkpoint."
        )
    prefix = _prefix(header, _VAE_PREFIXES, "decoder.conv_in.weight")
    assert prefix is not None
    config = _vae_config(header, prefix)
    original = f"{prefix}encoder.down.0.block.0.conv1.weight" in header.tensors
    convert = partial(convert_ldm_vae_checkpoint, config=config) if original else None
    return _load(AutoencoderKL, header, prefix, config, convert, dtype)


def _prefix(header: Header, prefixes: Iterable[str], key: str) -> str | None:
    return next((prefix for prefix in prefixes if prefix + key in header.tensors), None)


def _what(header: Header) -> str:
    """A phrase for what a safetensors file seems to be, told by its keys."""
    keys = list(header.tensors)

    def any_key(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    found = holds(header)
    if "transformer" in found:
        return "an SD3 transformer without a VAE"
    if "vae" in found:
        return "the VAE of SD3 alone"
    if any_key(r"\.lora_|lora_unet|lora_te"):
        return "a LoRA"
    if any_key(r"double_blocks\."):
        return "a Flux-like transformer"
    if any_key(r"joint_blocks\."):
        return "a part of an SD3 transformer"
    if any_key(r"input_blocks\.|down_blocks\.\d+\.attentions"):
        return "a UNet of another Stable Diffusion"
    if any_key(r"decoder\.conv_in"):
        return "the VAE of another model"
    if any_key(r"text_model\.|encoder\.block\.\d+\.layer"):
        return "a text encoder"
    return f"no SD3 model (its first key is {keys[0]})" if keys else "an empty safetensors file"


def _transformer_config(header: Header, prefix: str | None) -> dict[str, Any]:
    """The config of `SD3Transformer2DModel`; `prefix` is None for a file with diffusers' keys."""
    original = prefix is not None

    def shape(ours: str, theirs: str) -> tuple[int, ...]:
        key = f"{prefix}{theirs}" if original else ours
        if key not in header.tensors:
            raise CheckpointError(f"{header.file} lacks {key}, which an SD3 transformer has; download it again.")
        return header.tensors[key].shape

    width, channels, patch, _ = shape("pos_embed.proj.weight", "x_embedder.proj.weight")
    block = re.compile(rf"{re.escape(prefix or '')}{'joint' if original else 'transformer'}_blocks\.(\d+)\.")
    dual = re.compile(block.pattern + (r"x_block\.attn2\." if original else r"attn2\."))
    blocks = {int(match[1]) for key in header.tensors if (match := block.match(key))}
    norm = "x_block.attn.ln_q.weight" if original else "attn.norm_q.weight"
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": 1 + max(blocks),
        "attention_head_dim": _HEAD_DIM,
        "num_attention_heads": width // _HEAD_DIM,
        "caption_projection_dim": width,
        "joint_attention_dim": shape("context_embedder.weight", "context_embedder.weight")[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", "y_embedder.mlp.0.weight")[1],
        "pos_embed_max_size": round(shape("pos_embed.pos_embed", "pos_embed")[1] ** 0.5),
        "dual_attention_layers": sorted({int(match[1]) for key in header.tensors if (match := dual.match(key))}),
        "qk_norm": "rms_norm" if any(key.endswith(norm) for key in header.tensors) else None,
    }


def _vae_config(header: Header, prefix: str) -> dict[str, Any]:
    tensors = header.tensors
    ours = any(key.startswith(f"{prefix}encoder.down_blocks.") for key in tensors)
    level = re.compile(rf"{re.escape(prefix)}encoder\.{'down_blocks' if ours else 'down'}\.(\d+)\.")
    block = re.compile(level.pattern + (r"resnets\.(\d+)\." if ours else r"block\.(\d+)\."))
    places = {(int(match[1]), int(match[2])) for key in tensors if (match := block.match(key))}
    if not places:
        raise CheckpointError(f"{header.file} has a VAE decoder without its encoder; download the whole file.")
    levels = 1 + max(index for index, _ in places)
    last = "resnets.0.conv1.weight" if ours else "block.0.conv1.weight"
    folder = "down_blocks" if ours else "down"
    widths = [tensors[f"{prefix}encoder.{folder}.{i}.{last}"].shape[0] for i in range(levels)]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 1 + max(index for _, index in places),
        "latent_channels": tensors[f"{prefix}decoder.conv_in.weight"].shape[1],
        "norm_num_groups": min(32, *widths),
        "sample_size": 1024,
        **_VAE_CONSTANTS,
    }


def _load(cls: Any, header: Header, prefix: str, config: dict[str, Any], convert: Any, dtype: torch.dtype) -> Any:
    """The tensors under `prefix`, each cast as it is read, in a network that `config` describes.

    `convert` is diffusers' translation of the keys, None where they are its own.
    """
    tensors = {}
    try:
        with safe_open(header.file, framework="pt", device="cpu") as file:
            for key in header.tensors:
                if key.startswith(prefix):
                    tensors[key.removeprefix(prefix)] = file.get_tensor(key).to(dtype)
    except SafetensorError as error:
        raise CheckpointError(f"{header.file} is damaged ({error}); download it again.") from error
    try:
        if convert is not None:
            tensors = convert(tensors)
    except KeyError as error:
        raise CheckpointError(
            f"{header.file} lacks {prefix}{error.args[0]}, which the network needs; download it again."
        ) from error
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config)
    for key, expected in model.state_dict().items():
        if key not in tensors:
            raise CheckpointError(f"{header.file} lacks the weights of {key} (diffusers' name); download it again.")
        if tensors[key].shape != expected.shape:
            raise CheckpointError(
                f"{header.file} has {key} (diffusers' name) of shape {tuple(tensors[key].shape)}, but"
                f" {tuple(expected.shape)} was expected; use an SD3-medium checkpoint."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.requires_grad_(False).eval()

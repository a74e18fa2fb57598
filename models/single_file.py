"""SD3 networks from single files in Stability AI's own layout, or in diffusers' keys; nothing is fetched.

ComfyUI keeps them in `checkpoints` (everything in one file), `diffusion_models` (the transformer) and `vae`. What a
config would say is read off the shapes of the weights. Weights stored in 8 bits are cast, and multiplied by the scale
that lies beside them in ComfyUI's scaled files.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .errors import CheckpointError
from .headers import Header, read_header

# Of the MMDiT and of the CLIPs in all released sizes.
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
# Where sd3_medium_incl_clips.safetensors and its kin keep them; the rest of a key is transformers' own.
TEXT_ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
# ComfyUI's names, past and present, of the scale of an 8-bit weight.
_SCALES = ("scale_weight", "weight_scale")


def holds(header: Header) -> set[str]:
    """Which of "transformer", "vae" and the `TEXT_ENCODERS` of an SD3 model a safetensors file has."""
    found = {name for name, prefix in TEXT_ENCODERS.items() if any(key.startswith(prefix) for key in header.tensors)}
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
    return _load(partial(SD3Transformer2DModel.from_config, config), header, prefix or "", convert, dtype)


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
    return _load(partial(AutoencoderKL.from_config, config), header, prefix, convert, dtype)


def load_text_encoder(path: Path, name: str, dtype: torch.dtype) -> CLIPTextModelWithProjection | T5EncoderModel:
    """A text encoder that is packed into an SD3 checkpoint, as diffusers' SD3 pipelines have it.

    In float16 T5's `wo` stay in float32, because they overflow (`T5EncoderModel._keep_in_fp32_modules`).

    Args:
        path: the single file.
        name: "text_encoder" (CLIP-L), "text_encoder_2" (CLIP-G) or "text_encoder_3" (T5-XXL).
        dtype: of its weights.

    Raises:
        CheckpointError: if the file holds no such text encoder, or not a whole one.
    """
    header = read_header(path)
    prefix = TEXT_ENCODERS[name]
    if name not in holds(header):
        raise CheckpointError(
            f"{path} holds no {name} of SD3 (keys {prefix}*); use sd3_medium_incl_clips_t5xxlfp16.safetensors or "
            "another checkpoint with text encoders."
        )
    if name == "text_encoder_3":
        encoder = _load(partial(T5EncoderModel, _t5_config(header, prefix)), header, prefix, _with_embed_tokens, dtype)
        encoder.set_input_embeddings(encoder.shared)  # one table for both of its names
        return encoder
    config = _clip_config(header, prefix, name)
    convert = _with_identity_projection if name == "text_encoder" else None
    return _load(partial(CLIPTextModelWithProjection, config), header, prefix, convert, dtype)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's (stable-diffusion-3-medium, scheduler/scheduler_config.json), of which a single file says nothing."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


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


def _shape(header: Header, key: str) -> tuple[int, ...]:
    if key not in header.tensors:
        raise CheckpointError(f"{header.file} lacks {key}, which every SD3 has; download it again.")
    return header.tensors[key].shape


def _layers(header: Header, pattern: str) -> int:
    """How many layers there are, by a pattern of keys whose group is a layer's number."""
    return 1 + max((int(match[1]) for key in header.tensors if (match := re.match(pattern, key))), default=-1)


def _heads(header: Header, width: int) -> int:
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"{header.file} has a network of width {width}, but SD3's are multiples of {_HEAD_DIM}; use an SD3-medium"
            " checkpoint."
        )
    return width // _HEAD_DIM


def _transformer_config(header: Header, prefix: str | None) -> dict[str, Any]:
    """The config of `SD3Transformer2DModel`; `prefix` is None for a file with diffusers' keys."""
    original = prefix is not None

    def shape(ours: str, theirs: str) -> tuple[int, ...]:
        return _shape(header, f"{prefix}{theirs}" if original else ours)

    width, channels, patch, _ = shape("pos_embed.proj.weight", "x_embedder.proj.weight")
    block = rf"{re.escape(prefix or '')}{'joint' if original else 'transformer'}_blocks\.(\d+)\."
    dual = re.compile(block + (r"x_block\.attn2\." if original else r"attn2\."))
    norm = "x_block.attn.ln_q.weight" if original else "attn.norm_q.weight"
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": _layers(header, block),
        "attention_head_dim": _HEAD_DIM,
        "num_attention_heads": _heads(header, width),
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


def _clip_config(header: Header, prefix: str, name: str) -> CLIPTextConfig:
    vocab_size, width = _shape(header, f"{prefix}text_model.embeddings.token_embedding.weight")
    # SD3 reads CLIP-L's pooled state as it is.
    projection = width if name == "text_encoder" else _shape(header, f"{prefix}text_projection.weight")[0]
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=_shape(header, f"{prefix}text_model.encoder.layers.0.mlp.fc1.weight")[0],
        projection_dim=projection,
        num_hidden_layers=_layers(header, rf"{re.escape(prefix)}text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(header, width),
        max_position_embeddings=_shape(header, f"{prefix}text_model.embeddings.position_embedding.weight")[0],
        hidden_act="quick_gelu" if name == "text_encoder" else "gelu",
        # As in SD3's configs: with 2 for the end, transformers pools at the highest token, which is where it is.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def _with_identity_projection(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP-L's weights with the projection that changes nothing, as diffusers and ComfyUI read it for SD3."""
    table = tensors["text_model.embeddings.token_embedding.weight"]
    return {**tensors, "text_projection.weight": torch.eye(table.shape[1], dtype=table.dtype)}


def _t5_config(header: Header, prefix: str) -> T5Config:
    attention = f"{prefix}encoder.block.0.layer.0.SelfAttention"
    vocab_size, width = _shape(header, f"{prefix}shared.weight")
    buckets, heads = _shape(header, f"{attention}.relative_attention_bias.weight")
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=_shape(header, f"{attention}.q.weight")[0] // heads,
        d_ff=_shape(header, f"{prefix}encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        num_layers=_layers(header, rf"{re.escape(prefix)}encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )


def _with_embed_tokens(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}


def _load(
    make: Callable[[], Any],
    header: Header,
    prefix: str,
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None,
    dtype: torch.dtype,
) -> Any:
    """The tensors under `prefix`, each cast as it is read, in the network that `make` makes.

    `convert` translates the keys to the network's, None where they are its own.
    """
    # Parameters on the meta device cost nothing; buffers stay real, as not all of them are in the file.
    with init_empty_weights(include_buffers=False):
        model = make()
    kept = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    tensors = {}
    try:
        with safe_open(header.file, framework="pt", device="cpu") as file:
            for key in header.tensors:
                if not key.startswith(prefix):
                    continue
                tensor = file.get_tensor(key)
                for scale in (f"{key.removesuffix('weight')}{name}" for name in _SCALES if key.endswith(".weight")):
                    if scale in header.tensors:
                        tensor = tensor.float() * file.get_tensor(scale).float()
                name = key.removeprefix(prefix)
                tensors[name] = tensor.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
    except SafetensorError as error:
        raise CheckpointError(f"{header.file} is damaged ({error}); download it again.") from error
    try:
        if convert is not None:
            tensors = convert(tensors)
    except KeyError as error:
        raise CheckpointError(
            f"{header.file} lacks {prefix}{error.args[0]}, which the network needs; download it again."
        ) from error
    for key, expected in model.state_dict().items():
        if key not in tensors:
            raise CheckpointError(f"{header.file} lacks {key} of its {type(model).__name__}; download it again.")
        if tensors[key].shape != expected.shape:
            raise CheckpointError(
                f"{header.file} has {key} of its {type(model).__name__} in shape {tuple(tensors[key].shape)}, but"
                f" {tuple(expected.shape)} was expected; use an SD3-medium checkpoint."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.requires_grad_(False).eval()

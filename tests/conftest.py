"""Tiny pipelines with random weights: the real classes, small enough that a test takes a moment."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from tsdsr import PromptEmbeddings, TSDSRPipeline


def _vae(kind: str) -> AutoencoderKL | AutoencoderTiny:
    if kind == "tiny":  # f = 4
        return AutoencoderTiny(
            encoder_block_out_channels=[8, 8, 8],
            decoder_block_out_channels=[8, 8, 8],
            num_encoder_blocks=[0, 0, 1],
            num_decoder_blocks=[1, 0, 0],
            latent_channels=4,
        )
    return AutoencoderKL(  # f = 2, with a posterior
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
    )


def _unet() -> UNet2DConditionModel:  # halves its input once
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        use_linear_projection=True,
    )


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., TSDSRPipeline]:
    """A function that builds a pipeline with random weights: `make_pipeline(vae, network, **pipeline_arguments)`.

    `vae` is "tiny" or "kl", `network` "transformer" or "unet".
    """

    def make(vae: str = "tiny", network: str = "transformer", **arguments: object) -> TSDSRPipeline:
        torch.manual_seed(0)
        modules: dict[str, object] = {}
        if network == "unet":
            modules["unet"] = _unet().eval()
            # SD2's schedule of betas.
            modules["scheduler"] = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
            modules["vae"] = _vae(vae).eval()
            modules["prompt_embeddings"] = PromptEmbeddings.from_tensors(torch.randn(1, 3, 12))
        else:
            modules["transformer"] = _transformer().eval()
            modules["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
            modules["vae"] = _vae(vae).eval()
            modules["prompt_embeddings"] = PromptEmbeddings.from_tensors(torch.randn(1, 3, 12), torch.randn(1, 10))
        pipeline = TSDSRPipeline(**{**modules, **arguments})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], np.ndarray]:
    """A function for smooth random pictures (H, W, 3), float32, 0..1: `picture(height, width)`."""

    def make(height: int, width: int, seed: int = 0) -> np.ndarray:
        noise = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear", align_corners=True)
        return smooth[0].permute(1, 2, 0).contiguous().numpy()

    return make


def _original_transformer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys of an SD3 transformer -> Stability AI's."""
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    simple = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        **{
            f"time_text_embed.{ours}_embedder.linear_{i}": f"{theirs}_embedder.mlp.{2 * (i - 1)}"
            for ours, theirs in (("timestep", "t"), ("text", "y"))
            for i in (1, 2)
        },
    }

    def swapped(tensor: torch.Tensor) -> torch.Tensor:  # scale, shift -> shift, scale
        return torch.cat(tensor.chunk(2)[::-1])

    found = {}
    for key, tensor in weights.items():
        module, _, kind = key.rpartition(".")
        if key in simple or module in simple:
            found[simple.get(key) or f"{simple[module]}.{kind}"] = tensor
        elif module == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(tensor)
    for index in range(last + 1):
        ours, theirs = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        for kind in ("weight", "bias"):
            for block, names in (
                ("x_block", ("to_q", "to_k", "to_v")),
                ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                parts = [weights[f"{ours}.attn.{name}.{kind}"] for name in names]
                found[f"{theirs}.{block}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, target in (
                ("attn.to_out.0", "x_block.attn.proj"),
                ("attn.to_add_out", "context_block.attn.proj"),
                ("norm1.linear", "x_block.adaLN_modulation.1"),
                ("norm1_context.linear", "context_block.adaLN_modulation.1"),
                ("ff.net.0.proj", "x_block.mlp.fc1"),
                ("ff.net.2", "x_block.mlp.fc2"),
                ("ff_context.net.0.proj", "context_block.mlp.fc1"),
                ("ff_context.net.2", "context_block.mlp.fc2"),
            ):
                tensor = weights.get(f"{ours}.{name}.{kind}")
                if tensor is not None:
                    ends = name == "norm1_context.linear" and index == last
                    found[f"{theirs}.{target}.{kind}"] = swapped(tensor) if ends else tensor
    return found


def _original_vae(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys of an AutoencoderKL -> those of latent diffusion."""
    levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("decoder.up_blocks."))
    renames = [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    found = {}
    for key, tensor in weights.items():
        original = key
        for pattern, replacement in renames:
            original = re.sub(pattern, replacement, original)
        if ".attn_1." in original and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        found[original] = tensor
    return found


@pytest.fixture(scope="session")
def save_single_file() -> Callable[..., Path]:
    """A function that writes networks as one file in Stability AI's layout: `save(path, transformer, vae)`."""

    def save(path: Path, transformer=None, vae=None, prefixes=("model.diffusion_model.", "first_stage_model."), **more):
        tensors = dict(more)
        if transformer is not None:
            converted = _original_transformer(transformer.state_dict())
            tensors.update({f"{prefixes[0]}{key}": value for key, value in converted.items()})
        if vae is not None:
            converted = _original_vae(vae.state_dict())
            tensors.update({f"{prefixes[1]}{key}": value for key, value in converted.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
        return path

    return save

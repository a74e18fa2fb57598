"""Tiny pipelines with random weights: the real classes, small enough that a test takes a moment."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

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


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., TSDSRPipeline]:
    """A function that builds a pipeline with random weights: `make_pipeline("tiny" or "kl", **pipeline_arguments)`."""

    def make(vae: str = "tiny", **arguments: object) -> TSDSRPipeline:
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
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
        pipeline = TSDSRPipeline(
            vae=_vae(vae).eval(),
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            prompt_embeddings=PromptEmbeddings.from_tensors(torch.randn(1, 3, 12), torch.randn(1, 10)),
            **arguments,
        )
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

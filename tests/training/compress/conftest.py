"""Tiny transformers of several blocks in which every weight counts."""

from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn


@pytest.fixture(scope="session")
def make_transformer() -> Callable[..., SD3Transformer2DModel]:
    """A function for transformers with random weights: `make_transformer(depth, **config)`."""

    def make(depth: int, seed: int = 0, **config: object) -> SD3Transformer2DModel:
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=depth,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            pos_embed_max_size=8,
            **config,
        ).eval()
        for weight in transformer.parameters():
            nn.init.normal_(weight, std=0.2)
        return transformer

    return make


@pytest.fixture(scope="session")
def inputs() -> dict[str, torch.Tensor]:
    """What such a transformer takes, for two pictures."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=generator),
        "pooled_projections": torch.randn(2, 10, generator=generator),
        "timestep": torch.full((2,), 1000.0),
    }

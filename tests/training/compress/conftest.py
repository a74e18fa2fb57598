"""Tiny transformers of several blocks in which every weight counts."""

from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="session")
def model_folder(make_transformer, make_pipeline, tmp_path_factory) -> Path:
    """A one-step model of four blocks with a KL autoencoder, as a pipeline folder."""
    pipeline = make_pipeline("kl", use_shift_factor=True)
    pipeline.register_modules(transformer=make_transformer(4))
    folder = tmp_path_factory.mktemp("model") / "four"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words(model_folder, photographs) -> Callable[..., list[str]]:
    """Flags of a small compression: `words(output_dir, "--restore.rank", 3, steps=4, ...)`; those given win."""

    def make(output_dir: Path, *more: object, steps: int = 4, rate: float = 5e-3) -> list[str]:
        values: dict[str, object] = {
            "model": model_folder,
            "train_data_dir": photographs,
            "output_dir": output_dir,
            "logging_steps": 1,
            "checkpointing_steps": 2,
            "discriminator_width": 4,
            "discriminator_layers": 2,
            "encoder.width": 8,
            "decoder.width": 8,
            "decoder.adversarial": 0.1,
            "search.group_size": 2,
            "search.keep": 1,
            "refine.adversarial": 0.1,
            "refine.train_decoder": "true",
        }
        for stage in ("encoder", "decoder", "search", "restore", "refine"):
            values |= {f"{stage}.steps": steps, f"{stage}.train_batch_size": 2, f"{stage}.resolution": 16}
            values |= {f"{stage}.warmup_steps": 0, f"{stage}.learning_rate": rate}
        values |= {f"{stage}.rank": 2 for stage in ("search", "restore", "refine")}
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [*flags, *(str(one) for one in more)]

    return make

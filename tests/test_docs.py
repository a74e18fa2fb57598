"""The examples of README and docs run as they stand, beside tiny random models under the names of the real ones."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection

import tsdsr
from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.checkpoints.layout import is_target

from .checkpoints.test_tinysr import write_release

ROOT = Path(tsdsr.__file__).resolve().parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def networks():
    """SD3 in miniature with its factor of 8 and its 16 latent channels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        num_layers=2,
        num_attention_heads=1,
        in_channels=16,
        joint_attention_dim=20,
        caption_projection_dim=64,
        pooled_projection_dim=16,
        pos_embed_max_size=64,
    )
    vae = AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return transformer.eval(), vae.eval()


def save_lora(folder, modules, seed):
    """The published layout; the layers are those of the release."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for side, network in modules.items():
        state = {}
        for name, layer in network.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and is_target(side, name):
                out, *rest = layer.weight.shape
                shapes = (4, *rest), (out, 4, *(1 for _ in rest[1:]))
                for half, shape in zip("AB", shapes, strict=True):
                    state[f"transformer.{name}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.02
        save_file(state, folder / f"{side}.safetensors")


@pytest.fixture
def place(tmp_path, save_single_file, clip_config, clip_tokenizer):
    """A folder with what the pages speak of."""
    transformer, vae = networks()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    encoders = {f"text_encoder{which}": CLIPTextModelWithProjection(clip_config()) for which in ("", "_2")}
    base = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        **encoders,
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    base.save_pretrained(tmp_path / "stable-diffusion-3-medium-diffusers")
    save_single_file(tmp_path / "sd3_medium.safetensors", transformer, vae)
    prompt = torch.randn(1, 16, 20), torch.randn(1, 16)
    pipeline = TSDSRPipeline(vae, transformer, scheduler, PromptEmbeddings.from_tensors(*prompt))
    pipeline.save_pretrained(tmp_path / "tsd-sr")
    write_release(tmp_path / "TinySR")
    for number, name in enumerate(("tsdsr", "tsdsr-mse")):
        save_lora(tmp_path / "checkpoint" / name, {"transformer": transformer, "vae": vae}, number)
    (tmp_path / "dataset" / "default").mkdir(parents=True)
    for name, tensor in zip(("prompt_embeds", "pool_embeds"), prompt, strict=True):
        torch.save(tensor, tmp_path / "dataset" / "default" / f"{name}.pt")
    for name in ("embedded", "docs", "training"):
        os.symlink(ROOT / name, tmp_path / name)
    photo = Image.open(ROOT / "docs" / "images" / "flower.jpg").crop((0, 0, 48, 40))
    (tmp_path / "holiday").mkdir()
    for name in ("photo.jpg", "photo.png", "holiday/beach.jpg"):
        photo.save(tmp_path / name)
    with av.open(tmp_path / "film.mp4", "w") as film:
        stream = film.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
        for frame in (av.VideoFrame.from_image(photo), None):
            film.mux(stream.encode(frame))
    pairs = {"test_LR": (12, 10), "test_HR": (48, 40)}
    for folder, size in {**pairs, "../../osediff_published": (48, 40)}.items():
        path = tmp_path / "SETS" / "RealSR" / folder
        path.mkdir(parents=True)
        photo.resize(size).save(path / "Canon_001.png")
    for name, target in {"SMALL": "test_LR", "GROUND_TRUTHS": "test_HR", "RESULTS": "test_HR"}.items():
        os.symlink(tmp_path / "SETS" / "RealSR" / target, tmp_path / name)
    os.symlink(tmp_path / "holiday", tmp_path / "PHOTO_OR_FOLDER")
    return tmp_path


def examples(page: str) -> str:
    """The Python examples of a page, and its shell examples of the command alone, as one script."""
    parts = []
    for language, text in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        commands = [line.split("#")[0].rstrip() for line in text.replace("\\\n", " ").splitlines()]
        if text.startswith("# GPU"):
            continue
        if language == "python":
            parts.append(text)
        elif language == "sh" and all(line.startswith("tsdsr ") for line in commands if line):
            # Fetching needs a network.
            parts += [f"run({command!r})" for command in commands if command and "--fetch" not in command]
    assert parts, f"{page} has no examples"
    return "\n".join(parts)


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{name}.md" for name in ["diffusers", "memory", "evaluation", "large_pictures", "tinysr"])],
)
def test_examples_run(place, page):
    # In one process, because starting one takes as long as most examples.
    prelude = (
        "import shlex\n"
        "from tsdsr.cli import app\n"
        "def run(line):\n"
        "    assert not app(shlex.split(line)[1:], standalone_mode=False), line\n"
    )
    if page == "README.md":
        shutil.rmtree(place / "tsd-sr")  # made there
    (place / "examples.py").write_text(prelude + examples(page))
    result = subprocess.run(
        [sys.executable, "examples.py"],
        cwd=place,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1"},
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]

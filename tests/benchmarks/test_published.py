"""The baseline of the speed benchmark is the published procedure, not a straw man."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file

from tsdsr import TSDSRPipeline, convert_tsdsr, load_pipeline
from tsdsr.benchmarks.memory import make_weights
from tsdsr.benchmarks.published import Networks, enlarge, load
from tsdsr.benchmarks.speed import QUICK_TRANSFORMER, QUICK_VAE

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "inference"
golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"the published procedure's results are not here ({GOLDEN}): agreement is NOT checked"
)


def tensor(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)[None]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "pipeline"
    convert_tsdsr(GOLDEN / "sd3", GOLDEN / "lora", GOLDEN / "embeddings", folder, keep_lora=True)
    pipeline = load_pipeline(folder, device="cpu")
    return Networks(pipeline.transformer, pipeline.vae, *pipeline.prompt_embeddings())


@golden
@pytest.mark.parametrize(
    ("name", "tiles"), [("square_128x128.png", 1), ("tiled_168x140.png", 4), ("small_odd_131x70.png", 2)]
)
def test_pictures_are_those_of_the_published_procedure(networks, name, tiles):
    stages, latents = [], []
    handle = networks.vae.decoder.register_forward_pre_hook(lambda _, args: latents.append(args[0]))
    found = enlarge(networks, tensor(GOLDEN / "inputs" / name), done=stages.append)
    handle.remove()
    difference = (found.int() - tensor(GOLDEN / "official_x4_wavelet" / name).int()).abs()
    # Eight bits are cut off, so that the last digit of a float may move a value by one, twice with a final resizing.
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.01
    assert stages == ["encode", *["step"] * tiles, "decode"]
    expected = load_file(GOLDEN / "official_x4_nofix.safetensors")
    wanted = expected[f"{name}.latent_lq"] - expected[f"{name}.prediction"]
    span = float(wanted.max() - wanted.min())
    torch.testing.assert_close(latents[0] * networks.vae.config.scaling_factor, wanted, rtol=0, atol=1e-5 * span)


def test_loaded_networks_do_the_work_of_unmerged_loras(tmp_path, picture):
    model = tmp_path / "model"
    make_weights(model, QUICK_TRANSFORMER, QUICK_VAE)
    found = load(model, torch.float32, torch.device("cpu"))
    for network, least in ((found.transformer, 20), (found.vae.encoder, 15)):
        layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
        assert len(layers) >= least
        assert all(set(layer.r.values()) == {64} and not layer.merged for layer in layers)
    assert not any(isinstance(layer, LoraLayer) for layer in found.vae.decoder.modules())

    photograph = torch.from_numpy(picture(32, 40)).movedim(-1, 0)[None].mul(255).byte()
    torch.manual_seed(0)
    theirs = enlarge(found, photograph, process_size=0)
    pipeline = TSDSRPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    ours = pipeline(photograph, process_size=0, sample_posterior=True, output_type="pt").images
    # New LoRAs change nothing; the published result is cut to eight bits twice.
    assert theirs.shape == (1, 3, 128, 160) and theirs.dtype == torch.uint8
    assert (theirs / 255 - ours).abs().max() < 3 / 255

    torch.manual_seed(0)
    for network in (found.transformer, found.vae):
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.05)
    torch.manual_seed(0)
    assert (enlarge(found, photograph, process_size=0).int() - theirs.int()).abs().float().mean() > 1

"""A real pipeline at the smallest size, saved once, and the command to run it with."""

import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

# Read when huggingface_hub is first imported: nothing here needs a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tsdsr.cli import app


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a pipeline with random weights: 4 pixels per latent, sizes in multiples of 8."""
    import torch
    from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from tsdsr import PromptEmbeddings, TSDSRPipeline

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    TSDSRPipeline(
        vae=AutoencoderTiny(
            encoder_block_out_channels=[8, 8, 8],
            decoder_block_out_channels=[8, 8, 8],
            num_encoder_blocks=[0, 0, 1],
            num_decoder_blocks=[1, 0, 0],
            latent_channels=4,
        ),
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        prompt_embeddings=PromptEmbeddings.from_tensors(torch.randn(1, 3, 12), torch.randn(1, 10)),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_tiles():
    """Options that make the tiny pipeline quick, and still cut a picture of 12 pixels a side into tiles."""
    return ("--process-size", "32", "--tile-size", "32", "--tile-overlap", "8")


@pytest.fixture(scope="session")
def tsdsr():
    """Function that runs the command in this process."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def upscale(tsdsr, model, small_tiles):
    """Function that runs `tsdsr upscale` with the tiny pipeline; later options win over its own."""

    def run(*arguments):
        return tsdsr("upscale", "--model", model, *small_tiles, *arguments)

    return run


@pytest.fixture(scope="session")
def photo():
    """Function that saves a small RGB picture: red at the left, blue at the right."""

    def save(path, width=12, height=10):
        pixels = np.full((height, width, 3), (200, 40, 40), dtype=np.uint8)
        pixels[:, width // 2 :] = 40, 40, 200
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    return save


@pytest.fixture(scope="session")
def files():
    """Function that lists everything below a folder, hidden files too, so that debris shows."""

    def below(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    return below


@pytest.fixture(scope="session")
def assert_refused(files):
    """Function that checks an exit with 2 and one sentence on stderr, nothing else."""

    def check(result, *parts):
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("tsdsr: "), result.stderr
        for part in parts:
            assert str(part) in lines[0]
        assert "Traceback" not in lines[0] and "--debug" not in lines[0]

    return check

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
def model(make_pipeline, tmp_path_factory):
    """Folder of a pipeline with random weights: 4 pixels per latent, sizes in multiples of 8."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kl_model(make_pipeline, tmp_path_factory):
    """The same with an encoder that has a posterior to draw from."""
    folder = tmp_path_factory.mktemp("model") / "kl"
    make_pipeline("kl").save_pretrained(folder)
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

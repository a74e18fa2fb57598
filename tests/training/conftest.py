"""A tiny base, photographs, and runs of the trainer over them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import tsdsr
from tsdsr.imaging import Picture, write
from tsdsr.training.config import DistillConfig, parse

ROOT = Path(tsdsr.__file__).resolve().parent


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """What accelerate remembers of the process's settings ends with a test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the processes that tests start: sums of several threads differ from those of one in the last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Eight pictures of 64x64 pixels with edges and texture, `p_0000_00.png` and so on."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(8):
        generator = np.random.default_rng(index)
        coarse = generator.random((8, 8, 3), dtype=np.float32).repeat(8, axis=0).repeat(8, axis=1)
        fine = generator.random((64, 64, 3), dtype=np.float32)
        write(Picture(np.clip(0.8 * coarse + 0.2 * fine, 0, 1)), folder / f"p_{index:04d}_00.png")
    return folder


@pytest.fixture(scope="session")
def base_folder(make_pipeline, tmp_path_factory) -> Path:
    """A tiny SD3 base with a KL autoencoder and a fixed prompt, as a pipeline folder."""
    folder = tmp_path_factory.mktemp("base")
    make_pipeline("kl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def arguments(base_folder, photographs) -> Callable[..., list[str]]:
    """Flags of a run of four steps over them: `arguments(output_dir, flag=value, ...)`; None leaves a flag out."""

    def make(output_dir: Path, **changed: object) -> list[str]:
        values: dict[str, object] = {
            "pretrained_model_name_or_path": base_folder,
            "train_data_dir": photographs,
            "validation_photographs": 2,
            "validation_size": 32,
            "resolution": 32,
            "train_batch_size": 2,
            "rank": 2,
            "fake_score_rank": 2,
            "vae_rank": 2,
            "learning_rate": 1e-3,
            "fake_score_learning_rate": 1e-3,
            "lr_scheduler": "constant_with_warmup",
            "guidance_scale": 1,
            "dasm_steps": 2,
            "max_train_steps": 4,
            "logging_steps": 1,
            "checkpointing_steps": 2,
            "validation_steps": 0,
            "output_dir": output_dir,
            **changed,
        }
        flags = []
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, bool):
                flags += [f"--{name}"] if value else [f"--no_{name}"]
            else:
                flags += [f"--{name}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
        return flags

    return make


@pytest.fixture(scope="session")
def config(arguments) -> Callable[..., DistillConfig]:
    """The settings of `arguments`, parsed."""
    return lambda output_dir, **changed: parse(arguments(output_dir, **changed))


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Run Python with arguments in a process of its own, one thread: `command("-m", "tsdsr.training.distill", ...)`."""

    def run(*words: str, **more: object) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT.parent, **more
        )

    return run


def losses(output_dir: Path) -> list[dict]:
    """The lines of a log that a run repeats exactly: without times."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.fixture(scope="session")
def read_losses() -> Callable[[Path], list[dict]]:
    """`losses` as a fixture."""
    return losses

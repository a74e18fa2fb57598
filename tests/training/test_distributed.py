"""Two processes are one process with twice the accumulation."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file


def launch(arguments, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    # With --cpu, accelerate starts one process whatever their number; --multi_gpu starts them all, on what there is.
    words.append("--multi_gpu" if processes > 1 else "--cpu")
    result = subprocess.run(
        [sys.executable, "-m", *words, "-m", "tsdsr.training.distill", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]


AGAINST = {"vae_decoder": "full", "pixel_l1": 1, "adversarial": 0.1, "feature_matching": 0.1, "r1_weight": 0.1}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train_type": "full", "vae_encoder": "full", "fake_score_updates": 2},
        {**AGAINST, "discriminator_width": 4, "discriminator_layers": 2},
        {"objective": "tad", "teacher_steps": 2, "latent_discriminator_width": 8, "latent_discriminator_votes": 2},
    ],
    ids=["lora", "full", "adversarial", "tad"],
)
def test_two_processes_equal_one_with_accumulation(arguments, tmp_path, more):
    steps = {"max_train_steps": 10, "checkpointing_steps": 5, "output": "merged", **more}
    for processes, accumulation in ((2, 1), (1, 2)):
        flags = arguments(tmp_path / str(processes), gradient_accumulation_steps=accumulation, **steps)
        launch(flags, processes)
    two, one = (
        load_file(tmp_path / str(processes) / "checkpoints" / "checkpoint-10" / "trained.safetensors")
        for processes in (2, 1)
    )
    assert two.keys() == one.keys()
    moved = load_file(tmp_path / "1" / "checkpoints" / "checkpoint-5" / "trained.safetensors")
    assert any(not torch.equal(one[name], moved[name]) for name in one)
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )
    for part in ("transformer", "vae"):
        file = f"pipeline/{part}/diffusion_pytorch_model.safetensors"
        ours, theirs = (load_file(tmp_path / processes / file) for processes in ("2", "1"))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)

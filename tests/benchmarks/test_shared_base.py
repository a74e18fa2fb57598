"""What the trainer's shared base saves is measured, at a size that a test can afford."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel

from tsdsr.benchmarks.shared_base import main

CONFIG = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "caption_projection_dim": 512,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}


def test_the_shared_layout_saves_about_one_base(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    sizes = "--rank 4 --latent-size 8 --prompt-tokens 4 --dasm-steps 2"
    main(["--transformer-config", str(file), *sizes.split(), "--dtype=fp32", "--device=cpu", "--step", "--json"])
    found = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        base = SD3Transformer2DModel.from_config(CONFIG)
    one = sum(4 * tensor.numel() for tensor in (*base.parameters(), *base.buffers())) / 1e9
    shared, two = found["shared"], found["two_copies"]
    # The rest of a process's memory moves by a few megabytes from run to run.
    assert two["weights_gb"] - shared["weights_gb"] == pytest.approx(one, abs=0.015)
    assert shared["weights_gb"] == pytest.approx(one, abs=0.03)
    assert all(row["step_peak_gb"] >= row["weights_gb"] for row in (shared, two))
    assert two["step_peak_gb"] - shared["step_peak_gb"] == pytest.approx(one, abs=0.03)
    assert (found["layers"], found["dtype"], found["dasm_steps"]) == (2, "fp32", 2)

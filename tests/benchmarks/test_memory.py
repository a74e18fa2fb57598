"""The memory benchmark at a size that a test can afford."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from tsdsr import TSDSRPipeline
from tsdsr.benchmarks.memory import (
    GPU_MODES,
    MODES,
    SD3_VAE,
    main,
    make_weights,
    measure,
    photograph,
    table,
    write_gguf,
)
from tsdsr.checkpoints import bake_model

TRANSFORMER = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "caption_projection_dim": 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}
VAE = SD3_VAE | {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "nested" / "model"
    make_weights(folder, TRANSFORMER, VAE)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    return folder


def test_random_weights_are_a_pipeline_that_makes_a_picture(model):
    pipeline = TSDSRPipeline.from_pretrained(model, dtype=torch.float32)
    assert pipeline.transformer.config.num_layers == 2 and pipeline.vae.config.layers_per_block == 1
    result = pipeline(photograph(16), process_size=0, color_fix="none", output_type="pt").images
    assert result.shape == (1, 3, 64, 64) and result.std() > 1e-3
    for network in ("transformer", "vae", "prompt_embeddings"):
        stored = load_file(model / network / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@linux
@pytest.mark.parametrize(
    ("mode", "package"),
    [
        ("fp32", None),
        ("bf16", None),
        ("vae_strips", None),
        ("fp8", None),
        ("fp8_modulation", None),
        ("int8", "torchao"),
        ("int8_dynamic", "torchao"),
        ("int4", "torchao"),
        ("gguf_q8_0", "gguf"),
        ("gguf_q4_0", "gguf"),
        ("disk_blocks", None),
        ("disk_leaves", None),
        ("baked", None),
        ("baked_bf16", None),
        ("baked_fp8", None),
        ("baked_int8", "torchao"),
        ("baked_int8_dynamic", "torchao"),
        ("baked_int4", "torchao"),
    ],
)
def test_every_mode_of_a_cpu(model, tmp_path, mode, package):
    if package:
        pytest.importorskip(package)
    if mode.startswith("gguf_"):
        transformer = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer")
        kind = mode.removeprefix("gguf_").upper()
        write_gguf(transformer, tmp_path / f"{kind}.gguf", kind)
    if mode.startswith("baked"):
        bake_model(model, tmp_path / "baked")
    args = Namespace(device="cpu", dtype="fp32", size=48)
    row = measure(mode, model, tmp_path, args)
    assert set(row) == {"loading_gb", "run_gb", "held_gb", "seconds"} and row["seconds"] > 0
    assert not (tmp_path / "offload").exists()
    found = torch.load(tmp_path / f"{mode}.pt")
    pipeline = TSDSRPipeline.from_pretrained(model, dtype=torch.float32)
    expected = pipeline(photograph(48), process_size=0, color_fix="none", output_type="pt").images
    assert found.shape == expected.shape == (1, 3, 192, 192)
    # What a mode computes is the concern of tests/pipelines/test_memory_modes.py.
    exact = mode == "fp32" or mode.startswith("disk")
    # The model is stored in bfloat16, and what is baked is rounded to that anew.
    assert (found - expected).abs().mean() < (1e-6 if exact else 0.2)
    assert exact or not torch.equal(found, expected)


def test_all_modes_are_measured_somewhere():
    mark = next(mark for mark in test_every_mode_of_a_cpu.pytestmark if mark.name == "parametrize")
    assert {mode for mode, _ in mark.args[1]} == set(MODES)
    assert all("offload" in mode for mode in GPU_MODES)


def test_the_table_is_relative_to_one_mode():
    rows = {
        "bf16": {
            "loading_gb": 4.2,
            "run_gb": 5.0,
            "held_gb": 4.0,
            "seconds": 2.0,
            "largest": 0.0,
            "mean": 0.0,
            "psnr": float("inf"),
        },
        "fp8": {
            "loading_gb": 4.2,
            "run_gb": 3.0,
            "held_gb": 2.0,
            "seconds": 3.0,
            "largest": 0.012,
            "mean": 0.001,
            "psnr": 48.2,
        },
    }
    text = table(rows, "bf16", seconds=False)
    assert text.splitlines()[-1] == "| `fp8` | 4.20 | 3.00 | 2.00 | 1.50 | 1.2e-02 | 1.0e-03 | 48.2 |"
    assert "seconds" not in text and table(rows, "bf16", seconds=True).splitlines()[-1].count("|") == 10


@linux
def test_the_command(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A second mode would show no more and take as long again.
    main(f"--model {model} --folder {tmp_path} --modes fp32 --size 16 --json --device=cpu".split())
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == ["fp32"] and rows["fp32"]["largest"] == 0
    assert 0 < rows["fp32"]["held_gb"] <= rows["fp32"]["run_gb"] < 1

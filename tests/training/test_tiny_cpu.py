"""The recipe that goes the whole way, with fewer steps and smaller crops."""

import json

import pytest
import yaml

from tsdsr import TSDSRPipeline
from tsdsr.training.config import parse
from tsdsr.training.distill import distill


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    import tsdsr.training

    folder = tmp_path_factory.mktemp("tiny")
    source = next(iter(tsdsr.training.__path__)) + "/recipes/tiny_cpu.yaml"
    with open(source, encoding="utf-8") as stream:
        values = yaml.safe_load(stream)
    for stage in ("autoencoder", "teacher"):
        values["pretrain"][stage] |= {"steps": 12, "train_batch_size": 4, "resolution": 32}
    values["pretrain"]["transformer"]["num_layers"] = 1
    values["pretrain"]["vae"]["num_encoder_blocks"] = [0, 0, 1]
    for phase, steps in zip(values["phases"], (48, 3), strict=True):
        phase["steps"] = steps
    values |= {"resolution": 32, "train_batch_size": 4, "dataloader_num_workers": 0, "lr_warmup_steps": 2}
    values |= {"validation_photographs": 2, "validation_size": 64, "checkpointing_steps": 48, "validation_steps": 48}
    values |= {"ema_decay": 0.5, "logging_steps": 1, "learning_rate": 3e-3}
    values["lr_scheduler"] = "constant_with_warmup"
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    flags = ["--config", str(recipe), "--train_data_dir", str(photographs), "--output_dir", str(folder / "run")]
    return folder / "run", distill(parse(flags)), flags


def test_the_student_leaves_its_start_far_behind(run):
    _, metrics, _ = run
    assert metrics["student"]["psnr_y"] > metrics["start"]["psnr_y"] + 1


def test_both_phases_ran_with_their_own_losses(run):
    lines = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    phases = {
        name: [line for line in lines if line.get("phase") == name] for name in ("reconstruction", "distillation")
    }
    assert [len(found) for found in phases.values()] == [48, 3]
    assert all("latent_mse" in line and "encoder_features" not in line for line in phases["reconstruction"])
    assert all("latent_mse" not in line and "encoder_features" in line for line in phases["distillation"])


def test_what_it_writes_loads(run):
    output, metrics, _ = run
    base = TSDSRPipeline.from_pretrained(output / "base", local_files_only=True)
    base.load_lora_weights(output / "lora")
    merged = TSDSRPipeline.from_pretrained(output / "pipeline", local_files_only=True)
    assert merged.config.use_shift_factor and merged.vae.config.shift_factor != 0
    assert json.loads((output / "metrics.json").read_text()) == metrics


def test_a_finished_run_is_not_trained_again(run):
    output, metrics, flags = run
    before = (output / "base" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    again = distill(parse([*flags, "--resume_from_checkpoint", "latest"]))
    assert again == metrics
    assert (output / "base" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before

"""The small model's trainer: it learns, it can be resumed, and it writes a pipeline that loads."""

import json

import numpy as np
import pytest
import torch
import yaml

from tsdsr import TSDSRPipeline
from tsdsr.imaging import Picture, write
from tsdsr.training import embedded


@pytest.fixture
def photographs(tmp_path, picture):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(6):
        write(Picture(picture(64, 64, seed=index)), folder / f"p_{index:04d}_00.png")
    return folder


def recipe(path, steps):
    stage = {"steps": steps, "learning_rate": 1e-3, "sizes": {32: [1.0, 2]}, "warmup_steps": 1}
    path.write_text(
        yaml.safe_dump(
            {
                "vae": {
                    "encoder_block_out_channels": [8, 8, 8],
                    "decoder_block_out_channels": [8, 8, 8],
                    "num_encoder_blocks": [0, 0, 1],
                    "num_decoder_blocks": [1, 0, 0],
                    "latent_channels": 4,
                },
                "transformer": {
                    "sample_size": 16,
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 2,
                    "caption_projection_dim": 16,
                    "joint_attention_dim": 12,
                    "pooled_projection_dim": 10,
                    "pos_embed_max_size": 16,
                },
                "prompt_tokens": 2,
                "last_stage_share": 0.5,
                "validation_photographs": 2,
                "validation_size": 64,
                "checkpointing_steps": 2,
                "logging_steps": 2,
                "stages": [
                    {"name": "autoencoder", "kind": "autoencoder", "gradient_l1": 0.5, **stage},
                    {"name": "student", "kind": "student", "frequency_l1": 0.1, "latent_mse": 0.1, **stage},
                    {"name": "adversarial", "kind": "student", "adversarial": 0.02, **stage},
                ],
            }
        )
    )
    return path


def train(config, photographs, output, *more):
    embedded.main(["--config", str(config), "--train_data_dir", str(photographs), "--output_dir", str(output), *more])


def test_all_stages_and_a_pipeline_that_runs(photographs, tmp_path, picture):
    output = tmp_path / "run"
    train(recipe(tmp_path / "recipe.yaml", 4), photographs, output)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log if entry.get("done")] == ["autoencoder", "student", "adversarial"]
    assert any("psnr_y" in entry for entry in log) and any("discriminator" in entry for entry in log)

    pipeline = TSDSRPipeline.from_pretrained(output / "pipeline", dtype=torch.float32, local_files_only=True)
    before, after = (torch.load(output / f"{name}.pt", weights_only=True) for name in ("student", "adversarial"))
    name = "encoder.layers.0.weight"
    expected = (before[f"vae.{name}"] + after[f"vae.{name}"]) / 2
    torch.testing.assert_close(pipeline.vae.state_dict()[name], expected, atol=1e-3, rtol=0)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(picture(8, 8), process_size=32, tile_size=32, tile_overlap=8).images[0].size == (32, 32)


def test_resumed_run_equals_an_unbroken_one(photographs, tmp_path, monkeypatch):
    config = recipe(tmp_path / "recipe.yaml", 4)
    train(config, photographs, tmp_path / "whole")

    loads = []

    class Stopped(Exception):
        pass

    def stop(*arguments):
        loads.append(1)
        if len(loads) == 3:  # the checkpoint of step 2 of the second stage is written just before
            raise Stopped
        return real(*arguments)

    real = embedded.validate
    monkeypatch.setattr(embedded, "validate", stop)
    with pytest.raises(Stopped):
        train(config, photographs, tmp_path / "broken")
    monkeypatch.setattr(embedded, "validate", real)
    train(config, photographs, tmp_path / "broken", "--resume_from_checkpoint", "latest")
    for name in ("autoencoder", "student", "adversarial"):
        whole = torch.load(tmp_path / "whole" / f"{name}.pt", weights_only=True)
        resumed = torch.load(tmp_path / "broken" / f"{name}.pt", weights_only=True)
        for key, value in whole.items():
            torch.testing.assert_close(resumed[key], value, msg=f"{name} {key}")


def test_weights_of_two_stages_are_blended():
    model = torch.nn.Linear(3, 2)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    others = {name: torch.rand_like(value) for name, value in own.items()}
    embedded.blend(model, others, 0.25)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, 0.25 * own[name] + 0.75 * others[name])


def test_the_autoencoder_starts_as_interpolation(tmp_path, picture):
    """Before any training the result is close to the picture, for the network that ships."""
    torch.manual_seed(0)
    config = embedded.Config.from_yaml(embedded.Path(embedded.__file__).parent / "recipes" / "embedded_v0.yaml")
    model = embedded.EmbeddedModel(config).eval()
    images = torch.from_numpy(picture(64, 64)).permute(2, 0, 1)[None] * 2 - 1
    with torch.no_grad():
        latents, output = model(images, one_step=True)
    assert latents.shape == (1, 16, 16, 16)
    assert (output - images).abs().mean() < 0.1
    torch.testing.assert_close(model.vae.encode(images).latents, latents)  # v = 0


@pytest.mark.parametrize("name", ["gradient_l1", "frequency_l1"])
def test_losses_vanish_only_on_the_target(name):
    loss = getattr(embedded, name)
    target = torch.rand(2, 3, 8, 8)
    assert loss(target, target) == 0
    assert loss(target + 0.1 * torch.randn(2, 3, 8, 8), target) > 0


def test_psnr_of_a_known_error():
    """A grey difference of 10 levels of 255 in RGB is 10 * 219 / 255 in luma."""
    target = torch.full((1, 3, 8, 8), 0.5)
    expected = 20 * np.log10(255 / (10 * 219 / 255))
    assert embedded.psnr_y(target + 10 / 255, target) == pytest.approx(expected, abs=0.01)

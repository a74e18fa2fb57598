"""A base from nothing but photographs."""

import copy
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from tsdsr import TSDSRPipeline
from tsdsr.imaging import read
from tsdsr.training import pretrain as module
from tsdsr.training.config import ConfigError, parse
from tsdsr.training.data import BatchSettings
from tsdsr.training.inputs import open_photographs, read_batches
from tsdsr.training.pretrain import PretrainConfig, flow_matching_loss, pretrain
from tsdsr.training.sampling import main

SECTION = {
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
    "autoencoder": {"steps": 6, "learning_rate": "1e-3", "train_batch_size": 2, "resolution": 32, "warmup_steps": 1},
    "teacher": {"steps": 6, "learning_rate": 1e-3, "train_batch_size": 2, "resolution": 32, "warmup_steps": 1},
    "checkpointing_steps": 2,
}


# With what only some recipes use.
SHARP = copy.deepcopy(SECTION)
SHARP["autoencoder"] |= {"frequency_l1": 0.1, "latent_noise": 0.1, "adversarial": 0.1, "adversarial_from": 0.3}
JUDGED = {"discriminator_width": 4, "discriminator_layers": 2, "r1_weight": 0.1}


@pytest.fixture
def settings(photographs, tmp_path):
    """A function that parses a recipe with SECTION, some of it changed."""

    def make(name="run", section=SECTION, **flags):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"pretrain": section, "guidance_scale": 1, "max_train_steps": 1}))
        words = ["--config", str(recipe), "--train_data_dir", str(photographs), "--resolution", "32"]
        words += ["--output_dir", str(tmp_path / name)]
        for flag, value in {"vae_encoder": "full", **flags}.items():
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        return parse(words)

    return make


def run(config):
    return pretrain(config, open_photographs(config))


def weights(folder):
    return {
        part: load_file(f"{folder}/{part}/diffusion_pytorch_model.safetensors")
        for part in ("vae", "transformer", "prompt_embeddings")
    }


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for part in ours:
        assert [name for name in ours[part] if not torch.equal(ours[part][name], theirs[part][name])] == []


@pytest.mark.parametrize("use_shift_factor", [False, True])
def test_both_stages_make_a_base(settings, photographs, use_shift_factor):
    config = settings(**({"use_shift_factor": True} if use_shift_factor else {}))
    folder = run(config)
    pipeline = TSDSRPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.use_shift_factor is use_shift_factor and pipeline.scheduler.config.shift == 3.0
    assert pipeline.prompt_embeddings.prompt_embeds.shape == (1, 4, 12)
    assert pipeline(torch.rand(1, 3, 8, 8), process_size=0, output_type="pt").images.shape == (1, 3, 32, 32)
    # The zeroed last layer and the interpolation that both began as have moved.
    assert pipeline.transformer.proj_out.weight.abs().sum() > 0
    source = open_photographs(config).source
    (batch,) = read_batches(source, BatchSettings(train_batch_size=32, resolution=32, seed=9), stop=1)
    vae = pipeline.vae
    assert (vae.config.shift_factor != 0) == use_shift_factor
    with torch.no_grad():
        latents = (vae.encode(batch["hq"] * 2 - 1).latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert float(latents.square().mean()) == pytest.approx(1, abs=0.2)
    assert abs(float(latents.mean())) < 0.2 or not use_shift_factor


@pytest.mark.parametrize(
    ("stage", "section", "flags"),
    [("autoencoder", SECTION, {}), ("teacher", SECTION, {}), ("autoencoder", SHARP, JUDGED)],
)
def test_a_stage_that_is_killed_and_resumed_follows_the_unbroken_run(
    settings, monkeypatch, tmp_path, stage, section, flags
):
    whole = run(settings("whole", section, **flags))
    name = {"autoencoder": "autoencoder_loss", "teacher": "flow_matching_loss"}[stage]
    real, calls = getattr(module, name), []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, name, dying)
        run(settings("again", section, **flags))
    assert not (tmp_path / "again" / "base").exists()
    left = tmp_path / "again" / "checkpoints" / stage
    assert [path.name for path in left.iterdir()] == ["checkpoint-2"]
    again = run(settings("again", section, **flags, resume_from_checkpoint="latest"))
    assert_equal(weights(again), weights(whole))


def test_a_discriminator_joins_in_late(settings, monkeypatch, tmp_path):
    """After a third of six steps, with its weight; until then the run is the one without it."""
    judged, real = [], module.Adversary.loss

    def loss(self, output, hq):
        judged.append((output.shape, self._weight))
        return real(self, output, hq)

    monkeypatch.setattr(module.Adversary, "loss", loss)
    section = copy.deepcopy(SECTION)
    run(settings("plain", section))
    section["autoencoder"] |= {"adversarial": 0.1, "adversarial_from": 0.3}
    before = run(settings("late", section, **JUDGED))
    assert judged == [((2, 3, 32, 32), 0.1)] * 4
    states = [
        load_file(tmp_path / name / "checkpoints/autoencoder/checkpoint-6/model.safetensors")
        for name in ("plain", "late")
    ]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (tmp_path / "late/checkpoints/autoencoder/checkpoint-6/model_1.safetensors").is_file()
    section["autoencoder"] |= {"adversarial_from": 1.0}
    never = weights(run(settings("never", section, **JUDGED)))
    assert_equal(never, weights(tmp_path / "plain" / "base"))
    assert any(not torch.equal(never["vae"][name], tensor) for name, tensor in weights(before)["vae"].items())


@pytest.mark.parametrize("section", [SECTION, SHARP])
def test_half_precision(settings, monkeypatch, section):
    """Both stages compute in it; weights and what is written stay as they are."""
    seen = []
    real = torch.nn.Conv2d._conv_forward

    def convolve(self, *given):
        result = real(self, *given)
        seen.append(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", convolve)
    folder = run(settings("run", section, mixed_precision="bf16", **JUDGED))
    assert torch.bfloat16 in seen
    assert all(tensor.dtype == torch.float32 for part in weights(folder).values() for tensor in part.values())


def test_a_base_that_is_whole_is_taken(settings, tmp_path, monkeypatch):
    folder = run(settings())
    before = weights(folder)
    monkeypatch.setattr(module, "train_stage", lambda *_: pytest.fail("it was trained again"))
    assert run(settings(resume_from_checkpoint="latest")) == folder
    assert_equal(weights(folder), before)


def test_the_teacher_is_shown_where_there_are_photographs_to_validate_on(settings, tmp_path):
    """Four samples; HQ, LQ and three restorations of each photograph; the base is what it is without them."""
    section = copy.deepcopy(SECTION)
    section["teacher"]["resolution"] = 16
    folder = run(settings("shown", section, validation_photographs=2, validation_size=32, use_shift_factor=True))
    sheet = read(tmp_path / "shown" / "teacher.png").rgb
    assert sheet.shape == (44 + (26 + 256 + 8) + 2 * (49 + 256 + 8), 8 + 5 * 264, 3)
    again = run(settings("again", section, validation_photographs=2, validation_size=32, use_shift_factor=True))
    assert np.array_equal(sheet, read(tmp_path / "again" / "teacher.png").rgb)
    main([folder, "-o", str(tmp_path / "own.png"), "--count", "4", "--size", "16", "--steps", "14", "--device", "cpu"])
    assert np.array_equal(read(tmp_path / "own.png").rgb[44:334, : 4 * 264], sheet[44:334, : 4 * 264])
    assert_equal(weights(folder), weights(again))
    run(settings("hidden", section))
    assert not (tmp_path / "hidden" / "teacher.png").exists()


def test_what_is_averaged_is_written(settings, tmp_path):
    """With a decay of 0 the average is the last weights, which the checkpoint of the last step holds."""
    section = copy.deepcopy(SECTION)
    section["teacher"] |= {"ema_decay": 0.0}
    folder = run(settings("plain", section))
    last = load_file(tmp_path / "plain" / "checkpoints" / "teacher" / "checkpoint-6" / "model.safetensors")
    ours = weights(folder)["transformer"]
    assert all(torch.equal(last[name], ours[name]) for name in ours)
    folder = run(settings("averaged"))
    last = load_file(tmp_path / "averaged" / "checkpoints" / "teacher" / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(last["proj_out.weight"], weights(folder)["transformer"]["proj_out.weight"])


def test_pairs_of_another_scale(settings, photographs, tmp_path):
    """The small pictures are not looked at, but pairs are checked for their size."""
    partners = tmp_path / "partners"
    shutil.copytree(photographs, partners)
    section = copy.deepcopy(SECTION)
    for stage in ("autoencoder", "teacher"):
        section[stage]["steps"] = 1
    assert run(settings("run", section, train_lq_dir=partners, scale=1)).endswith("base")


def test_flow_matching_is_the_formula():
    """mean( (v - (noise - z))^2 ) at sigmoid levels; the network is asked at 1000 sigma."""
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    seen = {}

    def network(**arguments):
        seen.update(arguments)
        return (0.5 * arguments["hidden_states"],)

    prompt = torch.ones(1, 2, 5), torch.ones(1, 6)
    loss = flow_matching_loss(network, prompt, latents, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.randn(3, generator=generator).sigmoid()
    level = sigma.view(3, 1, 1, 1)
    noisy = level * noise + (1 - level) * latents
    torch.testing.assert_close(loss, (0.5 * noisy - noise + latents).square().mean())
    torch.testing.assert_close(seen["hidden_states"], noisy)
    torch.testing.assert_close(seen["timestep"], 1000 * sigma)
    assert seen["encoder_hidden_states"].shape == (3, 2, 5) and seen["pooled_projections"].shape == (3, 6)


def test_only_forward_is_called_on_what_ddp_wraps():
    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments):
            return self.module(*arguments)

    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(**SECTION["vae"])
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    passed = Wrapped(module.RoundTrip(vae))(pictures)
    output = vae.decode(vae.encode(pictures).latents).sample
    torch.testing.assert_close(passed, output)
    difference = output - pictures
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    expected = difference.abs().mean() + 0.5 * edges
    torch.testing.assert_close(module.autoencoder_loss(passed, pictures, 0.5), expected)
    spectra = (torch.fft.rfft2(output, norm="ortho") - torch.fft.rfft2(pictures, norm="ortho")).abs().mean()
    torch.testing.assert_close(module.autoencoder_loss(passed, pictures, 0.5, 0.1), expected + 0.1 * spectra)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("autoencoder",), None, "pretrain.autoencoder must hold settings and their values, not None."),
        (("autoencoder", "steps"), None, "The setting pretrain.autoencoder.steps is missing."),
        (("vae",), None, "The setting pretrain.vae is missing."),
        (("autoencoder", "stps"), 3, "The setting pretrain.autoencoder.stps does not exist."),
        (("vea",), {}, "The setting pretrain.vea does not exist."),
        (("teacher", "learning_rate"), "fast", "pretrain.teacher.learning_rate cannot be 'fast'; it is a number."),
        (("teacher", "steps"), 0, "pretrain.teacher.steps must be at least 1, not 0."),
        (("autoencoder", "adversarial"), -1, "pretrain.autoencoder.adversarial must be at least 0, not -1.0."),
        (("autoencoder", "adversarial_from"), 2, "pretrain.autoencoder.adversarial_from must be from 0 to 1, not 2.0."),
        (("teacher", "adversarial"), 1, "The setting pretrain.teacher.adversarial does not exist."),
        (("prompt_tokens",), 0, "pretrain.prompt_tokens must be at least 1, not 0."),
        (("vae", "nonsense"), 1, "vae, transformer or scheduler of the section pretrain cannot be built"),
        (("scheduler",), {"nonsense": 1}, "vae, transformer or scheduler of the section pretrain cannot be built"),
        (("scheduler",), 5, "pretrain.scheduler cannot be 5; it is a section with settings of its own."),
        (("scheduler",), {"kind": "ddpm"}, "pretrain.scheduler.kind must be one of flow, residual_shift, not 'ddpm'."),
        (("scheduler",), {"kind": "residual_shift"}, "residual_shift is for a unet, flow for a transformer"),
        (("transformer",), None, "pretrain trains one network: give it a section transformer or a section unet."),
        (
            ("unet",),
            {"in_channels": 8},
            "pretrain trains one network: give it a section transformer or a section unet.",
        ),
        (("teacher", "condition"), "hq", "pretrain.teacher.condition must be one of none, lq, not 'hq'."),
        (("teacher", "condition"), "lq", "transformer.in_channels must be twice vae.latent_channels, 8, not 4."),
        (("transformer", "in_channels"), 8, "pretrain.transformer.in_channels must be vae.latent_channels, 4, not 8."),
        (("teacher", "resolution"), 30, "resolution must be a multiple of the scale 4, not 30."),
        (("teacher", "resolution"), 36, "pretrain.teacher: sides of crops must be multiples of 8, not 36."),
    ],
)
def test_sections_that_cannot_be_used(settings, monkeypatch, place, value, message):
    """Before anything is trained."""
    section = copy.deepcopy(SECTION)
    inner = section if len(place) == 1 else section[place[0]]
    inner[place[-1]] = value
    if value is None:
        del inner[place[-1]]
    monkeypatch.setattr(module.Accelerator, "backward", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ConfigError) as refused:
        run(settings("run", section))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_noise_on_latents():
    torch.manual_seed(0)
    vae, seen = AutoencoderTiny(**SECTION["vae"]), []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    model = module.RoundTrip(vae)
    for noise, seed in ((0.0, 0), (0.25, 0), (0.25, 0), (0.25, 1)):
        model(pictures, noise, torch.Generator().manual_seed(seed))
    plain, noisy, again, other = seen
    assert torch.equal(noisy, again) and not torch.equal(noisy, other)
    assert float((noisy - plain).square().mean() / plain.square().mean()) == pytest.approx(0.25**2, rel=0.05)


def test_crops_of_other_sizes(settings, monkeypatch):
    section, seen = copy.deepcopy(SECTION), set()
    section["teacher"]["other_resolutions"] = {16: [0.75, 3]}
    real = module.flow_matching_loss

    def watched(*arguments):
        seen.add(tuple(arguments[2].shape))
        return real(*arguments)

    monkeypatch.setattr(module, "flow_matching_loss", watched)
    run(settings("run", section, seed=1))
    assert seen == {(2, 4, 8, 8), (3, 4, 4, 4)}


def test_the_command_makes_the_base_alone(settings, photographs, tmp_path, capsys):
    settings()
    words = ["--train_data_dir", str(photographs), "--output_dir", str(tmp_path / "run"), "--vae_encoder", "full"]
    words += ["--max_train_steps", "1"]
    module.main(["--config", str(tmp_path / "recipe.yaml"), *words])
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'base'}\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"base", "checkpoints"}
    with pytest.raises(SystemExit) as refused:
        module.main(["--pretrained_model_name_or_path", "x", *words])
    assert refused.value.code == 2
    assert capsys.readouterr().err == "Error: Name a recipe with a section pretrain (--config).\n"


def test_crops_too_small_for_the_discriminator(settings):
    with pytest.raises(ConfigError, match=r"needs crops of at least 64 pixels, not 32\."):
        run(settings("run", SHARP, discriminator_layers=6))


def test_a_lora_of_its_encoder_is_refused_before_it_is_trained(settings):
    with pytest.raises(ConfigError, match=r"takes no LoRA: set vae_encoder to full or frozen\."):
        run(settings(vae_encoder="lora"))


def test_numbers_are_read_as_numbers():
    settings = PretrainConfig.from_dict(SECTION)
    assert settings.autoencoder.learning_rate == 1e-3 and settings.gradient_l1 == 0.5 and settings.prompt_tokens == 4

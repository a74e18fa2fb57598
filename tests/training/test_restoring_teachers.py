"""Teachers that read the LQ picture: how they are trained, what their students are, and that a pipeline runs them."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file

from tsdsr import TSDSRPipeline
from tsdsr.imaging import read
from tsdsr.training import terms
from tsdsr.training.base import load_base
from tsdsr.training.config import ConfigError, parse
from tsdsr.training.distill import distill
from tsdsr.training.export import without_condition
from tsdsr.training.families import RectifiedFlow, ResidualShifting, guided_velocity
from tsdsr.training.objectives import ResidualShift
from tsdsr.training.pretrain import PretrainConfig, residual_shift_loss
from tsdsr.training.sampling import main

STAGE = {"steps": 3, "train_batch_size": 2, "resolution": 32, "warmup_steps": 1}
SECTION = {
    "vae": {
        "encoder_block_out_channels": [8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8],
        "num_encoder_blocks": [0, 0, 1],
        "num_decoder_blocks": [1, 0, 0],
        "latent_channels": 4,
    },
    "autoencoder": STAGE,
    "teacher": {**STAGE, "condition": "lq"},
    "prompt_tokens": 1,
}
TRANSFORMER = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 16,
}
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
SECTIONS = {
    "flow": {**SECTION, "transformer": TRANSFORMER},
    "residual_shift": {
        **SECTION,
        "unet": UNET,
        "scheduler": {"kind": "residual_shift", "num_train_timesteps": 5, "min_noise_level": 0.2},
    },
}
RUN = {
    "use_shift_factor": True,
    "objective": "tad",
    "guidance_scale": 1.0,
    "teacher_steps": 2,
    "latent_discriminator_depths": 2,
    "latent_discriminator_width": 8,
    "latent_discriminator_votes": 2,
    "vae_encoder": "full",
    "train_type": "full",
    "output": "merged",
    "output_dtype": "fp32",
    "resolution": 32,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "discriminator_learning_rate": 1e-3,
    "validation_photographs": 2,
    "validation_size": 32,
    "validation_steps": 0,
    "logging_steps": 1,
    "checkpointing_steps": 1,
    "phases": [{"steps": 2}],
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Case:
    """A tiny network of each kind with its family, latents of LQ pictures and a prompt."""

    def __init__(self, kind):
        torch.manual_seed(0)
        if kind == "flow":
            self.network = SD3Transformer2DModel(**TRANSFORMER).eval()
            self.family = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0), conditioned=True)
        else:
            self.network = UNet2DConditionModel(**UNET).eval()
            self.family = ResidualShifting(ResidualShift(5, min_noise_level=0.2))
        self.prompt = torch.randn(1, 1, 12), torch.randn(1, 10) if kind == "flow" else None
        self.z, self.lq = torch.randn(2, 2, 4, 8, 8, generator=generator(1))

    def called(self, latents, timestep):
        """The network itself, on its eight channels."""
        embeds, pooled = self.prompt
        times = torch.full((len(latents),), timestep)
        more = {} if pooled is None else {"pooled_projections": pooled.expand(2, -1)}
        with torch.no_grad():
            return self.network(
                latents, timestep=times, encoder_hidden_states=embeds.expand(2, -1, -1), return_dict=False, **more
            )[0]


@pytest.fixture(params=SECTIONS)
def case(request):
    return Case(request.param)


def test_the_students_step(case):
    """From the mean of the most noisy state: y, in the scale that the network was trained at, with y beside it."""
    with torch.no_grad():
        found = case.family.one_step(case.network, case.lq, case.prompt)
    if isinstance(case.family, ResidualShifting):
        # kappa 2, sqrt(eta) 0.99: y / sqrt(4 * 0.9801 + 1), and the output is the clean latents.
        expected = case.called(torch.cat([case.lq / 2.2182, case.lq], dim=1), 4)
    else:
        expected = case.lq - case.called(torch.cat([case.lq, case.lq], dim=1), 1000.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_lq_picture_is_read_beside_noisy_latents(case):
    """The same with guidance inside, and for a batch that holds the pictures twice."""
    known = (*case.prompt, case.lq)
    sigma = case.family.scheduler.sigmas[:1].float().expand(2)
    with torch.no_grad():
        plain = case.family.velocity(case.network, known)(case.z, sigma)
        twice = case.family.velocity(case.network, known)(torch.cat([case.z] * 2), torch.cat([sigma] * 2))
        guided = guided_velocity(case.family, case.network, known, case.prompt, 3.0)(case.z, sigma)
        other = case.family.velocity(case.network, (*case.prompt, case.lq.flip(0)))(case.z, sigma)
    torch.testing.assert_close(twice, plain.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-4)  # the empty prompt is the prompt here
    assert (other - plain).abs().mean() > 1e-3
    if isinstance(case.family, ResidualShifting):
        eta = float(case.family.scheduler.etas[-1])
        alpha, s = 1 - eta, 2 * eta**0.5
        noisy = ((alpha + s) * case.z + eta * case.lq) / (4 * eta + 1) ** 0.5
        clean = case.called(torch.cat([noisy, case.lq], dim=1), 4)
        expected = (case.z - clean) / sigma.view(-1, 1, 1, 1)
    else:
        expected = case.called(torch.cat([case.z, case.lq], dim=1), 1000.0)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_reads_it_once(case):
    """W [scale y, y] = (scale W_1 + W_2) y: exactly the same, and of half the channels."""
    scale = case.family.input_scale
    plain = without_condition(case.network, scale).eval()
    assert plain.config.in_channels == 4 and plain.config.out_channels == 4
    twice = case.called(torch.cat([scale * case.lq, case.lq], dim=1), 4)
    case.network = plain
    torch.testing.assert_close(case.called(case.lq, 4), twice, rtol=1e-4, atol=1e-5)


def test_how_residual_shifting_is_learned():
    """mean (x - z)^2 at x_t = z + eta (y - z) + kappa sqrt(eta) noise, scaled; 0 for a network that knows z."""
    case, seen = Case("residual_shift"), []

    class Knows(torch.nn.Module):
        def forward(self, x, t, encoder_hidden_states):
            seen.append((x, t))
            return type("Output", (), {"sample": case.z + 0.5})

    schedule, known = case.family.scheduler, (*case.prompt, case.lq)
    loss = residual_shift_loss(Knows(), known, case.z, generator(3), schedule)
    assert float(loss) == pytest.approx(0.25, rel=1e-4)
    ((x, t),) = seen
    draws = generator(3)
    index = torch.randint(5, (2,), generator=draws)  # levels fall with it
    noise = torch.randn(case.z.shape, generator=draws)
    assert torch.equal(t, 4 - index)
    eta = schedule.etas[t].float().view(-1, 1, 1, 1)
    state = case.z + eta * (case.lq - case.z) + 2 * eta.sqrt() * noise
    torch.testing.assert_close(x[:, :4], state / (4 * eta + 1).sqrt(), rtol=1e-4, atol=1e-4)
    assert torch.equal(x[:, 4:], case.lq)


@pytest.fixture(scope="module", params=SECTIONS)
def run(request, photographs, tmp_path_factory):
    """Everything from photographs: kind, folder, settings, metrics and what went into z*."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RUN, "pretrain": SECTIONS[request.param]}), encoding="utf-8")
    flags = ["--config", str(recipe), "--train_data_dir", str(photographs), "--output_dir", str(folder / "run")]
    restored, real = [], terms.restore_latents

    def restore(velocity, scheduler, lq_latents, *more):
        restored.append((velocity, lq_latents, more, real(velocity, scheduler, lq_latents, *more)))
        return restored[-1][-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(terms, "restore_latents", restore)
        metrics = distill(parse(flags))
    return request.param, folder / "run", flags, metrics, restored


def test_a_restoring_teacher_and_its_student(run):
    kind, folder, flags, _, restored = run
    base = load_base(parse(flags), str(folder / "base"))
    assert base.family.conditioned and base.denoiser.config.in_channels == 8
    assert isinstance(base.family, ResidualShifting) == (kind == "residual_shift")
    assert (folder / "teacher.png").is_file()
    weights = load_file(folder / "checkpoints" / "checkpoint-2" / "trained.safetensors")
    assert any(name.startswith("latent_discriminator.") for name in weights)
    assert not any("fake_score" in name for name in weights)
    # z* is made from the most noisy level on, by a teacher that reads these very LQ pictures.
    assert len(restored) == 2
    for velocity, lq_latents, (_, steps, sampler, strength), target in restored:
        assert (steps, sampler, strength) == (2, "euler", pytest.approx(base.family.strength))
        known = (base.prompt.prompt_embeds, base.prompt.pooled_prompt_embeds, lq_latents)
        sigma = torch.full((2,), float(base.family.scheduler.sigmas[0]))
        with torch.no_grad():
            expected = base.family.velocity(base.denoiser, known)(target, sigma)
            torch.testing.assert_close(velocity(target, sigma), expected, rtol=1e-3, atol=1e-4)


def test_a_pipeline_runs_the_student(run):
    """What the trainer measured, from the folder it wrote; and what the student's own weights give."""
    kind, folder, flags, metrics, _ = run
    pipeline = TSDSRPipeline.from_pretrained(folder / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.denoiser.config.in_channels == 4
    final = folder / "validation" / "final"
    lq = read(final / "p_0000_00_lq.png").rgb
    result = pipeline(lq, process_size=0, color_fix="none", output_type="np").images[0]
    assert np.abs(result - read(final / "p_0000_00.png").rgb).max() <= 0.51 / 255
    assert metrics["student"]["psnr_y"] != metrics["start"]["psnr_y"]

    base = load_base(parse(flags), str(folder / "base"))
    weights = load_file(folder / "checkpoints" / "checkpoint-2" / "trained.safetensors")
    prefix = "student_network."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    assert base.denoiser.load_state_dict(own, strict=False).unexpected_keys == []
    assert own.keys() == dict(base.denoiser.named_parameters()).keys()
    latents = torch.randn(2, 4, 8, 8, generator=generator(5))
    embeds, pooled = base.prompt.prompt_embeds, base.prompt.pooled_prompt_embeds
    with torch.no_grad():
        ours = base.family.one_step(base.denoiser, latents, (embeds, pooled))
        if kind == "flow":
            theirs = RectifiedFlow(None).one_step(pipeline.transformer, latents, (embeds, pooled))
        else:
            assert pipeline.config.timestep == 4 and pipeline.scheduler.config.prediction_type == "sample"
            theirs = pipeline.unet(latents, 4, encoder_hidden_states=embeds.expand(2, -1, -1)).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_lora_over_one_that_restores(run, photographs, tmp_path):
    """And with a fake score, which reads the LQ picture as well."""
    _, folder, flags, _, _ = run
    more = ["--pretrained_model_name_or_path", str(folder / "base"), "--output_dir", str(tmp_path / "lora")]
    more += ["--train_type", "lora", "--rank", "2", "--fake_score_rank", "2", "--objective", "tsd", "--dasm_steps", "2"]
    with pytest.raises(ConfigError, match=r"reads LQ pictures.*: set output merged\."):
        distill(parse([*flags, *more, "--output", "lora"]))
    metrics = distill(parse([*flags, *more]))
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "lora" / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    final = tmp_path / "lora" / "validation" / "final"
    result = pipeline(read(final / "p_0000_00_lq.png").rgb, process_size=0, color_fix="none", output_type="np").images[
        0
    ]
    assert np.abs(result - read(final / "p_0000_00.png").rgb).max() <= 0.51 / 255
    assert metrics["student"]["psnr_y"] != metrics["start"]["psnr_y"]
    line = json.loads((tmp_path / "lora" / "log.jsonl").read_text().splitlines()[-2])
    assert line["fake_score"] > 0 and line["tsd"] > 0


def test_it_draws_nothing_of_its_own(run, tmp_path, capsys):
    _, folder, _, _, _ = run
    with pytest.raises(SystemExit):
        main([str(folder / "base"), "-o", str(tmp_path / "sheet.png"), "--size", "32"])
    assert "restores LQ pictures and draws none of its own: name some (--photographs)." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unet": None, "transformer": TRANSFORMER}, "residual_shift is for a unet, flow for a transformer"),
        ({"scheduler": None}, "residual_shift is for a unet, flow for a transformer"),
        ({"teacher": STAGE}, r"Residual shifting goes to the LQ picture: set pretrain\.teacher\.condition lq\."),
    ],
)
def test_sections_that_cannot_be_used(changed, message):
    section = {**copy.deepcopy(SECTIONS["residual_shift"]), **changed}
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.from_dict({name: value for name, value in section.items() if value is not None})

"""The trainer under each method: which networks there are, who moves them, and towards what."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from tsdsr import TSDSRPipeline
from tsdsr.training import terms
from tsdsr.training.config import ConfigError
from tsdsr.training.distill import distill
from tsdsr.training.draws import JUDGED, RESTORING, SCORES, draws
from tsdsr.training.families import RectifiedFlow
from tsdsr.training.networks import LATENT_DISCRIMINATOR, STUDENT, Networks
from tsdsr.training.objectives import add_noise, draw_levels, draw_noise, hsd_gradient, sds_gradient
from tsdsr.training.optimisation import Optimisation
from tsdsr.training.sampling import restore_latents

SMALL = {
    "latent_discriminator_depths": 2,
    "latent_discriminator_width": 8,
    "latent_discriminator_votes": 2,
    "discriminator_learning_rate": 1e-3,
    "teacher_steps": 2,
}
TAD = {"objective": "tad", **SMALL}
SHORT = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_photographs": 0, "output": "lora"}
EXACTLY = {"rtol": 0, "atol": 0}


def trained(output_dir, step):
    return load_file(output_dir / "checkpoints" / f"checkpoint-{step}" / "trained.safetensors")


def lines(output_dir):
    found = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in found if "phase" in line]


def kind(name):
    """Whose weight it is."""
    if name.startswith(("discriminator.", "latent_discriminator.")):
        return name.partition(".")[0]
    return "fake_score" if ".fake_score." in name else "student"


@pytest.mark.parametrize(
    ("more", "kinds", "logged"),
    [
        ({}, {"student", "fake_score"}, {"latent_mse", "tsd", "fake_score"}),
        ({"objective": "vsd"}, {"student", "fake_score"}, {"latent_mse", "tsd", "fake_score"}),
        (
            TAD,
            {"student", "latent_discriminator"},
            {"teacher_mse", "hsd", "latent_adversarial", "latent_discriminator"},
        ),
        ({**TAD, "latent_adversarial": 0}, {"student"}, {"teacher_mse", "hsd"}),
        (
            {"latent_adversarial": 0.1, **SMALL},
            {"student", "fake_score", "latent_discriminator"},
            {"latent_mse", "tsd", "fake_score", "latent_adversarial", "latent_discriminator"},
        ),
        (
            {**TAD, "adversarial": 0.1, "discriminator_width": 4, "discriminator_layers": 2},
            {"student", "latent_discriminator", "discriminator"},
            {"teacher_mse", "hsd", "latent_adversarial", "latent_discriminator", "adversarial", "discriminator"},
        ),
    ],
    ids=["tsd", "vsd", "tad", "tad without D", "tsd with D", "both D"],
)
def test_a_method_has_the_networks_that_its_terms_need(config, tmp_path, more, kinds, logged):
    """All of them move, with an optimiser each, and nothing else is made or kept."""
    distill(config(tmp_path, **SHORT, **more))
    before, after = trained(tmp_path, 1), trained(tmp_path, 2)
    assert {kind(name) for name in after} == kinds
    assert {kind(name) for name in after if not torch.equal(before[name], after[name])} == kinds
    assert not any("decoder" in name for name in after)
    first = lines(tmp_path)[0]
    known = {"step", "phase", "images_per_second", "skipped"}
    assert logged | {f"lr_{role}" for role in kinds} == first.keys() - known


def test_each_role_moves_in_its_turn(config, tmp_path, monkeypatch):
    """No other role's weights have a gradient then."""
    seen, real = [], Optimisation.step

    def step(self, role):
        roles = (STUDENT, "fake_score", LATENT_DISCRIMINATOR)
        weights = {one: self._networks.parameters_of(one) for one in roles}
        seen.append((role, {one for one in roles if any(w.grad is not None for w in weights[one])}))
        return real(self, role)

    monkeypatch.setattr(Optimisation, "step", step)
    more = {"fake_score_updates": 2, "latent_adversarial": 0.1, "gradient_accumulation_steps": 2, **SMALL}
    distill(config(tmp_path, **{**SHORT, "max_train_steps": 1}, **more))
    order = [STUDENT, "fake_score", "fake_score", LATENT_DISCRIMINATOR]
    assert seen == [(role, {role}) for role in order]


@pytest.fixture
def spies(monkeypatch):
    """What goes into the terms of latents in each call: `spies["restore_latents"]` and so on."""
    seen = {}

    def spy(name):
        real = getattr(terms, name)

        def call(*arguments):
            seeds = [one.initial_seed() for one in arguments if isinstance(one, torch.Generator)]
            found = real(*arguments)
            seen.setdefault(name, []).append((arguments, seeds, found))
            return found

        monkeypatch.setattr(terms, name, call)

    for name in ("restore_latents", "high_frequency_distillation", "latent_mse"):
        spy(name)
    real = Networks.forward

    def forward(self, role, inputs, sigma=None, **more):
        found = real(self, role, inputs, sigma, **more)
        seen.setdefault(role, []).append((inputs, sigma, found))
        return found

    monkeypatch.setattr(Networks, "forward", forward)
    return seen


def test_what_tad_leads_the_student_to(config, tmp_path, monkeypatch, base_folder, spies):
    """Equation 12, by hand: regression to the teacher's restoration, g towards it, and the discriminator's verdict."""
    passed, real = [], Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: (passed.append(loss.detach()), real(self, loss)))
    more = {"teacher_mse": 3, "hsd": 2, "latent_adversarial": 0.5, "teacher_strength": 0.4, "hsd_share": 0.5}
    distill(config(tmp_path, **{**SHORT, "max_train_steps": 1}, **{**TAD, **more}))

    base = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    prompt = base.prompt_embeddings.prompt_embeds, base.prompt_embeddings.pooled_prompt_embeds
    ((pictures, _, (latents, _)),) = spies[STUDENT]
    with torch.no_grad():
        lq_latents = base.vae.encode(pictures).latent_dist.mode() * 1.5
        velocity = RectifiedFlow(base.scheduler).velocity(base.transformer, prompt)
        target = restore_latents(velocity, base.scheduler, lq_latents, draws(0, RESTORING, 0), 2, "euler", 0.4)
        assert (target - lq_latents).abs().mean() > 0.01
        generator = draws(0, SCORES, 0)
        sigma = draw_levels(base.scheduler, 2, 0.5, generator)
        g = hsd_gradient(latents, target, draw_noise(latents.shape, generator), sigma, velocity)
    ((_, (seed,), restored),) = spies["restore_latents"]  # once, for all that ask for it
    torch.testing.assert_close(restored, target, rtol=1e-3, atol=1e-4)
    assert seed == draws(0, RESTORING, 0).initial_seed()
    ((_, _, hsd),) = spies["high_frequency_distillation"]
    (gradient,) = torch.autograd.grad(0.5 * (latents - (latents - g).detach()).square().mean(), latents)
    torch.testing.assert_close(gradient, g / g.numel())
    torch.testing.assert_close(hsd.detach(), 0.5 * g.square().mean(), rtol=1e-3, atol=1e-6)
    line = lines(tmp_path)[0]
    assert line["teacher_mse"] == pytest.approx(float((latents - target).square().mean()), rel=1e-3)
    total = 3 * line["teacher_mse"] + 2 * line["hsd"] + 0.5 * line["latent_adversarial"]
    assert float(passed[0]) == pytest.approx(total, rel=1e-4)
    assert line["latent_discriminator"] == pytest.approx(float(passed[1]))
    ((_, _, votes),) = spies[LATENT_DISCRIMINATOR]  # of real latents, then of the student's, which were judged by them
    assert line["latent_adversarial"] == pytest.approx(-float(votes[2:].mean()), rel=1e-3)
    hinge = (1 - votes[:2]).relu().mean() + (1 + votes[2:]).relu().mean()
    assert line["latent_discriminator"] == pytest.approx(float(hinge), rel=1e-4)


@pytest.mark.parametrize("real", ["hq", "teacher"])
def test_what_the_discriminator_of_latents_sees(config, tmp_path, monkeypatch, spies, real):
    """Real and made latents at one level and under one noise, the same that the student was judged at."""
    judged, judge = [], Networks.judge

    def judging(self, role, inputs, *known):
        judged.append((inputs.detach(), known[0]))
        return judge(self, role, inputs, *known)

    monkeypatch.setattr(Networks, "judge", judging)
    more = {"judged_real": real, "judged_share": 0.5}
    distill(config(tmp_path, **{**SHORT, "max_train_steps": 1}, **{**TAD, **more}))
    ((_, _, (latents, _)),) = spies[STUDENT]
    ((both, levels, _),) = spies[LATENT_DISCRIMINATOR]
    ((made, sigma),) = judged
    generator = draws(0, JUDGED, 0)
    flow = RectifiedFlow(TSDSRPipeline.from_pretrained(config(tmp_path).pretrained_model_name_or_path).scheduler)
    assert torch.equal(sigma, draw_levels(flow.scheduler, 2, 0.5, generator))
    noise = draw_noise(latents.shape, generator)
    torch.testing.assert_close(made, add_noise(latents.detach(), noise, sigma))
    assert torch.equal(both[2:], made) and torch.equal(levels, torch.cat([sigma, sigma]))
    level = sigma.view(-1, 1, 1, 1)
    clean = (both[:2] - level * noise) / (1 - level)
    ((_, _, target),) = spies["restore_latents"]
    assert torch.allclose(clean, target, atol=1e-4) == (real == "teacher")


@pytest.mark.parametrize("target", ["hq", "none"])
def test_other_targets(config, tmp_path, spies, target, base_folder):
    """The photograph's latents, or none (SDS); then nobody asks the teacher to restore anything."""
    more = {"hsd_target": target, "teacher_mse": 0, "latent_mse": 1, "hsd_noise": "uniform"}
    distill(config(tmp_path, **{**SHORT, "max_train_steps": 1}, **{**TAD, **more}))
    assert "restore_latents" not in spies
    ((arguments, _, hsd),) = spies["high_frequency_distillation"]
    _, latents, found, *_ = arguments
    base = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    prompt = base.prompt_embeddings.prompt_embeds, base.prompt_embeddings.pooled_prompt_embeds
    velocity, generator = RectifiedFlow(base.scheduler).velocity(base.transformer, prompt), draws(0, SCORES, 0)
    sigma = draw_levels(base.scheduler, 2, 0.2, generator)
    noise = draw_noise(latents.shape, generator, "uniform")
    if target == "none":
        assert found is None
        g = sds_gradient(latents.detach(), noise, sigma, velocity)
    else:
        g = hsd_gradient(latents.detach(), found, noise, sigma, velocity)
    torch.testing.assert_close(hsd.detach(), 0.5 * g.square().mean(), rtol=1e-3, atol=1e-6)


def test_tad_is_resumed_exactly(config, tmp_path, read_losses):
    """Heads, what their norms remember, their optimiser and schedule; an average, accumulation, warm-up."""
    more = {"ema_decay": 0.9, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "gradient_accumulation_steps": 2}
    more |= {**TAD, **SHORT, "max_train_steps": 3, "judged_real": "teacher", "adversarial_loss": "relativistic"}
    distill(config(tmp_path / "whole", **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in ("checkpoints/checkpoint-2", "checkpoints/checkpoint-3", "lora"):
        shutil.rmtree(tmp_path / "again" / path)
    distill(config(tmp_path / "again", **more, resume_from_checkpoint="latest"))
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "whole")
    ours, theirs = trained(tmp_path / "again", 3), trained(tmp_path / "whole", 3)
    assert ours.keys() == theirs.keys() and any(name.startswith("latent_discriminator.") for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **EXACTLY)


@pytest.mark.parametrize(
    "more",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "train_type": "full", "vae_encoder": "full"},
        {"gradient_checkpointing": True},
    ],
    ids=["bf16, all weights", "recomputed"],
)
def test_other_ways_to_train(config, tmp_path, more):
    merged = {**SHORT, "output": "merged"}
    for name, changed in (("plain", {}), ("other", more)):
        AcceleratorState._reset_state(reset_partial_state=True)  # it holds the precision of the first run
        distill(config(tmp_path / name, **merged, **TAD, **changed))
    (first, _), (other, _) = lines(tmp_path / "plain"), lines(tmp_path / "other")
    half = "mixed_precision" in more
    # Heads of a student without LoRAs begin elsewhere, because fewer weights are drawn before them.
    for name in ("teacher_mse", "hsd", *(() if half else ("latent_adversarial", "latent_discriminator"))):
        assert other[name] == pytest.approx(first[name], rel=0.05 if half else 1e-3, abs=0.01 if half else 1e-5)
    assert {tensor.dtype for tensor in trained(tmp_path / "other", 2).values()} == {torch.float32}
    assert TSDSRPipeline.from_pretrained(tmp_path / "other" / "pipeline", local_files_only=True).transformer


def test_a_unet_by_tad(make_pipeline, config, tmp_path):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    make_pipeline("kl", network="unet", scheduler=scheduler).save_pretrained(tmp_path / "base")
    distill(config(tmp_path / "run", **SHORT, **TAD, pretrained_model_name_or_path=tmp_path / "base"))
    after = trained(tmp_path / "run", 2)
    assert {kind(name) for name in after} == {"student", "latent_discriminator"}
    assert all(line["hsd"] > 0 for line in lines(tmp_path / "run"))


def test_accumulated_micro_batches_count_as_their_mean(config, tmp_path, monkeypatch):
    """For the student and for the discriminator: their gradients do not depend on how often the same is read."""
    from tsdsr.training import distill as module

    norms, real_clip, real_batches = [], Accelerator.clip_grad_norm_, module.read_batches

    def clip(self, weights, most):
        norms.append(float(real_clip(self, weights, most)))
        return torch.tensor(norms[-1])

    def read_batches(*arguments, **more):
        first = next(real_batches(*arguments, **more))
        while True:
            yield first

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    monkeypatch.setattr(module, "read_batches", read_batches)
    for accumulation in (1, 3):
        folder = tmp_path / str(accumulation)
        distill(config(folder, **{**SHORT, "max_train_steps": 1}, **TAD, gradient_accumulation_steps=accumulation))
    (student, judge), (again, judges) = norms[:2], norms[2:]
    assert student > 1e-4 < judge and again == pytest.approx(student, rel=1e-3)
    assert judges == pytest.approx(judge, rel=1e-3)


def test_a_discriminator_that_is_not_told_the_time(config, tmp_path):
    """The paper's ablation: the same heads without what time changes in them."""
    distill(config(tmp_path / "told", **SHORT, **TAD))
    distill(config(tmp_path / "not", **SHORT, **TAD, time_aware=False))
    told, not_told = trained(tmp_path / "told", 2).keys(), trained(tmp_path / "not", 2).keys()
    assert told > not_told and all("modulation" in name for name in told - not_told)


def test_crops_that_are_too_small_for_the_discriminator(config, tmp_path):
    small = config(tmp_path, **SHORT, **TAD, resolution=4)
    with pytest.raises(ConfigError, match=r"\(latent_discriminator_depths\) needs crops of at least 8 pixels, not 4\."):
        distill(small)


def test_the_card_names_the_method(config, tmp_path):
    distill(config(tmp_path, **{**SHORT, "max_train_steps": 1}, objective="vsd"))
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "OSEDiff's method (https://arxiv.org/abs/2406.08177)" in text and "objective: vsd" in text

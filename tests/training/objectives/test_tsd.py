"""Target score distillation against the published training step, and against what its equations say."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import tsdsr
from tsdsr.training.objectives import (
    add_noise,
    classifier_free_guidance,
    clean_from_velocity,
    dasm_trajectory,
    fake_score_loss,
    noise_levels,
    tsd_gradient,
    tsd_loss,
)

GOLDEN = Path(tsdsr.__file__).resolve().parents[1] / "shared" / "golden" / "training"
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


def toy(weights, guidance_scale, values):
    """The golden values' toy network: v = (1 + sigma) * W z + mean(prompt) + mean(pooled), guidance inside."""

    def velocity(z, sigma):
        mixed = (1 + sigma.view(-1, 1, 1, 1)) * torch.einsum("ij,bjhw->bihw", weights, z)
        null = mixed + values["prompt_embeds_null"].mean() + values["pooled_prompt_embeds_null"].mean()
        prompt = mixed + values["prompt_embeds"].mean() + values["pooled_prompt_embeds"].mean()
        return prompt if guidance_scale is None else classifier_free_guidance(null, prompt, guidance_scale)

    return velocity


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no results of the published step in {GOLDEN}: NOT compared")
@pytest.mark.parametrize("name", ["tsd_single", "tsd_dasm", "tsd_dasm_jitter"])
def test_golden(name):
    values = load_file(GOLDEN / f"{name}.safetensors")
    sigmas = torch.cat([values["sigmas_current"], values["sigmas_next"][-1:]])
    found = tsd_gradient(
        values["latent_stu"],
        values["model_input_hr"],
        values["noise"],
        sigmas,
        toy(values["W_default"], 7.5, values),
        toy(values["W_reg"], 7.5, values),
    )
    for ours, key in ((found.gradient, "grad"), (found.vsd, "grad_vsd"), (found.tsm, "grad_tsm")):
        torch.testing.assert_close(ours, values[key], rtol=1e-5, atol=1e-5 * float(values[key].abs().max()))
    torch.testing.assert_close(tsd_loss(values["latent_stu"], found.gradient), values["tsd_loss"], rtol=1e-5, atol=1e-6)
    loss = fake_score_loss(
        values["latent_stu"],
        values["noise_lora"],
        values["sigmas_lora"],
        toy(values["W_reg"], None, values),
        values["weighting"],
    )
    torch.testing.assert_close(loss, values["epsilon_loss"], rtol=1e-5, atol=1e-6)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 5, 6)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def linear(seed, channels=4):
    weights = torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed)) / 2
    return lambda z, sigma: (1 + sigma.view(-1, 1, 1, 1)) * torch.einsum("ij,bjhw->bihw", weights, z)


def trajectory(seed=0, batch_size=3, **options):
    return dasm_trajectory(FLOW, batch_size, generator=torch.Generator().manual_seed(seed), **options)


def test_every_sample_follows_its_own_trajectory(batch):
    student, hq, noise = batch
    sigmas = trajectory()
    together = tsd_gradient(student, hq, noise, sigmas, linear(1), linear(2))
    for index in range(3):
        one = slice(index, index + 1)
        alone = tsd_gradient(student[one], hq[one], noise[one], sigmas[:, one], linear(1), linear(2))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[one], theirs)


def test_one_point_is_the_equation(batch):
    student, hq, noise = batch
    sigmas = trajectory(steps=1)
    found = tsd_gradient(student, hq, noise, sigmas, linear(1), linear(2), vsd_weight=0.25)
    sigma = sigmas[0]
    z_student, z_hq = add_noise(student, noise, sigma), add_noise(hq, noise, sigma)
    weight = sigma.view(-1, 1, 1, 1) ** 2
    vsd = weight * (linear(1)(z_student, sigma) - linear(2)(z_student, sigma))
    tsm = weight * (linear(1)(z_student, sigma) - linear(1)(z_hq, sigma))
    torch.testing.assert_close(found.vsd, vsd)
    torch.testing.assert_close(found.tsm, tsm)
    torch.testing.assert_close(found.gradient, 0.25 * vsd + 0.75 * tsm)


def test_points_add_up_along_both_branches(batch):
    """Two points: the second where phi has taken the student and psi the HQ latents."""
    student, hq, noise = batch
    sigmas = trajectory(steps=2)
    found = tsd_gradient(student, hq, noise, sigmas, linear(1), linear(2), step_weights=(1.0, 0.5))
    first = tsd_gradient(student, hq, noise, sigmas[:2], linear(1), linear(2))
    step = (sigmas[0] - sigmas[1]).view(-1, 1, 1, 1)
    z_student, z_hq = add_noise(student, noise, sigmas[0]), add_noise(hq, noise, sigmas[0])
    z_student, z_hq = (
        z_student - step * linear(2)(z_student, sigmas[0]),
        z_hq - step * linear(1)(z_hq, sigmas[0]),
    )
    weight = 0.5 * sigmas[1].view(-1, 1, 1, 1) ** 2
    psi = linear(1)(z_student, sigmas[1])
    torch.testing.assert_close(found.vsd, first.vsd + weight * (psi - linear(2)(z_student, sigmas[1])))
    torch.testing.assert_close(found.tsm, first.tsm + weight * (psi - linear(1)(z_hq, sigmas[1])))


def test_descending_moves_the_student_from_the_fake_score_to_the_teacher(batch):
    """psi knows the clean latents as c, phi as the student's own: along the gradient the student comes closer to c."""
    student, hq, noise = batch
    target = torch.zeros_like(student) + 0.3

    def believes(clean):
        return lambda z, sigma: (z - clean) / sigma.view(-1, 1, 1, 1)

    sigmas = trajectory(steps=1)
    for vsd_weight in (0.0, 1.0):
        moved = student.clone()
        for _ in range(300):
            phi = believes(moved)
            # For TSM the teacher's view depends on what it looks at; here it pulls noisy student latents to the target.
            psi = believes(target)
            gradient = tsd_gradient(moved, hq, noise, sigmas, psi, phi, vsd_weight=vsd_weight)
            moved = moved - 0.5 * gradient.gradient / sigmas[0].view(-1, 1, 1, 1)
        reached = target if vsd_weight else hq
        assert (moved - reached).abs().mean() < 0.1 * (student - reached).abs().mean()


def test_loss_has_the_gradient(batch):
    student = batch[0].requires_grad_(True)
    gradient = batch[1]
    tsd_loss(student, gradient).backward()
    torch.testing.assert_close(student.grad * student.numel(), gradient)


def test_nothing_flows_into_the_networks(batch):
    student = batch[0].requires_grad_(True)
    scale = torch.nn.Parameter(torch.ones(()))
    found = tsd_gradient(student, batch[1], batch[2], trajectory(), lambda z, s: scale * z, lambda z, s: 2 * scale * z)
    assert not any(part.requires_grad for part in found)
    loss = fake_score_loss(student, batch[2], torch.tensor([0.1, 0.5, 0.9]), lambda z, s: scale * z)
    loss.backward()
    assert student.grad is None and scale.grad is not None


def test_not_a_number_counts_as_nothing(batch):
    def broken(z, sigma):
        v = z.clone()
        v[0, 0, 0, 0], v[1, 0, 0, 0] = float("nan"), float("inf")
        return v

    found = tsd_gradient(*batch, trajectory(steps=1), broken, linear(2))
    assert all(torch.isfinite(part).all() for part in found)
    assert found.vsd[0, 0, 0, 0] == found.tsm[1, 0, 0, 0] == 0 and found.vsd[2].abs().sum() > 0
    assert torch.isfinite(fake_score_loss(batch[0], batch[2], torch.full((3,), 0.5), broken))


def test_half_precision_networks_are_read_in_float32(batch):
    half = tsd_gradient(*(x.half() for x in batch), trajectory(), lambda z, s: z.half(), lambda z, s: (z / 2).half())
    assert {part.dtype for part in half} == {torch.float32}


def test_fake_score_is_zero_where_it_knows_the_student(batch):
    student, _, noise = batch
    sigma = torch.tensor([0.2, 0.5, 0.8])
    assert fake_score_loss(student, noise, sigma, lambda z, s: noise - student) < 1e-10
    one = fake_score_loss(student, noise, sigma, linear(1))
    torch.testing.assert_close(fake_score_loss(student, noise, sigma, linear(1), 3.0), 3 * one)
    each = fake_score_loss(student, noise, sigma, linear(1), torch.tensor([1.0, 0.0, 0.0]))
    alone = fake_score_loss(student[:1], noise[:1], sigma[:1], linear(1))
    torch.testing.assert_close(each, alone / 3)


def test_guidance():
    null, prompt = torch.zeros(2), torch.ones(2)
    assert classifier_free_guidance(null, prompt, 7.5).tolist() == [7.5, 7.5]
    assert classifier_free_guidance(null, prompt, 0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("jitter", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_trajectory(jitter, steps):
    levels = noise_levels(FLOW)
    sigmas = trajectory(3, 4000, steps=steps, jitter=jitter)
    assert sigmas.shape == (steps + 1, 4000)
    indices = torch.searchsorted(-levels, -sigmas.contiguous())
    assert torch.equal(levels[indices], sigmas)
    first, last = indices[0], indices[-1]
    assert (int(first.min()), int(first.max())) == (50, 949)
    span = last - first
    free = last < 999
    if jitter:
        assert span[free].min() == steps * 50 - 25 and span[free].max() == steps * 50 + 24
        assert abs(float(span[free].float().mean()) - (steps * 50 - 0.5)) < 2
    else:
        assert set(span[free].tolist()) == {steps * 50}
    assert last.max() == 999 and (sigmas[:-1] > sigmas[1:]).all()
    # Evenly spaced, rounded down.
    gaps = indices.diff(dim=0)
    assert (gaps.max(0).values - gaps.min(0).values).max() <= 1


def test_trajectory_is_seeded_and_wants_steps():
    assert torch.equal(trajectory(7), trajectory(7)) and not torch.equal(trajectory(7), trajectory(8))
    with pytest.raises(ValueError, match="at least 1"):
        trajectory(steps=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigmas": torch.rand(3)}, r"\(N \+ 1, B\)"),
        ({"sigmas": torch.rand(1, 3)}, r"\(N \+ 1, B\)"),
        ({"sigmas": torch.rand(5, 2)}, "B = 3"),
        ({"noise": torch.rand(3, 4, 5, 5)}, "one shape"),
        ({"sigmas": torch.rand(6, 3)}, "5 weights"),
    ],
)
def test_shapes_are_checked(batch, change, said):
    arguments = {"student_latents": batch[0], "hq_latents": batch[1], "noise": batch[2], "sigmas": trajectory()}
    with pytest.raises(ValueError, match=said):
        tsd_gradient(**{**arguments, **change}, teacher=linear(1), fake_score=linear(2))


def test_noise_levels_of_a_flow():
    levels = noise_levels(FLOW)
    assert len(levels) == 1000 and levels[0] == 1 and (levels[:-1] > levels[1:]).all()
    used = FlowMatchEulerDiscreteScheduler(shift=3.0)
    used.set_timesteps(4)
    assert torch.equal(noise_levels(used), levels)


# --- DDPM networks as velocities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_ddpm_network_is_a_velocity(batch, kind):
    """A network that knows noise and clean latents gives noise - clean at every level of the schedule."""
    from tsdsr.training.objectives import ddpm_velocity

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    clean, noise, _ = batch
    asked = []

    def predict(noisy, timestep):
        asked.append(timestep)
        torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timestep), rtol=1e-4, atol=1e-4)
        return noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, timestep)

    levels = noise_levels(scheduler)
    assert len(levels) == 1000 and (levels[:-1] > levels[1:]).all() and 0 < levels[-1] < levels[0] < 1
    sigma = levels[torch.tensor([0, 400, 999])]
    z = add_noise(clean, noise, sigma)
    velocity = ddpm_velocity(predict, scheduler)(z, sigma)
    assert asked[0].tolist() == [999, 599, 0]
    torch.testing.assert_close(velocity, noise - clean, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(clean_from_velocity(z, velocity, sigma), clean, rtol=1e-3, atol=2e-3)


def test_the_one_step_of_a_ddpm_student(batch):
    """Table 5's UNet students: (z - sqrt(1 - abar) eps) / sqrt(abar) at t = 999 is one Euler step to sigma 0."""
    from tsdsr.training.objectives import ddpm_velocity

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents = batch[0]

    def predict(noisy, timestep):
        return torch.tanh(noisy)

    cumulative = scheduler.alphas_cumprod[999]
    alpha, s = cumulative.sqrt(), (1 - cumulative).sqrt()
    expected = (latents - s * predict(latents, None)) / alpha
    sigma = noise_levels(scheduler)[:1].expand(3)
    z = latents / (alpha + s)
    found = clean_from_velocity(z, ddpm_velocity(predict, scheduler)(z, sigma), sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_other_predictions_are_refused():
    from tsdsr.training.objectives import ddpm_velocity

    with pytest.raises(ValueError, match="epsilon or v_prediction"):
        ddpm_velocity(lambda z, t: z, DDPMScheduler(prediction_type="sample"))

"""The student's losses: which are made, what they weigh, and which way they point."""

import dataclasses
import sys

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tsdsr.training.config import ConfigError, DistillConfig, Phase
from tsdsr.training.discriminators import PatchDiscriminator
from tsdsr.training.losses import (
    PIXEL_TERMS,
    Reconstruction,
    adversarial_terms,
    discriminator_terms,
    distillation,
    fake_score_term,
    high_frequency_distillation,
    lpips,
    noised,
)
from tsdsr.training.objectives import (
    EncoderFeatureDistance,
    add_noise,
    dasm_trajectory,
    draw_levels,
    draw_noise,
    frequency_l1,
    gradient_l1,
    grid_l1,
    hsd_gradient,
    latent_mse,
    noise_levels,
    pixel_l1,
    sds_gradient,
    tsd_gradient,
    tsd_loss,
)

CPU = torch.device("cpu")
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(**terms):
    phase = Phase(**{"latent_mse": [0.0], "tsd": [0.0], **{name: [weight] for name, weight in terms.items()}})
    return DistillConfig(
        pretrained_model_name_or_path="base", train_data_dir="x", max_train_steps=1, phases=[phase]
    ), phase


@pytest.fixture
def vae(make_pipeline):
    return make_pipeline("kl").vae


@pytest.fixture
def inputs():
    """Latents, those of HQ, a decoder and the HQ picture."""
    latents = torch.randn(2, 3, 8, 8, generator=generator(1), requires_grad=True)
    return latents, torch.randn(2, 3, 8, 8, generator=generator(2)), torch.randn(2, 3, 16, 16, generator=generator(3))


def double(latents):
    return torch.nn.functional.interpolate(latents, scale_factor=2)


def test_terms_are_those_that_are_asked_for(vae, inputs):
    latents, hq_latents, hq = inputs
    config, phase = settings(latent_mse=1, pixel_l1=1, gradient_l1=1, frequency_l1=1, grid_l1=1, encoder_features=1)
    config = dataclasses.replace(config, grid_period=4)
    output = double(latents)
    terms = Reconstruction(config, vae, CPU)(phase.weights(0), latents, hq_latents, output, hq)
    expected = {
        "latent_mse": latent_mse(latents, hq_latents),
        "pixel_l1": pixel_l1(output, hq),
        "gradient_l1": gradient_l1(output, hq),
        "frequency_l1": frequency_l1(output, hq),
        "grid_l1": grid_l1(output, hq, 4),
        "encoder_features": EncoderFeatureDistance(vae)(output, hq),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert len({float(value.detach()) for value in terms.values()}) == 6


def test_networks_of_terms_are_made_only_where_they_count(vae, monkeypatch):
    monkeypatch.setattr("tsdsr.training.losses.lpips", lambda device: pytest.fail("LPIPS was made"))
    monkeypatch.setattr("tsdsr.training.losses.EncoderFeatureDistance", lambda vae: pytest.fail("features were made"))
    Reconstruction(settings(latent_mse=1, pixel_l1=1)[0], vae, CPU)
    monkeypatch.setattr("tsdsr.training.losses.lpips", lambda device: lambda output, target: (output - target).sum())
    config, phase = settings(lpips=2)
    picture = torch.ones(1, 3, 4, 4)
    found = Reconstruction(config, vae, CPU)(phase.weights(0), picture, picture, 3 * picture, picture)
    assert found.keys() == {"lpips"} and found["lpips"] == 2 * 48


def test_without_pictures_only_latents_are_compared(vae, inputs):
    latents, hq_latents, hq = inputs
    config, phase = settings(latent_mse=1)
    assert Reconstruction(config, vae, CPU)(phase.weights(0), latents, hq_latents, None, hq).keys() == {"latent_mse"}


@pytest.mark.parametrize("name", ["latent_mse", *(name for name in PIXEL_TERMS if name != "lpips")])
def test_every_term_moves_the_latents(vae, inputs, name):
    """A small step against its gradient makes it smaller, and nothing flows into the VAE or the targets."""
    latents, hq_latents, hq = inputs
    config, phase = settings(**{name: 1})
    reconstruction = Reconstruction(config, vae, CPU)

    def value(at):
        return reconstruction(phase.weights(0), at, hq_latents, double(at), hq)[name]

    before = value(latents)
    before.backward()
    assert latents.grad.abs().sum() > 0
    with torch.no_grad():
        assert value(latents - 1e-2 * latents.grad / latents.grad.norm()) < before
    assert all(weight.grad is None for weight in vae.parameters())


def test_lpips_without_pyiqa(monkeypatch, vae):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ConfigError, match=r"lpips needs pyiqa.*pip install 'tsdsr\[eval\]', or use encoder_features"):
        Reconstruction(settings(lpips=1)[0], vae, CPU)


def test_lpips_without_its_weights(monkeypatch):
    def create_metric(name, **_):
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "pyiqa", type(sys)("pyiqa"))
    sys.modules["pyiqa"].create_metric = create_metric
    with pytest.raises(ConfigError, match=r"could not be fetched \(TimeoutError\)"):
        lpips(CPU)


def test_lpips_sees_pictures_in_0_1(monkeypatch):
    class Metric(torch.nn.Module):
        def forward(self, output, target):
            assert output.min() == 0 and output.max() == 1 and target.min() == 0.25
            return (output - target).flatten(1).mean(1)

    made = []
    monkeypatch.setitem(sys.modules, "pyiqa", type(sys)("pyiqa"))
    sys.modules["pyiqa"].create_metric = lambda name, **more: made.append((name, more)) or Metric()
    output, target = torch.tensor([-2.0, 2.0]).view(2, 1, 1, 1), torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1)
    assert float(lpips(CPU)(output, target)) == 0.0
    assert made == [("lpips", {"as_loss": True, "device": CPU})]


# --- a discriminator


@pytest.fixture
def judged():
    """A discriminator, a student's picture that wants a gradient, and a photograph."""
    torch.manual_seed(0)
    output, hq = (torch.rand(2, 3, 16, 16, generator=generator(seed)) * 2 - 1 for seed in (1, 2))
    return PatchDiscriminator(width=4, layers=2).eval(), output.requires_grad_(True), hq


def judging(**more):
    config, phase = settings(adversarial=1, feature_matching=1)
    return dataclasses.replace(config, **more), phase.weights(0)


def test_nothing_is_judged_without_its_terms(judged):
    _, output, hq = judged
    config, weights = judging()
    refuse = pytest.fail
    assert adversarial_terms(config, {"pixel_l1": 1.0}, refuse, output, hq) == {}
    assert adversarial_terms(config, weights, refuse, None, hq) == {}


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_the_student_is_told_what_would_fool_the_discriminator(judged, loss):
    """A step against each term's gradient: higher logits, and features closer to the photograph's."""
    discriminator, output, hq = judged
    config, weights = judging(adversarial_loss=loss)
    terms = adversarial_terms(config, weights, discriminator.judge, output, hq)
    assert terms.keys() == {"adversarial", "feature_matching"}
    *maps, before = discriminator.features(output)
    *wanted, real = discriminator.features(hq)
    expected = -before.mean() if loss == "hinge" else (1 + (real - before).exp()).log().mean()
    torch.testing.assert_close(terms["adversarial"], expected)
    distance = [(ours - theirs).abs().mean() for ours, theirs in zip(maps, wanted, strict=True)]
    torch.testing.assert_close(terms["feature_matching"], sum(distance) / len(distance))
    (gradient,) = torch.autograd.grad(terms["adversarial"], output, retain_graph=True)
    assert discriminator(output - 0.1 * gradient / gradient.norm()).mean() > before.mean()
    terms["feature_matching"].backward()
    moved = (output - 0.1 * output.grad / output.grad.norm()).detach()
    assert adversarial_terms(config, weights, discriminator.judge, moved, hq)["feature_matching"] < sum(distance) / 4
    assert all(weight.grad is None and weight.requires_grad for weight in discriminator.parameters())
    only = adversarial_terms(config, {"adversarial": 1.0}, discriminator.judge, output, hq)
    assert only.keys() == {"adversarial"}


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_the_discriminator_learns_to_tell_them_apart(judged, loss):
    discriminator, output, hq = judged
    config, _ = judging(adversarial_loss=loss)
    calls = []

    def judge(pictures):
        calls.append(pictures)
        return discriminator(pictures)

    terms = discriminator_terms(config, judge, output, hq)
    assert terms.keys() == {"discriminator"} and len(calls) == 1, "DDP sees one forward pass"
    real, fake = discriminator(hq), discriminator(output)
    expected = (1 - real).relu().mean() + (1 + fake).relu().mean()
    if loss == "relativistic":
        expected = (1 + (fake - real).exp()).log().mean()
    torch.testing.assert_close(terms["discriminator"], expected)
    terms["discriminator"].backward()
    assert output.grad is None
    with torch.no_grad():
        for weight in discriminator.parameters():
            weight -= 1e-2 * weight.grad
        assert (discriminator(hq) - discriminator(output)).mean() > (real - fake).mean()


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_pictures_that_count_nothing_are_not_judged(judged, loss):
    """The terms are those of all pictures weighed; where none counts, all is 0, without a gradient."""
    discriminator, output, hq = judged
    output, hq = (torch.cat([one, one.flip(3), -one]) for one in (output.detach(), hq))
    output.requires_grad_(True)
    config, weights = judging(adversarial_loss=loss)
    one_by_one = [
        adversarial_terms(config, weights, discriminator.judge, *pair)
        | discriminator_terms(config, discriminator, *pair)
        for pair in zip(output.split(1), hq.split(1), strict=True)
    ]
    counts = torch.linspace(0, 1, len(hq)).roll(1)
    counts[-1] = 0
    seen = []

    def judge(pictures):
        seen.append(len(pictures))
        return discriminator.judge(pictures)

    found = adversarial_terms(config, weights, judge, output, hq, counts)
    found |= discriminator_terms(config, discriminator, output, hq, counts=counts)
    assert set(seen) == {int((counts > 0).sum())}
    for name, value in found.items():
        expected = sum(float(count) * terms[name] for count, terms in zip(counts, one_by_one, strict=True)) / len(hq)
        torch.testing.assert_close(value, expected)
    nothing = adversarial_terms(config, weights, judge, output, hq, torch.zeros(len(hq)))
    nothing |= discriminator_terms(config, discriminator, output, hq, counts=torch.zeros(len(hq)))
    assert seen[-1] == 1 and all(value == 0 for value in nothing.values())
    sum(nothing.values()).backward()
    assert output.grad.abs().max() == 0 and all(weight.grad.abs().max() == 0 for weight in discriminator.parameters())


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_balanced_terms_pull_as_pixel_l1_does(judged, loss):
    """Each by itself; where half of the pictures count they are pulled as hard as they were among others that do."""
    discriminator, output, hq = judged
    config, weights = judging(adversarial_loss=loss)
    output = output.detach().requires_grad_()
    values = adversarial_terms(config, weights, discriminator.judge, output, hq)
    balanced = adversarial_terms(config, weights, discriminator.judge, output, hq, balance=True)
    assert values.keys() == balanced.keys() == {"adversarial", "feature_matching"}
    for name, value in balanced.items():
        torch.testing.assert_close(value, values[name])
        (plain,) = torch.autograd.grad(values[name], output, retain_graph=True)
        (pull,) = torch.autograd.grad(value, output, retain_graph=True)
        torch.testing.assert_close(pull.norm() * output.numel() ** 0.5, torch.tensor(1.0))
        torch.testing.assert_close(torch.cosine_similarity(pull.flatten(), plain.flatten(), 0), torch.tensor(1.0))
        twice = output.detach().repeat(2, 1, 1, 1).requires_grad_()
        counts = torch.arange(2.0).repeat_interleave(len(hq))
        both = adversarial_terms(
            config, weights, discriminator.judge, twice, hq.repeat(2, 1, 1, 1), counts, balance=True
        )
        (halves,) = torch.autograd.grad(both[name], twice)
        torch.testing.assert_close(2 * halves, torch.cat([torch.zeros_like(pull), pull]))


def test_r1_is_the_gradient_at_photographs(judged):
    """Half the squared gradient of the logits' sum over their number: of a linear discriminator by hand."""
    _, output, hq = judged
    kernel = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    config, _ = judging(r1_weight=1.0)
    terms = discriminator_terms(config, lambda x: torch.einsum("bchw,c->bhw", x, kernel)[:, None], output, hq)
    assert terms["r1"].item() == pytest.approx((1 + 4 + 9) / 2)
    (gradient,) = torch.autograd.grad(terms["r1"], kernel)
    torch.testing.assert_close(gradient, torch.tensor([1.0, -2.0, 3.0]))
    assert not hq.requires_grad


# --- score distillation


def towards(clean):
    """The velocity of a network that is sure of the clean latents: z = sigma * noise + (1 - sigma) * clean."""
    return lambda z, sigma: (z - clean) / sigma.view(-1, 1, 1, 1)


@pytest.fixture
def latents():
    return torch.randn(3, 4, 4, 4, generator=generator(4)), torch.randn(3, 4, 4, 4, generator=generator(5))


def curved(scale):
    return lambda z, sigma: torch.tanh(scale * z) + sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dasm_steps": 2, "dasm_spacing": 20},
        {"dasm_steps": 1, "dasm_jitter": False},
        {"vsd_weight": 0.2, "step_weights": [0.1, 0.2, 0.5, 0.9]},
    ],
)
@pytest.mark.parametrize("scheduler", [SCHEDULER, DDPMScheduler()], ids=["flow", "ddpm"])
def test_distillation_is_the_objective_with_its_draws(latents, more, scheduler):
    """The trajectory is drawn first, then the noise; the phase says how many points, their weights and lambda."""
    student, hq = latents
    student = student.requires_grad_(True)
    phase = Phase(**more)
    loss = distillation(phase, scheduler, student, hq, curved(1.0), curved(0.3), generator())
    (ours,) = torch.autograd.grad(loss, student)

    draws = generator()
    jitter = more.get("dasm_jitter", True)
    steps, spacing = more.get("dasm_steps", 4), more.get("dasm_spacing", 50)
    sigmas = dasm_trajectory(scheduler, 3, steps, spacing, jitter, generator=draws)
    noise = torch.randn(student.shape, generator=draws)
    weights = more.get("step_weights", (1.0, 0.3, 0.3, 0.3))
    lam = more.get("vsd_weight", 0.7)
    expected = tsd_gradient(student.detach(), hq, noise, sigmas, curved(1.0), curved(0.3), lam, weights)
    torch.testing.assert_close(loss, tsd_loss(student, expected.gradient), rtol=0, atol=0)
    # Over the number of elements, not of samples.
    torch.testing.assert_close(ours, expected.gradient / student.numel())
    mixed = lam * expected.vsd + (1 - lam) * expected.tsm
    torch.testing.assert_close(expected.gradient, mixed)
    assert ours.abs().sum() > 0


def test_following_it_moves_the_latents_towards_the_teachers_idea(latents):
    """VSD: psi holds that the clean latents are +1, phi that they are -1; a step downhill goes to +1."""
    student, hq = latents
    student = student.requires_grad_(True)
    one = torch.ones_like(student)
    loss = distillation(Phase(vsd_weight=1.0), SCHEDULER, student, hq, towards(one), towards(-one), generator())
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient < 0).all()
    moved = student - 1e-3 * gradient / gradient.norm()
    assert ((moved - one).abs().mean() < (student - one).abs().mean()) or (student > 1).any()
    assert ((moved - student) > 0).all()


def test_the_fake_score_alone_decides_nothing_where_lambda_is_0(latents):
    """TSM compares the teacher's two predictions; phi only leads from one level to the next."""
    student, hq = latents
    phase = Phase(vsd_weight=0.0, dasm_steps=1)
    losses = [
        distillation(phase, SCHEDULER, student, hq, curved(1.0), curved(scale), generator()) for scale in (0.1, 2.0)
    ]
    assert losses[0] == losses[1] > 0
    same = distillation(phase, SCHEDULER, hq, hq, curved(1.0), curved(0.1), generator())
    assert same == 0


def test_the_fake_score_learns_to_denoise_the_students_latents():
    """Equation 9 by hand, with the index, the weight and the noise that the generator gives in this order."""
    clean = torch.randn(3, 2, 4, 4, generator=generator(6), requires_grad=True)
    weight = torch.tensor(0.3, requires_grad=True)
    seen = []

    def phi(z, sigma):
        seen.append((z, sigma))
        return weight * z

    loss = fake_score_term(SCHEDULER, clean, phi, generator(7))
    draws = generator(7)
    indices = torch.randint(50, 950, (3,), generator=draws)
    m = torch.randn(3, generator=draws).sigmoid()
    noise = torch.randn(clean.shape, generator=draws)
    sigma = noise_levels(SCHEDULER)[indices]
    level = sigma.view(3, 1, 1, 1)
    noisy = level * noise + (1 - level) * clean.detach()
    each = (noisy - level * 0.3 * noisy - clean.detach()).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.detach(), (0.5 * m * each).mean())
    ((z, given),) = seen
    torch.testing.assert_close(z, noisy)
    assert torch.equal(given, sigma) and len(set(sigma.tolist())) == 3
    loss.backward()
    assert weight.grad != 0 and clean.grad is None


def test_a_perfect_fake_score_has_no_loss():
    clean = torch.randn(2, 2, 4, 4, generator=generator(8))
    assert fake_score_term(SCHEDULER, clean, towards(clean), generator()) < 1e-10
    assert fake_score_term(SCHEDULER, clean, towards(-clean), generator()) > 0.1


@pytest.mark.parametrize(
    ("share", "noise", "target"),
    [(0.2, "gaussian", True), (0.2, "gaussian", False), (1.0, "gaussian", True), (0.2, "uniform", True)],
)
@pytest.mark.parametrize("scheduler", [SCHEDULER, DDPMScheduler()], ids=["flow", "ddpm"])
def test_high_frequency_distillation_is_the_objective_with_its_draws(latents, share, noise, target, scheduler):
    """Its gradient in the latents is g over the number of elements; without a target it is SDS."""
    student, hq = latents
    student = student.clone().requires_grad_()
    options = {} if (share, noise) == (0.2, "gaussian") else {"share": share, "noise": noise}
    found = high_frequency_distillation(
        scheduler, student, hq if target else None, curved(0.5), generator(7), **options
    )
    drawn = generator(7)
    sigma = draw_levels(scheduler, len(student), share, drawn)
    noise = draw_noise(student.shape, drawn, noise)
    if target:
        expected = hsd_gradient(student.detach(), hq, noise, sigma, curved(0.5))
    else:
        expected = sds_gradient(student.detach(), noise, sigma, curved(0.5))
    (gradient,) = torch.autograd.grad(found, student)
    assert expected.any()
    torch.testing.assert_close(gradient, expected / student.numel())
    torch.testing.assert_close(found, 0.5 * expected.square().mean())


def test_real_and_made_latents_are_judged_under_the_same_noise():
    """Each sample has a level and noise of its own, and its own is found again in a batch of both."""
    real, made = torch.randn(2, 3, 4, 6, 5, generator=generator(1))
    seen = []

    def judge(noisy, sigma):
        seen.append((noisy, sigma))
        return noisy.mean(dim=(1, 2, 3))

    judging = noised(judge, SCHEDULER, real.shape, generator(2), CPU, share=0.5)
    both, alone, again = judging(torch.cat([real, made])), judging(made), judging(made)
    assert torch.equal(both[3:], alone) and torch.equal(alone, again)
    drawn = generator(2)
    sigma = draw_levels(SCHEDULER, 3, 0.5, drawn)
    noise = draw_noise(real.shape, drawn)
    assert sigma.unique().numel() == 3
    (noisy, levels), (other, level), _ = seen
    assert torch.equal(levels, torch.cat([sigma, sigma])) and torch.equal(level, sigma)
    torch.testing.assert_close(noisy[:3], add_noise(real, noise, sigma))
    torch.testing.assert_close(other, add_noise(made, noise, sigma))
    uniform = noised(judge, SCHEDULER, real.shape, generator(2), CPU, noise="uniform")
    uniform(torch.zeros_like(real))
    assert seen[-1][0].min() >= 0 and seen[-1][1].max() <= noise_levels(SCHEDULER)[100]


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_noisy_latents_are_judged_as_pictures_are(loss):
    config, _ = settings(adversarial=1)
    config.adversarial_loss = loss
    real, made = torch.randn(2, 2, 4, 4, 4, generator=generator(1))
    made.requires_grad_()
    judging = noised(lambda z, sigma: [z.mean(dim=(1, 2, 3))], SCHEDULER, real.shape, generator(2), CPU)
    terms = adversarial_terms(config, {"adversarial": 1.0}, judging, made, real)
    (gradient,) = torch.autograd.grad(terms["adversarial"], made)
    assert (gradient < 0).all()  # more of it looks more real
    found = discriminator_terms(config, lambda z: judging(z)[-1], made, real)["discriminator"]
    votes, theirs = judging(real)[-1], judging(made.detach())[-1]
    hinge = (1 - votes).relu().mean() + (1 + theirs).relu().mean()
    torch.testing.assert_close(found, hinge if loss == "hinge" else torch.nn.functional.softplus(theirs - votes).mean())

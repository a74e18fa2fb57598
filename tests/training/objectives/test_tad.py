"""High-frequency score distillation against closed forms: teachers that know a Gaussian, in each parametrisation."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tsdsr.training.objectives import (
    ResidualShift,
    add_noise,
    ddpm_velocity,
    draw_levels,
    draw_noise,
    hsd_gradient,
    noise_levels,
    residual_velocity,
    sds_gradient,
    tsd_loss,
)
from tsdsr.training.objectives.tad import JUDGED_SHARE

FAMILIES = ("flow", "epsilon", "v_prediction", "residual")
SIZES = ((1, 1, 1), (2, 3, 1), (4, 4, 4))


class Gaussian:
    """Clean latents N(mean, covariance) over all of their elements; float64."""

    def __init__(self, shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        size = shape[0] * shape[1] * shape[2]
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        self.covariance = mixing @ mixing.T + 0.05 * torch.eye(size, dtype=torch.float64)
        self.mean = torch.randn(size, generator=generator, dtype=torch.float64)

    def spread(self, alpha, s):
        """Of alpha * clean + s * noise; alpha and s (B,)."""
        return alpha.view(-1, 1, 1) ** 2 * self.covariance + s.view(-1, 1, 1) ** 2 * torch.eye(len(self.mean)).double()

    def guess(self, noisy, alpha, s):
        """E[clean | noisy] and E[noise | noisy], of noisy's shape."""
        alpha, s = alpha.double(), s.double()
        away = noisy.double().flatten(1) - alpha[:, None] * self.mean
        solved = torch.linalg.solve(self.spread(alpha, s), away[..., None])[..., 0]
        clean = self.mean + alpha[:, None] * (solved @ self.covariance)
        return clean.view(noisy.shape), (s[:, None] * solved).view(noisy.shape)


class Case:
    """A family's own process x_t = alpha z + s noise + shift, and the teacher that knows a Gaussian in it."""

    def __init__(self, name, shape, batch=3):
        self.gaussian, generator = Gaussian(shape), torch.Generator().manual_seed(1)
        draw = torch.randn(4, batch, *shape, generator=generator)
        self.student, self.target, self.noise, self.lq = draw
        if name == "flow":
            self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        elif name == "residual":
            self.scheduler = ResidualShift()
        else:
            betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
            self.scheduler = DDPMScheduler(**betas, prediction_type=name)
        self.name, self.levels = name, noise_levels(self.scheduler)
        last = len(self.levels) - 1
        # Of each sample another timestep, the first the least noisy.
        self.timesteps = torch.tensor([0, round(0.1 * last), round(0.2 * last)])
        self.sigma = self.levels[last - self.timesteps]

    def process(self):
        """alpha, s and c of the timesteps, (B,), from the family's own formulas; and what x_t is shifted by."""
        if self.name == "flow":
            sigma = self.sigma.double()
            return 1 - sigma, sigma, (1 - sigma) / sigma, 0
        if self.name == "residual":
            eta, kappa = self.scheduler.etas[self.timesteps], self.scheduler.config.kappa
            shift = eta.view(-1, 1, 1, 1) * self.lq
            return 1 - eta, kappa * eta.sqrt(), (1 - eta) / (kappa * eta.sqrt()), shift
        cumulative = self.scheduler.alphas_cumprod.double()[self.timesteps]
        return cumulative.sqrt(), (1 - cumulative).sqrt(), (cumulative / (1 - cumulative)).sqrt(), 0

    def velocity(self, z, sigma):
        """The teacher, through what makes velocities of its own prediction."""
        if self.name == "flow":
            clean, noise = self.gaussian.guess(z, 1 - sigma, sigma)
            return (noise - clean).float()

        def predict(noisy, timestep):
            if self.name == "residual":
                eta, kappa = self.scheduler.etas[timestep].view(-1, 1, 1, 1), self.scheduler.config.kappa
                x = noisy * (kappa**2 * eta + 1).sqrt() - eta * self.lq
                eta = eta.flatten()
                return self.gaussian.guess(x, 1 - eta, kappa * eta.sqrt())[0].float()
            cumulative = self.scheduler.alphas_cumprod.double()[timestep]
            alpha, s = cumulative.sqrt(), (1 - cumulative).sqrt()
            clean, noise = self.gaussian.guess(noisy, alpha, s)
            wide = (-1, 1, 1, 1)
            return (noise if self.name == "epsilon" else alpha.view(wide) * noise - s.view(wide) * clean).float()

        make = residual_velocity if self.name == "residual" else ddpm_velocity
        return make(predict, self.scheduler, *([self.lq] if self.name == "residual" else []))(z, sigma)

    def wrong(self, clean):
        """c (z - x) in the family's own process."""
        alpha, s, c, _ = self.process()
        wide = (-1, 1, 1, 1)
        noisy = alpha.view(wide) * clean + s.view(wide) * self.noise  # what it is shifted by, the teacher takes away
        guessed, _ = self.gaussian.guess(noisy, alpha, s)
        return c.view(wide) * (clean - guessed)


@pytest.fixture(params=[(name, shape) for name in FAMILIES for shape in SIZES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    return Case(*request.param)


def close(ours, expected):
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_equation(case):
    """g = c_t [(z^ - x^) - (z* - x*)], c_t and x in each family's own scale."""
    found = hsd_gradient(case.student, case.target, case.noise, case.sigma, case.velocity)
    close(found, case.wrong(case.student) - case.wrong(case.target))
    close(sds_gradient(case.student, case.noise, case.sigma, case.velocity), case.wrong(case.student))


def test_the_gradient_is_the_gaussians(case):
    """alpha s (alpha^2 covariance + s^2)^-1 (z^ - z*): whatever the noise."""
    alpha, s, _, _ = case.process()
    away = (case.student - case.target).double().flatten(1)[..., None]
    solved = torch.linalg.solve(case.gaussian.spread(alpha, s), away)[..., 0]
    expected = ((alpha * s)[:, None] * solved).view(case.student.shape)
    close(hsd_gradient(case.student, case.target, case.noise, case.sigma, case.velocity), expected)


@pytest.mark.parametrize("name", ["flow", "residual"])
def test_where_descending_leads(name):
    """HSD to the target, SDS to where the teacher's density is highest."""
    case = Case(name, (2, 3, 1))
    everywhere = noise_levels(case.scheduler)
    case.timesteps = torch.full((3,), len(everywhere) // 3)
    case.sigma = everywhere[len(everywhere) - 1 - case.timesteps]
    generator = torch.Generator().manual_seed(2)
    sharp, smooth = (case.student.clone().requires_grad_() for _ in range(2))
    for _ in range(40):
        noise = torch.randn(case.student.shape, generator=generator)
        sds = [sds_gradient(smooth.detach(), drawn, case.sigma, case.velocity) for drawn in (noise, -noise)]
        tsd_loss(smooth, sum(sds) / 2).backward()  # as it is on average
        hsd = hsd_gradient(sharp.detach(), case.target, noise, case.sigma, case.velocity)
        tsd_loss(sharp, hsd).backward()
        for latents in (sharp, smooth):
            with torch.no_grad():
                latents -= latents.numel() * latents.grad
            latents.grad = None
    mean = case.gaussian.mean.view(case.student.shape[1:]).expand_as(smooth)
    for latents, wanted in ((sharp, case.target), (smooth, mean)):
        assert (latents.detach() - wanted).norm() < 0.3 * (case.student - wanted).norm()


def test_both_sides_share_noise_and_level():
    case, seen = Case("flow", (2, 4, 4)), []

    def teacher(z, sigma):
        seen.append((z, sigma))
        return case.velocity(z, sigma)

    hsd_gradient(case.student, case.target, case.noise, case.sigma, teacher)
    (student, at), (target, there) = seen
    assert torch.equal(at, case.sigma) and torch.equal(there, case.sigma)
    assert torch.equal(student, add_noise(case.student, case.noise, case.sigma))
    assert torch.equal(target, add_noise(case.target, case.noise, case.sigma))
    same = hsd_gradient(case.target, case.target, case.noise, case.sigma, case.velocity)
    assert not same.any()


def test_no_digits_are_lost_at_the_lowest_level():
    """c is 999 there, and float32 has seven digits."""
    case = Case("flow", (4, 4, 4))
    case.scheduler = FlowMatchEulerDiscreteScheduler()
    case.sigma = noise_levels(case.scheduler)[[-1, -1, -1]]
    assert case.process()[2][0] == pytest.approx(999, rel=1e-3)
    expected = case.wrong(case.student) - case.wrong(case.target)
    found = hsd_gradient(case.student, case.target, case.noise, case.sigma, case.velocity)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_flows_out_of_it_and_what_is_not_finite_counts_as_nothing():
    case = Case("flow", (1, 2, 2))
    calls = []

    def teacher(z, sigma):
        calls.append(torch.is_grad_enabled())
        v = case.velocity(z, sigma)
        v[0] = float("nan") if len(calls) == 1 else v[0]
        v[1] = float("inf")
        return v

    found = hsd_gradient(case.student.requires_grad_(), case.target, case.noise, case.sigma, teacher)
    assert calls == [False, False] and not found.requires_grad
    assert not found[:2].any() and found[2].all()
    assert not sds_gradient(case.student, case.noise, case.sigma, teacher)[1].any()
    half = hsd_gradient(case.student.bfloat16(), case.target.bfloat16(), case.noise, case.sigma, case.velocity)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_levels_are_of_the_least_noisy_part(name, share):
    """All of its indices, each as likely, and no other."""
    scheduler = Case(name, (1, 1, 1)).scheduler
    lowest = noise_levels(scheduler).sort().values[: round(share * len(noise_levels(scheduler)))]
    drawn = draw_levels(scheduler, 9000, share, torch.Generator().manual_seed(0))
    assert torch.isin(drawn, lowest).all()
    counts = torch.bucketize(drawn, lowest[:: max(1, len(lowest) // 5)], right=True).bincount()[1:]
    assert counts.min() > 0.75 * counts[:-1].max()
    assert torch.equal(drawn, draw_levels(scheduler, 9000, share, torch.Generator().manual_seed(0)))


def test_published_levels():
    """Timesteps 0, 1 and 2 of 15, without being told to."""
    schedule = ResidualShift()
    eta = schedule.etas[:3]
    s = 2 * eta.sqrt()
    torch.testing.assert_close(draw_levels(schedule, 200).unique().double(), s / (1 - eta + s), rtol=1e-6, atol=0)
    judged = draw_levels(schedule, 2000, JUDGED_SHARE).unique()  # 0..13
    assert torch.equal(judged, noise_levels(schedule)[1:].flip(0))
    assert draw_levels(schedule, 20, share=0.001).unique().numel() == 1
    assert draw_levels(FlowMatchEulerDiscreteScheduler(), 2000).max() <= 0.2


def test_noise():
    generator = torch.Generator().manual_seed(0)
    gaussian, uniform = (draw_noise((2, 4, 64, 64), generator, kind) for kind in ("gaussian", "uniform"))
    assert gaussian.mean().abs() < 0.02 and gaussian.std() == pytest.approx(1, abs=0.02)
    assert uniform.min() >= 0 and uniform.max() < 1 and uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(
        draw_noise((3, 1, 2, 2), torch.Generator().manual_seed(4)),
        torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(4)),
    )


def test_what_cannot_be_used(one_sentence):
    case = Case("flow", (1, 2, 2))
    for share in (0, 1.5):
        with pytest.raises(ValueError) as error:
            draw_levels(case.scheduler, 2, share)
        one_sentence(error.value, "share", f"{share:g}")
    with pytest.raises(ValueError) as error:
        draw_noise((1, 1, 1, 1), kind="rand_like")
    one_sentence(error.value, "gaussian, uniform", "'rand_like'")
    for target, sigma in ((case.target[:, :, :1], case.sigma), (case.target, case.sigma[:2])):
        with pytest.raises(ValueError) as error:
            hsd_gradient(case.student, target, case.noise, sigma, case.velocity)
        one_sentence(error.value, "one shape")

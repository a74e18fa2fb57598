"""Residual shifting against its own formulas: schedule, velocity, deterministic sampler."""

import pytest
import torch

from tsdsr.training.objectives import ResidualShift, add_noise, clean_from_velocity, noise_levels, residual_velocity
from tsdsr.training.sampling import restore_latents, trajectory

# Of the released 15-step models, to the digits printed.
SQRT_ETAS = [0.02, 0.1172, 0.1763, 0.2336, 0.2916, 0.351, 0.4124, 0.4759, 0.5417, 0.6099, 0.6807, 0.754, 0.83, 0.9086]
SPREADS = {0: 1.0008, 1: 1.0271, 2: 1.0603, 7: 1.3805, 14: 2.2182}


@pytest.fixture
def latents():
    """Clean ones, LQ ones and noise, (2, 3, 4, 4) each."""
    return torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def rough(y):
    """A network (x / spread, t) -> clean that depends on all it is given."""
    return lambda x, t: torch.tanh(x + 0.3 * y) * (1 + 0.05 * t.view(-1, 1, 1, 1))


def test_the_released_schedule():
    schedule = ResidualShift()
    expected = torch.tensor([*SQRT_ETAS, 0.99], dtype=torch.float64)
    torch.testing.assert_close(schedule.etas.sqrt(), expected, rtol=0, atol=5.1e-5)
    for timestep, spread in SPREADS.items():
        assert float((4 * schedule.etas[timestep] + 1).sqrt()) == pytest.approx(spread, abs=5.1e-5)
    levels = noise_levels(schedule)
    assert levels.shape == (15,) and (levels.diff() < 0).all()
    assert levels[0] == pytest.approx(1.98 / (0.0199 + 1.98), rel=1e-6)
    assert torch.equal(trajectory(schedule, 15), schedule.sigmas)


def test_it_is_a_scheduler_that_can_be_saved(tmp_path):
    ResidualShift(num_train_timesteps=4, kappa=1.0, power=0.5).save_pretrained(tmp_path)
    found = ResidualShift.from_pretrained(tmp_path)
    assert found.config.num_train_timesteps == 4 and found.config.kappa == 1.0
    first = 0.001**0.5  # where 0.04 / kappa is more
    expected = first * (0.99 / first) ** (torch.arange(4).double() / 3).sqrt()
    torch.testing.assert_close(found.etas, expected.square())


@pytest.mark.parametrize("t", [0, 2, 9, 14])
def test_the_velocity_is_the_networks(t, latents):
    """noise - clean, where clean is what the network says of scaled x_t, and noise what is left of x_t."""
    z, y, noise = latents
    schedule, seen = ResidualShift(), []

    def predict(x, timestep):
        seen.append((x, timestep))
        return rough(y)(x, timestep)

    eta = schedule.etas[t].float()
    x = z + eta * (y - z) + 2 * eta.sqrt() * noise
    sigma = noise_levels(schedule)[14 - t].expand(2)
    flow = add_noise(z, noise, sigma)
    found = residual_velocity(predict, schedule, y)(flow, sigma)
    ((given, at),) = seen
    torch.testing.assert_close(given, x / (4 * eta + 1).sqrt(), rtol=1e-4, atol=1e-5)
    assert at.tolist() == [t, t]
    clean = rough(y)(given, at)
    left = (x - clean - eta * (y - clean)) / (2 * eta.sqrt())
    torch.testing.assert_close(found, left - clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(clean_from_velocity(flow, found, sigma), clean, rtol=1e-4, atol=1e-4)


def test_the_deterministic_sampler(latents):
    """z_{t-1} = k clean + m z_t + j y from the prior y + kappa sqrt(eta) noise, with SinSR's coefficients."""
    _, y, _ = latents
    schedule = ResidualShift()
    etas = schedule.etas.float()
    levels = noise_levels(schedule)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    x = y + 2 * etas[-1].sqrt() * noise
    for t in range(14, -1, -1):
        clean = rough(y)(x / (4 * etas[t] + 1).sqrt(), torch.tensor([t, t]))
        before = etas[t - 1] if t else torch.tensor(0.0)
        m = (before / etas[t]).sqrt()
        j = before - (before * etas[t]).sqrt()
        k = 1 - before + (before * etas[t]).sqrt() - m
        x = k * clean + m * x + j * y
    generator = torch.Generator().manual_seed(3)
    velocity = residual_velocity(rough(y), schedule, y)
    found = restore_latents(velocity, schedule, y, generator, 15, "euler", float(levels[0]))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "values", [{"num_train_timesteps": 1}, {"kappa": 0.0}, {"power": -1.0}, {"etas_end": 0.01}, {"etas_end": 1.5}]
)
def test_schedules_that_do_not_rise(values, one_sentence):
    with pytest.raises(ValueError) as error:
        ResidualShift(**values)
    one_sentence(error.value)

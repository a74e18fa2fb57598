"""The two sides of an adversarial loss, in closed form."""

import math

import pytest
import torch

from tsdsr.training.objectives import (
    evidence,
    feature_matching,
    hinge_discriminator_loss,
    hinge_student_loss,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_student_loss,
)
from tsdsr.training.objectives.adversarial import gaussian_blur

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])


def test_hinge():
    assert hinge_discriminator_loss(REAL, FAKE).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3)
    assert hinge_student_loss(FAKE).item() == pytest.approx(2.5 / 3)


def test_relativistic():
    pairs = list(zip(REAL.tolist(), FAKE.tolist(), strict=True))
    expected = sum(math.log1p(math.exp(fake - real)) for real, fake in pairs) / 3
    assert relativistic_discriminator_loss(REAL, FAKE).item() == pytest.approx(expected)
    expected = sum(math.log1p(math.exp(real - fake)) for real, fake in pairs) / 3
    assert relativistic_student_loss(REAL, FAKE).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "sides"),
    [
        (hinge_discriminator_loss, 2),
        (hinge_student_loss, 1),
        (relativistic_discriminator_loss, 2),
        (relativistic_student_loss, 2),
    ],
)
def test_how_much_pictures_count(loss, sides):
    """Counts weigh pictures one by one; the sum is over as many pictures, so that ones change nothing."""
    maps = torch.randn(sides, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    each = torch.stack([loss(*maps[:, i]) for i in range(3)])
    counts = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(loss(*maps, counts), (each * counts).sum() / 3)
    torch.testing.assert_close(loss(*maps, torch.ones(3)), loss(*maps))


def test_evidence_is_a_psnr_of_small_pictures():
    """An offset of 2 * 10^(-dB / 20) has that PSNR at every size; detail that small pictures lose has none."""
    hq = torch.zeros(5, 3, 16, 24)
    for i, psnr in enumerate((20.0, 26.0, 28.5, 31.0, 40.0)):
        hq[i] += 2 * 10 ** (-psnr / 20)
    found = evidence(torch.zeros_like(hq), hq, 4, 26.0, 31.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 3, 16, 32)
    assert evidence(torch.zeros_like(stripes), stripes, 4, 26.0, 31.0) == 1
    assert evidence(stripes, torch.zeros_like(stripes), 1, 26.0, 31.0) == 0


def test_blur_is_no_want_of_evidence_and_noise_is():
    generator = torch.Generator().manual_seed(0)
    hq = gaussian_blur(torch.randn(1, 3, 32, 32, generator=generator), 0.7)
    noise = 2 * 10 ** (-28.5 / 20) * torch.randn(hq.shape, generator=generator)
    changed = [gaussian_blur(hq, sigma) for sigma in (0.0, 0.5, 0.8, 1.5)]
    changed.append(1.8 * hq - 0.8 * gaussian_blur(hq, 1.0))  # sharpened
    for one in changed:
        assert evidence(one, hq, 1, 30.0, 40.0) == 1
        assert evidence(one + noise, hq, 1, 26.0, 31.0).item() == pytest.approx(0.5, abs=0.1)
    assert evidence(hq + 0.1, hq, 1, 30.0, 40.0) == 0, "another colour is neither"


def test_gaussian_blur():
    """An impulse spreads as far as sigma says and keeps its sum; flat pictures stay, up to their edges."""
    impulse = torch.zeros(1, 2, 21, 21, dtype=torch.float64)
    impulse[0, 0, 10, 10] = 1
    spread = gaussian_blur(impulse, 1.5)
    places = torch.arange(21.0) - 10
    assert spread.sum().item() == pytest.approx(1) and spread[0, 1].abs().max() == 0
    for rows in (spread[0, 0].sum(0), spread[0, 0].sum(1)):
        assert (rows * places**2).sum().item() == pytest.approx(1.5**2, rel=0.03)
    flat = torch.full((1, 3, 5, 7), 0.25)
    torch.testing.assert_close(gaussian_blur(flat, 0.9), flat)
    assert gaussian_blur(flat, 0) is flat


def test_r1_of_a_quadratic():
    """Logits a x^2: gradient 2 a x at every pixel, whatever the number of pixels; the penalty itself has one to a."""
    a = torch.tensor(3.0, requires_grad=True)
    for side in (4, 8):
        pictures = torch.full((2, 1, side, side), 0.5, requires_grad=True)
        penalty = r1_penalty(a * pictures.square(), pictures)
        assert penalty.item() == pytest.approx((2 * 3 * 0.5) ** 2 / 2)
        (gradient,) = torch.autograd.grad(penalty, a)
        assert gradient.item() == pytest.approx(3.0)


def test_feature_matching_is_a_mean_over_maps():
    ours, theirs = (
        [torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 2, 2)],
        [torch.ones(1, 2, 4, 4), -torch.ones(1, 8, 2, 2) * 2],
    )
    assert feature_matching(ours, theirs).item() == pytest.approx(1.5)
    assert feature_matching(ours, ours) == 0

"""The two sides of an adversarial loss, in closed form."""

import math

import pytest
import torch

from tsdsr.training.objectives import (
    balanced,
    feature_matching,
    hinge_discriminator_loss,
    hinge_student_loss,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_student_loss,
)

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


@pytest.mark.parametrize("steep", [1e-4, 1.0, 1e4])
def test_a_balanced_gradient_is_as_large_as_that_of_the_absolute_error(steep):
    """However steep the judge is; direction and value stay; what it judges with gets none."""
    generator = torch.Generator().manual_seed(0)
    output, wanted, judge = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3))
    output, judge = output.requires_grad_(), judge.requires_grad_()
    (expected,) = torch.autograd.grad((output - wanted).abs().mean(), output)
    seen = output.detach().requires_grad_()
    loss = balanced((steep * judge * seen).sum(), seen, 1.0 * output, 0.5)
    assert loss.item() == pytest.approx((steep * judge * output).sum().item(), rel=1e-4)
    loss.backward()
    assert output.grad.norm().item() == pytest.approx(0.5 * expected.norm().item())
    assert torch.cosine_similarity(output.grad.flatten(), judge.detach().flatten(), 0).item() == pytest.approx(
        1, abs=1e-5
    )
    assert judge.grad is None


def test_a_balanced_gradient_of_nothing_is_nothing():
    output = torch.ones(1, 3, 4, 4, requires_grad=True)
    seen = output.detach().requires_grad_()
    balanced((0 * seen).sum(), seen, output).backward()
    assert (output.grad == 0).all()

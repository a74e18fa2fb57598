"""Networks that tell photographs from a student's pictures."""

import copy

import pytest
import torch

from tsdsr.training.discriminators import PatchDiscriminator


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return PatchDiscriminator(width=4, layers=2)


def convolutions(discriminator):
    return [module for module in discriminator.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize(("width", "layers", "widest"), [(4, 1, 8), (4, 3, 32), (2, 5, 16)])
def test_one_logit_for_a_patch(width, layers, widest):
    found = PatchDiscriminator(width, layers).eval()
    pictures = torch.zeros(2, 3, 64, 32)
    assert found(pictures).shape == (2, 1, 64 // 2**layers, 32 // 2**layers)
    *maps, logits = found.features(pictures)
    assert len(maps) == layers + 2 and torch.equal(logits, found(pictures))
    assert max(one.shape[1] for one in maps) == widest
    assert [one.shape[-1] for one in maps] == [*(32 // 2**i for i in range(layers + 1)), 32 // 2**layers]


def test_the_layers_of_the_first_embedded_model():
    """Its recipe has to find what it was trained with: widths, and which layers are normalised."""
    shapes = [tuple(layer.weight.shape) for layer in convolutions(PatchDiscriminator())]
    wide = [(64, 32, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (128, 256, 3, 3)]
    assert shapes == [(32, 3, 3, 3), *wide, (1, 128, 3, 3)]
    normalised = [hasattr(layer, "parametrizations") for layer in convolutions(PatchDiscriminator())]
    assert normalised == [False, True, True, True, True, False]


def test_who_is_judged_cannot_move_it(discriminator):
    pictures = torch.rand(1, 3, 16, 16, requires_grad=True)
    maps = discriminator.eval().judge(pictures)
    assert torch.equal(maps[-1], discriminator(pictures))
    sum(one.sum() for one in maps).backward()
    assert pictures.grad.abs().sum() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in discriminator.parameters())


def test_norms_are_renewed_when_they_are_told_to(discriminator):
    """In eval mode a call changes nothing; `renew_norms` gets closer to the true norm, which is divided by."""
    discriminator.eval()
    state = copy.deepcopy(discriminator.state_dict())
    for _ in range(3):
        discriminator(torch.rand(1, 3, 16, 16))
    assert all(torch.equal(tensor, state[name]) for name, tensor in discriminator.state_dict().items())
    layer = convolutions(discriminator)[1]
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.5 * torch.randn_like(layer.weight))

    def error():
        return abs(float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) - 1)

    before = error()
    discriminator.renew_norms()
    assert error() < before > 1e-3 and not discriminator.training
    for _ in range(50):
        discriminator.renew_norms()
    assert error() < 1e-3

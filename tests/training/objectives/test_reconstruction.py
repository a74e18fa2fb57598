"""Terms that pull a picture, or its latents, towards the HQ one."""

from functools import partial

import pytest
import torch

from tsdsr.training.objectives import (
    EncoderFeatureDistance,
    frequency_l1,
    gradient_l1,
    grid_l1,
    latent_mse,
    pixel_l1,
)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2)]


@pytest.mark.parametrize("term", [latent_mse, pixel_l1, gradient_l1, frequency_l1, partial(grid_l1, period=8)])
def test_terms(pair, term):
    output, target = pair
    assert term(target, target) == 0 < term(output, target)
    moved = output.clone().requires_grad_(True)
    term(moved, target).backward()
    assert term(output - 1e-2 * moved.grad / moved.grad.norm(), target) < term(output, target)


def test_means_are_over_all_elements():
    a, b = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 3.0)
    assert (latent_mse(a, b), pixel_l1(a, b), gradient_l1(a, b)) == (9.0, 3.0, 0.0)


def test_a_grid_is_what_all_patches_share(pair):
    """A pattern of the period counts as it is, whatever is under it; colours, other periods and detail count little."""
    _, target = pair
    pattern = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    pattern -= pattern.mean((2, 3), keepdim=True)
    grid = pattern.repeat(1, 1, 4, 4)
    assert grid_l1(target + grid, target, 8).item() == pytest.approx(pattern.abs().mean().item(), rel=1e-5)
    cut = grid_l1((target + grid)[..., :30, :27], target[..., :30, :27], 8)
    assert cut.item() == pytest.approx(pattern.abs().mean().item(), rel=1e-5), "at any size"
    assert grid_l1(target + 0.5, target, 8).item() == pytest.approx(0, abs=1e-6)
    even = torch.zeros_like(target)
    turned = torch.cat([grid[..., :16, :], -grid[..., 16:, :]], dim=2)
    assert grid_l1(even + turned, even, 8).item() == pytest.approx(0, abs=1e-6)
    large = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    assert grid_l1(large, torch.zeros_like(large), 8) < 0.05 * pixel_l1(large, torch.zeros_like(large))


def test_a_grid_on_flat_parts_counts_most():
    """Half of the picture is flat and has a grid of two levels, the other is wrong by far more, without a grid."""
    draw = torch.Generator().manual_seed(0)
    target = torch.zeros(1, 3, 64, 128)
    target[..., 64:] = torch.rand(1, 3, 64, 64, generator=draw) * 2 - 1
    grid = torch.zeros(1, 3, 8, 8)
    grid[..., 0] = 4 / 255
    output = target.clone()
    output[..., :64] += grid.repeat(1, 1, 8, 8)
    output[..., 64:] += (torch.rand(1, 3, 64, 64, generator=draw) - 0.5) * 80 / 255
    alone = (grid - grid.mean()).abs().mean().item()
    assert grid_l1(output, target, 8).item() == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_distance_in_the_features_of_an_encoder(make_pipeline, pair, kind):
    vae = make_pipeline(vae=kind).vae
    distance = EncoderFeatureDistance(vae)
    output, target = pair
    assert len(distance.features(target)) == len(
        vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    )
    assert distance(target, target) == 0 < distance(output, target)
    moved = output.clone().requires_grad_(True)
    distance(moved, target).backward()
    better = output - 0.5 * moved.grad / moved.grad.norm()
    assert distance(better, target) < distance(output, target)
    assert not any(weight.requires_grad for weight in distance.parameters())


def test_the_yardstick_stays_when_the_vae_is_trained(make_pipeline, pair):
    vae = make_pipeline(vae="kl").vae
    distance = EncoderFeatureDistance(vae)
    before = distance(*pair)
    for weight in vae.parameters():
        weight.data += 1
    assert torch.equal(distance(*pair), before)


def test_detail_counts_more_than_a_shift_of_brightness(make_pipeline):
    """What pixel distances cannot tell: blur against a small change of brightness of the same pixel distance."""
    from tsdsr import load_pipeline

    distance = EncoderFeatureDistance(load_pipeline(device="cpu").vae)
    target = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) - 0.5
    blurred = torch.nn.functional.avg_pool2d(target, 3, 1, 1)
    brighter = target + pixel_l1(blurred, target)
    assert distance(blurred, target) > distance(brighter, target)

"""Terms that pull a picture, or its latents, towards the HQ one."""

import pytest
import torch

from tsdsr.training.objectives import EncoderFeatureDistance, frequency_l1, gradient_l1, latent_mse, pixel_l1


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2)]


@pytest.mark.parametrize("term", [latent_mse, pixel_l1, gradient_l1, frequency_l1])
def test_terms(pair, term):
    output, target = pair
    assert term(target, target) == 0 < term(output, target)
    moved = output.clone().requires_grad_(True)
    term(moved, target).backward()
    assert term(output - 1e-2 * moved.grad / moved.grad.norm(), target) < term(output, target)


def test_means_are_over_all_elements():
    a, b = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 3.0)
    assert (latent_mse(a, b), pixel_l1(a, b), gradient_l1(a, b)) == (9.0, 3.0, 0.0)


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

"""The second-order degradation: seeded, of the right size, and with the statistics its parameters ask for."""

import dataclasses

import pytest
import torch

from tsdsr.training.degradation import (
    DegradationConfig,
    degrade,
    evidence,
    filter2d,
    gaussian_kernel,
    random_sharpening,
)


def photograph(batch=1, size=64, seed=0):
    noise = torch.rand(batch, 3, size // 16, size // 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)


def gaussian_blur(pictures, sigma):
    return filter2d(pictures, gaussian_kernel(21, (sigma, sigma)).expand(len(pictures), -1, -1))


def run(hq, seed=0):
    return degrade(hq, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 128)])
def test_a_quarter_of_the_size_in_8_bit_levels(height, width):
    hq = torch.rand(2, 3, height, width)
    lq = run(hq)
    assert lq.shape == (2, 3, height // 4, width // 4)
    assert lq.min() >= 0 and lq.max() <= 1
    torch.testing.assert_close(lq * 255, (lq * 255).round(), atol=1e-3, rtol=0)


def test_seeded():
    hq = photograph(2)
    assert torch.equal(run(hq, 3), run(hq, 3))
    assert not torch.equal(run(hq, 3), run(hq, 4))


def test_every_picture_of_a_batch_is_damaged_in_its_own_way():
    hq = photograph().expand(4, -1, -1, -1)
    lq = run(hq)
    assert all((lq[0] - other).abs().mean() > 1e-3 for other in lq[1:])


def test_brightness_stays_and_detail_goes():
    """Over many draws the mean is kept, and the result is farther from the picture than plain reduction is."""
    hq = photograph(64, 64, seed=1)
    lq = run(hq)
    small = torch.nn.functional.interpolate(hq, scale_factor=0.25, mode="bicubic", antialias=True)
    assert (lq.mean((2, 3)) - small.mean((2, 3))).abs().mean() < 0.03
    psnr = -10 * torch.log10((lq - small).square().mean((1, 2, 3)))
    assert 15 < psnr.mean() < 32
    assert psnr.std() > 2  # mild and strong damage both occur


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(photograph())
    assert torch.equal(torch.rand(3), expected)


def test_sharpening_adds_what_a_blur_takes_away():
    generator = torch.Generator().manual_seed(0)
    config = DegradationConfig(sharpen_probability=1.0, sharpen_amount=(0.5, 0.5), sharpen_sigma=(0.8, 0.8))
    kernel = random_sharpening(config, generator)
    picture = photograph(size=32)
    blurred = filter2d(picture, gaussian_kernel(21, (0.8, 0.8))[None])
    torch.testing.assert_close(filter2d(picture, kernel[None]), picture + 0.5 * (picture - blurred))
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_published_degradation_is_not_sharpened():
    """Nor do its draws depend on whether sharpening exists: the stream is as long."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert random_sharpening(DegradationConfig(), generator) is None and torch.equal(generator.get_state(), state)
    drawn = [random_sharpening(DegradationConfig.mild(), generator) is None for _ in range(200)]
    assert 60 < sum(drawn) < 140


def test_mild_damage_is_mild_and_sharpened_at_times():
    """Less is lost than by the published one; sharpening gives its small pictures more contrast at edges."""
    hq = photograph(48, 64, seed=2)
    small = torch.nn.functional.interpolate(hq, scale_factor=0.25, mode="bicubic", antialias=True)

    def lost(lq):
        return (lq - small).square().mean((1, 2, 3)).sqrt().median()

    mild = degrade(hq, torch.Generator().manual_seed(0), DegradationConfig.mild())
    assert lost(mild) < 0.6 * lost(run(hq))
    always = dataclasses.replace(DegradationConfig.mild(), sharpen_probability=1.0, sharpen_amount=(1.2, 1.2))
    never = dataclasses.replace(always, sharpen_probability=0.0)
    edges = [
        degrade(hq, torch.Generator().manual_seed(0), config).diff(dim=-1).abs().mean() for config in (always, never)
    ]
    assert edges[0] > 1.1 * edges[1]


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
    changed = [gaussian_blur(hq, sigma) for sigma in (0.1, 0.5, 0.8, 1.5)]
    changed.append(1.8 * hq - 0.8 * gaussian_blur(hq, 1.0))  # sharpened
    for one in changed:
        assert evidence(one, hq, 1, 30.0, 40.0) == 1
        assert evidence(one + noise, hq, 1, 26.0, 31.0).item() == pytest.approx(0.5, abs=0.1)
    assert evidence(hq + 0.1, hq, 1, 30.0, 40.0) == 0, "another colour is neither"


def test_evidence_is_the_same_in_mixed_precision():
    hq = photograph(2, 64)
    lq = torch.nn.functional.interpolate(run(hq), scale_factor=4, mode="bicubic")
    expected = evidence(lq, hq, 4, 10.0, 60.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(evidence(lq, hq, 4, 10.0, 60.0), expected)
    assert 0 < expected.min() < expected.max() < 1

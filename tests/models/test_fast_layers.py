"""Layers of VAEs that compute the same in less time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from tsdsr.models import fast_layers
from tsdsr.pipelines.strips import Rows, Work


def make(kind):
    torch.manual_seed(0)
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=[8, 8, 8],
            decoder_block_out_channels=[8, 8, 8],
            num_encoder_blocks=[0, 1, 1],
            num_decoder_blocks=[1, 1, 0],
            latent_channels=4,
        ).eval()
    return AutoencoderKL(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def run(vae, pixels):
    encoded = vae.encode(pixels)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    return latents, vae.decode(latents).sample


@pytest.fixture(params=["kl", "tiny"])
def pair(request):
    """A VAE as diffusers makes it, and the same with fast layers."""
    plain = make(request.param)
    fast = copy.deepcopy(plain)
    fast_layers.use_fast_layers(fast)
    return plain, fast


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_stay(pair, layout):
    plain, fast = pair
    pixels = torch.rand(2, 3, 20, 36, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for training in (False, True):
        with torch.set_grad_enabled(training):
            results = run(fast, pixels.contiguous(memory_format=layout))
            for result, right in zip(results, run(plain, pixels), strict=True):
                torch.testing.assert_close(result, right, rtol=1e-5, atol=2e-5)
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_gradients_stay(pair):
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for vae in pair:
        run(vae, pixels)[1].square().mean().backward()
    for (name, one), other in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_nothing_is_enlarged_before_a_convolution(pair, monkeypatch):
    plain, fast = pair
    enlarged, interpolate = [], F.interpolate

    def count(*args, **kwargs):
        enlarged.append(args[0].shape)
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(F, "interpolate", count)
    with torch.no_grad():
        run(plain, torch.zeros(1, 3, 16, 16))
        assert len(enlarged) == 2
        run(fast, torch.zeros(1, 3, 16, 16))
    assert len(enlarged) == 2


@pytest.mark.parametrize("height", [1, 5, 16])
def test_a_convolution_of_the_enlarged_picture(height):
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, height, 7)
    expected = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    layer.__class__ = fast_layers.UpsamplingConv2d
    torch.testing.assert_close(layer(x, upsample=True), expected)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("strips", [1, 3, 5])
def test_in_strips(pair, strips):
    _, fast = pair
    latents = torch.randn(1, 4, 13, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = fast.decode(latents).sample
        in_strips = fast.decode(Rows.of(latents, Work(strips)), return_dict=False)[0].whole()
    torch.testing.assert_close(in_strips, whole, rtol=1e-5, atol=2e-5)


def test_norms_are_accurate_with_channels_last():
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    # Far from zero, as pictures are: short sums and double precision are what keeps the digits.
    x = (torch.randn(2, 16, 256, 192) + 3 * torch.randn(1, 16, 1, 1)).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(norm).double()(x.double())
    torchs = (norm(x) - exact).abs().max()
    norm.__class__ = fast_layers.AccurateGroupNorm
    ours = norm(x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert (ours - exact).abs().max() < 5e-6 < torchs


def test_a_lora_on_the_decoder(pair):
    plain, fast = pair
    layer = "decoder.up_blocks.0.upsamplers.0.conv" if hasattr(plain.decoder, "up_blocks") else "decoder.layers.4"
    results = []
    for vae in (plain, fast):
        torch.manual_seed(5)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=[layer], init_lora_weights=False), vae)
        with torch.no_grad():
            results.append(vae.decode(torch.ones(1, 4, 6, 6)).sample)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-5)


def test_what_is_not_a_doubling_stays():
    vae = AutoencoderTiny(
        encoder_block_out_channels=[8, 8],
        decoder_block_out_channels=[8, 8],
        num_encoder_blocks=[1, 1],
        num_decoder_blocks=[1, 1],
        upsampling_scaling_factor=3,
        latent_channels=4,
    ).eval()
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        fast_layers.use_fast_layers(vae)
        torch.testing.assert_close(vae.decode(latents).sample, expected)


@pytest.mark.parametrize("more", [{"output_scale_factor": 2.0}, {"up": True}, {"down": True}, {"temb_channels": 8}])
def test_blocks_of_another_kind_stay(more):
    block = ResnetBlock2D(in_channels=8, groups=4, **{"temb_channels": None, **more})
    fast_layers.use_fast_layers(nn.Sequential(block))
    assert type(block) is ResnetBlock2D
    plain = ResnetBlock2D(in_channels=8, groups=4, temb_channels=None)
    fast_layers.use_fast_layers(nn.Sequential(plain))
    assert type(plain) is not ResnetBlock2D
    with pytest.raises(ValueError, match="time"):
        plain(torch.rand(1, 8, 4, 4), torch.rand(1, 8))

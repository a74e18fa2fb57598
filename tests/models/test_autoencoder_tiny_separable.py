"""TinySR's VAE against the convolutions it is made of."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch.utils.flop_counter import FlopCounterMode

from tsdsr import AutoencoderTinySeparable
from tsdsr.pipelines.strips import Rows, Work

SIZES = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 5,
}
# Separable or not: encoder and decoder
KINDS = [(True, False), (True, True), (False, True), (False, False)]


def make(encoder, decoder, **changes):
    torch.manual_seed(0)
    settings = {**SIZES, **changes}
    return AutoencoderTinySeparable(**settings, separable_encoder=encoder, separable_decoder=decoder).eval()


def convolution(state, name, x, stride=1):
    """A layer, separable or not, as its keys say."""
    if f"{name}.depthwise.weight" in state:
        x = F.conv2d(x, state[f"{name}.depthwise.weight"], None, stride, padding=1, groups=x.shape[1])
        return F.conv2d(x, state[f"{name}.pointwise.weight"], state.get(f"{name}.pointwise.bias"))
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding=1)


def block(state, name, x):
    y = x
    for layer in (0, 2, 4):
        y = convolution(state, f"{name}.conv.{layer}", y)
        y = F.relu(y) if layer < 4 else y
    return F.relu(x + y)


def encoded(state, blocks, x):
    x, at = convolution(state, "encoder.layers.0", (x + 1) / 2), 1
    for stage, count in enumerate(blocks):
        if stage:
            x, at = convolution(state, f"encoder.layers.{at}", x, stride=2), at + 1
        for _ in range(count):
            x, at = block(state, f"encoder.layers.{at}", x), at + 1
    return convolution(state, f"encoder.layers.{at}", x)


def decoded(state, blocks, z):
    x, at = F.relu(convolution(state, "decoder.layers.0", 3 * torch.tanh(z / 3))), 2
    for stage, count in enumerate(blocks):
        for _ in range(count):
            x, at = block(state, f"decoder.layers.{at}", x), at + 1
        if stage < len(blocks) - 1:
            x, at = x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1), at + 1
        x, at = convolution(state, f"decoder.layers.{at}", x), at + 1
    return 2 * x - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_computes_what_its_layers_say(kind):
    vae = make(*kind)
    state = vae.state_dict()
    for half, separable in zip(("encoder", "decoder"), kind, strict=True):
        names = [name for name in state if name.startswith(half)]
        assert all(("depthwise" in name or "pointwise" in name) == separable for name in names)
    x, z = torch.rand(2, 3, 24, 36) * 2 - 1, 2 * torch.randn(2, 5, 6, 9)
    torch.testing.assert_close(vae.encode(x).latents, encoded(state, SIZES["num_encoder_blocks"], x))
    torch.testing.assert_close(vae.decode(z).sample, decoded(state, SIZES["num_decoder_blocks"], z))


def test_its_names_are_those_of_the_original():
    torch.manual_seed(0)
    plain = AutoencoderTiny(**SIZES)
    assert list(make(False, False).state_dict()) == list(plain.state_dict())
    biases = [key for key in plain.state_dict() if key.endswith(".bias")]
    separable = [key for key in make(True, True).state_dict() if key.endswith(".bias")]
    assert separable == [key.replace(".bias", ".pointwise.bias") for key in biases]
    assert set(plain.config) < set(make(True, True).config)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("count", [3, 100])
@torch.no_grad()
def test_in_strips_it_gives_what_the_whole_gives(kind, count):
    vae = make(*kind)
    for half, given in (
        (lambda x: vae.encode(x).latents, torch.randn(1, 3, 84, 44)),
        (lambda z: vae.decode(z).sample, torch.randn(1, 5, 21, 11)),
    ):
        result = half(Rows.of(given, Work(count)))
        assert isinstance(result, Rows)
        torch.testing.assert_close(result.whole(), half(given), rtol=1e-4, atol=1e-5)


def test_sliced_and_with_gradients():
    vae = make(True, True)
    x = torch.rand(3, 3, 16, 16)
    expected = vae.encode(x).latents
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(x).latents, expected)
    vae.decode(expected).sample.square().mean().backward()
    for name, weight in vae.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_saved_and_loaded_without_a_word(tmp_path, caplog):
    vae = make(True, False, scaling_factor=1.5)
    vae.save_pretrained(tmp_path)
    again = AutoencoderTinySeparable.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderTinySeparable"
    assert again.config.scaling_factor == 1.5 and again.config.separable_encoder and not again.config.separable_decoder
    torch.testing.assert_close(again.state_dict(), vae.state_dict(), rtol=0, atol=0)
    assert not caplog.records


# arXiv 2508.17434: 78.5 G for the whole VAE; parameters in M and multiply-accumulates in G at 512x512.
@pytest.mark.parametrize(
    ("kind", "parameters", "macs"),
    [((True, False), (0.158, 1.229), (7.76, 70.7)), ((False, True), (1.229, 0.158), (61.2, 9.1))],
)
def test_sizes_of_the_release(kind, parameters, macs):
    counted = []
    with torch.device("meta"):
        vae = AutoencoderTinySeparable(separable_encoder=kind[0], separable_decoder=kind[1])
        for half, given in ((vae.encode, torch.zeros(1, 3, 512, 512)), (vae.decode, torch.zeros(1, 16, 64, 64))):
            with FlopCounterMode(display=False) as counter:
                half(given)
            counted.append(counter.get_total_flops() / 2e9)
    assert counted == pytest.approx(macs, rel=0.005)
    found = [sum(weight.numel() for weight in half.parameters()) / 1e6 for half in (vae.encoder, vae.decoder)]
    assert found == pytest.approx(parameters, abs=0.001)

"""Maps worked on strip by strip against the whole map."""

import tempfile

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from tsdsr.models.attention import use_dispatcher
from tsdsr.pipelines import codec, strips
from tsdsr.pipelines.color import COLOR_FIXES
from tsdsr.pipelines.precision import Precision
from tsdsr.pipelines.strips import Rows, Work, cubic_weights, per_pixel


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def kl():
    """SD3's VAE with fewer channels; normalisations that are not the identity."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    use_dispatcher(vae)
    return vae


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()


def smooth(batch, channels, height, width, seed=0):
    noise = torch.randn(batch, channels, 5, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(height, width), mode="bicubic")


def decode(vae, z):
    return vae.decode(z, return_dict=False)[0]


def encode(vae, x):
    encoded = vae.encode(x)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_vae_in_strips_gives_what_the_whole_gives(request, kind, count):
    vae = request.getfixturevalue(kind)
    x, z = smooth(1, 3, 168, 88), smooth(1, 4, 21, 11)
    for half, given in ((encode, x), (decode, z)):
        whole = half(vae, given)
        work = Work(count)
        result = half(vae, Rows.of(given, work))
        assert isinstance(result, Rows) and result.shape == whole.shape
        torch.testing.assert_close(result.whole(), whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
        assert work.sees_whole_map is (kind == "kl")


def test_a_posterior_is_drawn_as_from_the_whole(kl):
    x = smooth(1, 3, 64, 48)
    draws = [
        kl.encode(given).latent_dist.sample(torch.Generator().manual_seed(3)) for given in (x, Rows.of(x, Work(4)))
    ]
    torch.testing.assert_close(draws[1].whole(), draws[0], rtol=0, atol=3e-5)


def test_what_is_kept_may_lie_in_a_file(kl, monkeypatch):
    stored = []
    keep = strips._InFile.__init__
    monkeypatch.setattr(strips._InFile, "__init__", lambda self, *args: (stored.append(1), keep(self, *args))[1])
    z = smooth(1, 4, 16, 8)
    in_file = decode(kl, Rows.of(z, Work(4, in_file=True))).whole()
    assert stored and torch.equal(in_file, decode(kl, Rows.of(z, Work(4))).whole())
    numbers = torch.arange(6, dtype=torch.bfloat16).view(1, 1, 2, 3)
    with tempfile.TemporaryFile() as file:
        strips._InFile(numbers + 1, file)
        assert torch.equal(strips._InFile(numbers, file).load(), numbers)


def test_each_row_of_a_layer_is_computed_once_and_few_are_held(monkeypatch):
    """Memory does not grow with the height: of 400 rows, a layer never holds more than a strip and its neighbours."""
    torch.manual_seed(0)
    computed, held, maps = [], [], []
    make = Rows.__init__
    monkeypatch.setattr(
        Rows, "__init__", lambda self, *args, **kwargs: (maps.append(self), make(self, *args, **kwargs))[1]
    )

    def source(top, bottom):
        computed.extend(range(top, bottom))
        held.append(max(sum(chunk.shape[-2] for _, chunk in each._chunks) for each in maps))
        return x[..., top:bottom, :]

    x = torch.randn(1, 3, 400, 8)
    layers = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])

    def network(given):
        for layer in layers:
            given = given + layer(torch.relu(given))
        return given

    # Kept, so that the layers' overlapping requests do not reach the source again.
    rows = Rows(x.shape, x.dtype, x.device, source, work=Work(40), kept=True)
    torch.testing.assert_close(network(rows).whole(), network(x))
    assert computed == list(range(400))
    assert max(held) <= 40


def test_two_readers_at_different_places(kl):
    """What one reader has passed stays for the other."""
    x = torch.randn(1, 3, 60, 8)
    kernel = torch.randn(3, 3, 9, 9)
    rows = F.conv2d(Rows.of(x, Work(10)), torch.ones(3, 1, 1, 1), groups=3)
    joined = rows + F.conv2d(rows, kernel, padding=4)
    torch.testing.assert_close(joined.whole(), x + F.conv2d(x, kernel, padding=4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("pad", [(0, 3, 0, 5), (2, 1, 3, 4), (0, 0, 4, 0)])
@pytest.mark.parametrize("count", [1, 4, 17])
def test_padding(mode, pad, count):
    x = torch.rand(1, 3, 17, 9)
    assert torch.equal(F.pad(Rows.of(x, Work(count)), pad, mode=mode).whole(), F.pad(x, pad, mode=mode))


@pytest.mark.parametrize("size", [(40, 30), (17, 9), (8, 5), (68, 36), (23, 7), (1, 1), (300, 9)])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("count", [1, 5, 30])
def test_bicubic(size, antialias, count):
    x = torch.rand(1, 3, 17, 9)
    arguments = {"size": size, "mode": "bicubic", "antialias": antialias, "align_corners": False}
    result = F.interpolate(Rows.of(x, Work(count)), **arguments).whole()
    torch.testing.assert_close(result, F.interpolate(x, **arguments), rtol=0, atol=1e-5)


def test_cubic_weights_sum_to_one_and_reach_only_what_they_need():
    positions, weights = cubic_weights(100, 400, 200, 204, antialias=True)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert positions[weights != 0].min() >= 48 and positions[weights != 0].max() <= 52


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_convolutions(stride, kernel):
    x = torch.randn(2, 4, 23, 18)
    layer = nn.Conv2d(4, 6, kernel, stride=stride, padding=kernel // 2, padding_mode="zeros")
    dilated = nn.Conv2d(4, 4, 3, padding=(0, 2), dilation=(1, 2), groups=4)
    for network in (layer, dilated):
        torch.testing.assert_close(network(Rows.of(x, Work(7))).whole(), network(x), rtol=1e-5, atol=1e-5)


def test_nearest_and_slices_and_chunks():
    x = torch.randn(1, 4, 11, 6)
    rows = Rows.of(x, Work(4))
    assert torch.equal(F.interpolate(rows, scale_factor=2.0).whole(), F.interpolate(x, scale_factor=2.0))
    assert torch.equal(rows[:, 1:3, 2:9, 1:].whole(), x[:, 1:3, 2:9, 1:])
    assert torch.equal(rows[..., 3:, :].whole(), x[..., 3:, :])
    for part, expected in zip(rows.chunk(2, dim=1), x.chunk(2, dim=1), strict=True):
        assert torch.equal(part.whole(), expected)


def test_arithmetic_with_numbers_and_tensors():
    x, noise, gain = torch.randn(1, 4, 11, 6), torch.randn(1, 4, 11, 6), torch.rand(1, 4, 1, 1)

    def function(z):
        return (2 - (z * gain + noise) / 3).clamp(-1, 1) - 0.5 * z.half().float()

    assert torch.equal(function(Rows.of(x, Work(3))).whole(), function(x))
    assert Rows.of(x).half().dtype == torch.float16


def test_what_is_not_known_sees_the_whole_map():
    x = torch.randn(1, 4, 12, 6)
    rows = F.conv2d(Rows.of(x, Work(4)), torch.ones(4, 1, 1, 1), groups=4)
    assert torch.equal(F.pixel_unshuffle(rows, 2), F.pixel_unshuffle(x, 2))
    # And may still be read by others.
    assert torch.equal((rows + 1).whole(), x + 1)


def test_moments_of_channels_are_those_of_the_whole():
    x = torch.randn(1, 3, 50, 8) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 3
    rows = F.conv2d(Rows.of(x, Work(9)), torch.ones(3, 1, 1, 1), groups=3)
    mean, variance = rows.moments()
    torch.testing.assert_close(mean, x.flatten(2).mean(2))
    torch.testing.assert_close(variance, x.flatten(2).var(2))
    assert torch.equal(rows.whole(), x)


@pytest.mark.parametrize("fix", COLOR_FIXES)
@pytest.mark.parametrize("in_file", [False, True])
def test_colour_corrections_in_strips(fix, in_file):
    images = torch.rand(1, 3, 90, 40, generator=torch.Generator().manual_seed(0))
    reference = torch.rand(1, 3, 23, 10, generator=torch.Generator().manual_seed(1))
    decoded = F.conv2d(Rows.of(images, Work(9, in_file=in_file)), torch.ones(3, 1, 1, 1), groups=3)
    result = COLOR_FIXES[fix](decoded, Rows.of(reference))
    assert isinstance(result, Rows)
    torch.testing.assert_close(result.whole(), COLOR_FIXES[fix](images, reference), rtol=0, atol=3e-5)


def test_per_pixel_functions_take_tensors_and_maps():
    x = torch.rand(1, 3, 9, 4)
    assert torch.equal(per_pixel(lambda a: a.sum(1, keepdim=True), Rows.of(x, Work(4))).whole(), x.sum(1, keepdim=True))
    assert torch.equal(per_pixel(torch.square, x), x.square())


def test_sampled_statistics_are_near_those_of_the_whole(kl, monkeypatch):
    """Windows of the picture give the normalisations nearly what the whole gives, and the same to every strip."""
    monkeypatch.setattr(codec, "WINDOWS", 4)
    x = torch.nn.functional.interpolate(
        torch.rand(1, 3, 100, 80, generator=torch.Generator().manual_seed(2)), scale_factor=4, mode="bicubic"
    )
    exact, sampled = Work(10), Work(10)
    whole = encode(kl, Rows.of(x, exact)).whole()
    measured = Work(10, margin=codec.MARGIN, most_keys=50)
    result = encode(kl, Rows.of(x, sampled))
    encode(kl, Rows.of(codec.sample_windows(x, 64, 240), measured)).whole()
    sampled.statistics[:], sampled.attended[:] = measured.statistics, measured.attended
    result = result.whole()
    key, _ = measured.attended[0]
    assert key.shape[0] == 1 and 25 < key.shape[1] <= 50  # of all windows, for every pixel
    relative = (result - whole).abs().max() / (whole.max() - whole.min())
    assert 1e-6 < relative < 0.15
    unnormalised = Work(10)
    other = encode(kl, Rows.of(x, unnormalised))
    unnormalised.statistics[:] = [(mean * 0, variance * 0 + 1) for mean, variance in exact.statistics]
    unnormalised.attended[:] = exact.attended
    assert (other.whole() - whole).abs().max() > 3 * (result - whole).abs().max()


def test_coarse_maps_are_measured_on_the_picture(kl, monkeypatch):
    """A sample stands for fine maps alone: with all maps kept, it is the whole."""
    z = smooth(1, 4, 30, 24)
    whole = decode(kl, z)

    def distance(kept):
        monkeypatch.setattr(codec, "KEPT", kept)
        result = codec.run_in_strips(
            "decode",
            lambda rows: decode(kl, rows),
            Rows.of(z),
            codec.CodecPlan(9, True, False),
            lambda: codec.sample_windows(z, 8, 20),
            Precision(set()),
            lambda *_: None,
        )
        return (result.whole() - whole).abs().mean() / whole.std()

    none, coarse, every = distance(0), distance(60 * 48), distance(10**9)
    assert every < 1e-5 < coarse < none < 0.3


def test_windows_are_spread_over_the_picture_and_do_not_overlap():
    x = torch.arange(200 * 300, dtype=torch.float32).view(1, 1, 200, 300)
    windows = codec.sample_windows(Rows.of(x, Work(7)), 20, 100)
    assert windows.shape == (8, 1, 20, 100) and torch.equal(windows, codec.sample_windows(x, 20, 100))
    assert len(windows.unique()) == windows.numel()
    tops, lefts = windows[:, 0, 0, 0] // 300, windows[:, 0, 0, 0] % 300
    assert tops.min() == 0 and tops.max() == 180
    assert lefts.min() < 40 and lefts.max() > 160
    assert codec.sample_windows(x[..., :15, :], 20, 1000).shape == (1, 1, 15, 300)

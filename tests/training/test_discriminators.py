"""Networks that tell photographs from a student's pictures."""

import copy

import pytest
import torch
from transformers import BertConfig, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from tsdsr.training.config import ConfigError
from tsdsr.training.discriminators import (
    MultiScaleDiscriminator,
    PatchDiscriminator,
    ProjectedDiscriminator,
    load_backbone,
    make_discriminator,
)
from tsdsr.training.objectives import r1_penalty


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


# --- several sizes


def test_each_size_is_judged_alike():
    """Each size by a network of its own on the pictures halved; a mean over the logits is one over the sizes' means."""
    torch.manual_seed(0)
    found = MultiScaleDiscriminator(width=4, layers=2, scales=3).eval()
    pictures = torch.rand(2, 3, 64, 32) * 2 - 1
    *maps, logits = found.features(pictures)
    assert logits.shape == (2, 3, 16, 8) and len(maps) == 3 * 4
    assert [one.shape[-2:] for one in maps[::4]] == [(64, 32), (32, 16), (16, 8)]
    flat = torch.full((1, 3, 160, 160), 0.3)  # far from its edges its halves are itself
    for index, one in enumerate(found.scales):
        torch.testing.assert_close(found(flat)[:, index, 20, 20], one(flat)[:, 0, 20, 20])
    halved = torch.nn.functional.avg_pool2d(pictures, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(logits[:, 1].mean(), found.scales[1](halved).mean())
    assert found(torch.rand(1, 3, 50, 34)).shape == (1, 3, 12, 8)


# --- through a vision transformer

SIZES = {"hidden_size": 8, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 16}


def vision_transformer(kind="vit", **more):
    torch.manual_seed(0)
    if kind == "vit":
        return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4, **more), add_pooling_layer=False).eval()
    return Dinov2Model(Dinov2Config(**SIZES, image_size=16, patch_size=4, **more)).eval()


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_heads_look_at_the_quarters_of_a_vision_transformer(kind):
    """At pictures of its training size: the tokens as the transformer itself gives them, without the class token."""
    backbone = vision_transformer(kind)
    found = ProjectedDiscriminator(backbone, votes=2).eval()
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    *hidden, votes = found.features(pictures)
    assert len(hidden) == 5 and votes.shape == (2, 5 * 2 * 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    states = backbone((pictures / 2 + 0.5 - mean[:, None, None]) / std[:, None, None], output_hidden_states=True)
    for head, one, index in zip(found.heads, hidden, (0, 1, 2, 3, 5), strict=True):
        expected, _ = head(states.hidden_states[index][:, 1:].transpose(1, 2))
        torch.testing.assert_close(one, expected)
    assert found(torch.rand(1, 3, 27, 18)).shape == (1, 5 * 2 * 6 * 4), "whole patches, at any size"


def test_the_vision_transformer_is_not_trained():
    backbone = vision_transformer()
    found = ProjectedDiscriminator(backbone).eval()
    assert all(name.startswith("heads.") for name in found.state_dict())
    pictures = torch.rand(2, 3, 16, 16, requires_grad=True)
    found(pictures).sum().backward()
    assert all(weight.grad is None for weight in backbone.parameters())
    assert all(weight.grad is not None for weight in found.parameters())
    seen = pictures.grad.clone()
    sum(one.sum() for one in found.judge(pictures)).backward()
    assert not torch.equal(pictures.grad, seen) and seen.abs().sum() > 0
    found.to(torch.float64)
    assert next(backbone.parameters()).dtype == torch.float64, "it goes where the heads go"


def test_a_vision_transformer_by_its_folder(config, tmp_path):
    """With the class of its folder; differentiated twice where R1 asks for it."""
    vision_transformer().save_pretrained(tmp_path / "vit")
    more = {"discriminator_kind": "dino", "discriminator_model": str(tmp_path / "vit"), "adversarial": 0.1}
    found = make_discriminator(config(tmp_path / "run", **more, r1_weight=0.1))
    pictures = torch.rand(1, 3, 16, 16, requires_grad=True)
    r1_penalty(found(pictures), pictures).backward()
    assert all(weight.grad is not None for name, weight in found.named_parameters() if "original" in name)
    with pytest.raises(ConfigError, match="needs crops of at least 8, not 4"):
        found(torch.rand(1, 3, 4, 4))


def test_vision_transformers_that_cannot_be_had(tmp_path):
    with pytest.raises(ConfigError, match=r"not here and could not be fetched .* use discriminator_kind multiscale"):
        load_backbone(str(tmp_path / "nowhere"))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="is a bert; the discriminator dino needs a vit or dinov2"):
        load_backbone(str(tmp_path / "bert"))


@pytest.mark.parametrize("width", [8, 32])
def test_pictures_pass_through_spectral_norms(width):
    """Noise and edges alike: maps do not fade away from layer to layer, as they do without a gain."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width).eval()
    for _ in range(20):
        discriminator.renew_norms()
    pictures = torch.cat([0.3 * torch.randn(1, 3, 64, 64), torch.linspace(-1, 1, 64).round().expand(1, 3, 64, 64)])
    for picture in pictures.split(1):
        first, *_, last, _ = (float(one.std()) for one in discriminator.features(picture))
        assert 0.1 * first < last < 10 * first, (first, last)

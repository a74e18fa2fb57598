"""Where small networks begin."""

import pytest
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel

from tsdsr.training.initialisation import NEIGHBOURS, start_as_convolution, start_as_interpolation


@pytest.fixture
def make_transformer():
    """A function that makes one: heads, their width, side of its table of positions, spacing of these."""

    def make(heads, head_dim, side=16, spacing=1):
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=side * spacing,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            caption_projection_dim=heads * head_dim,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            pos_embed_max_size=side,
        )

    return make


@torch.no_grad()
def attention(transformer, tokens, block):
    """(heads, n, n) of a block's picture tokens (1, n, width), of these alone."""
    attn = transformer.transformer_blocks[block].attn
    normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
    query, key = (layer(normed)[0].unflatten(-1, (attn.heads, -1)).transpose(0, 1) for layer in (attn.to_q, attn.to_k))
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)


@pytest.mark.parametrize(("heads", "head_dim", "spacing"), [(6, 32, 1), (7, 24, 1), (8, 64, 1), (6, 32, 2)])
@pytest.mark.parametrize("block", [0, 1])
def test_heads_look_at_their_neighbours(make_transformer, heads, head_dim, spacing, block):
    transformer = make_transformer(heads, head_dim, spacing=spacing)
    start_as_convolution(transformer)
    side = 8
    with torch.no_grad():
        tokens = transformer.pos_embed(torch.randn(1, 4, side, side))
    found = attention(transformer, tokens, block).unflatten(1, (side, side)).unflatten(-1, (side, side))
    for head, (right, down) in enumerate(NEIGHBOURS):
        for row in range(2, side - 2):
            for column in range(2, side - 2):
                weights = found[head, row, column]
                near = weights[row + down - 1 : row + down + 2, column + right - 1 : column + right + 2]
                assert near.sum() > 0.5 and near.sum() > 2 * (1 - near.sum()) * 9 / (side * side - 9)
        mean = torch.stack(
            [
                found[head, row, column].roll((-row, -column), (0, 1))
                for row in range(2, side - 2)
                for column in range(2, side - 2)
            ]
        ).mean(dim=0)
        assert divmod(int(mean.argmax()), side) == (down % side, right % side)


def test_the_last_head_is_left_as_it_was(make_transformer):
    plain, ours = make_transformer(3, 32), make_transformer(3, 32)
    start_as_convolution(ours)
    for one, other in zip(plain.transformer_blocks, ours.transformer_blocks, strict=True):
        for name in ("to_q", "to_k"):
            before, after = getattr(one.attn, name).weight, getattr(other.attn, name).weight
            assert torch.equal(before[64:], after[64:]) and not torch.equal(before[:32], after[:32])
        assert torch.equal(one.attn.to_v.weight, other.attn.to_v.weight)


def test_decoding_interpolates_what_encoding_averaged():
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=[8, 8, 8],
        decoder_block_out_channels=[8, 8, 8],
        num_encoder_blocks=[0, 0, 2],
        num_decoder_blocks=[2, 1, 0],
        latent_channels=6,
    )
    start_as_interpolation(vae)
    ramp = torch.linspace(-0.8, 0.8, 32).expand(1, 3, 32, 32)
    with torch.no_grad():
        result = vae.decode(vae.encode(ramp).latents).sample
    assert (result - ramp)[..., 8:-8, 8:-8].abs().max() < 0.12

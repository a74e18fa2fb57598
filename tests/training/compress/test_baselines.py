"""How else blocks can be chosen."""

import math

import pytest
import torch

from tsdsr.training.compress import (
    BASELINES,
    BlockInfluence,
    Group,
    by_influence,
    ends,
    first,
    kept_layers,
    last,
    layer_mask,
    masked,
    tinyfusion,
    uniform,
)
from tsdsr.training.config import ConfigError


def test_fixed_choices():
    assert kept_layers(first(8, 3)) == (0, 1, 2)
    assert kept_layers(last(8, 3)) == (5, 6, 7)
    assert kept_layers(ends(8, 3)) == (0, 1, 7) and kept_layers(ends(8, 4)) == (0, 1, 6, 7)
    assert kept_layers(uniform(9, 3)) == (0, 4, 8) and kept_layers(uniform(8, 4)) == (0, 2, 5, 7)
    assert kept_layers(uniform(24, 12)) == (0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23)
    for choose in BASELINES.values():
        for depth in range(1, 30):
            for keep in range(1, depth + 1):
                mask = choose(depth, keep)
                assert mask.shape == (depth,) and len(kept_layers(mask)) == keep
        for keep in (0, 6):
            with pytest.raises(ConfigError, match="From 1 to 5 blocks"):
                choose(5, keep)


@pytest.mark.parametrize("distance", ["cosine", "angular"])
def test_influence_is_how_far_a_block_turns_the_tokens(make_transformer, inputs, distance):
    transformer = make_transformer(4)
    norm = transformer.transformer_blocks[2].norm1  # its gates at 0: a block that does nothing
    norm.linear.weight.data.zero_()
    norm.linear.bias.data.zero_()
    states: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: states.append(output[1].double()))
        for block in transformer.transformer_blocks
    ]
    hooks += [
        transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _, __, kwargs: states.append(kwargs["hidden_states"].double()), with_kwargs=True
        )
    ]
    halves = [{name: tensor[index : index + 1] for name, tensor in inputs.items()} for index in (0, 1)]
    with torch.no_grad(), BlockInfluence(transformer, distance) as influence:
        for half in halves:  # what is seen in several calls is averaged
            transformer(**half)
    for hook in hooks:
        hook.remove()
    wanted = torch.zeros(4, dtype=torch.float64)
    for index in range(4):
        values = []
        for call in (0, 5):
            a, b = states[call + index][0], states[call + index + 1][0]
            for x, y in zip(a, b, strict=True):
                cosine = min(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)), 1.0)
                values.append(1 - cosine if distance == "cosine" else math.acos(cosine) / math.pi)
        wanted[index] = sum(values) / len(values)
    scores = influence.scores()
    torch.testing.assert_close(scores.double(), wanted, rtol=0, atol=3e-4)
    assert scores[2] < 3e-4 < scores.sort().values[1]
    assert kept_layers(by_influence(scores, 3)) == (0, 1, 3)
    with torch.no_grad():
        transformer(**inputs)
    assert torch.equal(influence.scores(), scores)  # it looks no longer


def test_influence_is_that_of_the_masked_block(make_transformer, inputs):
    transformer = make_transformer(3)
    with torch.no_grad(), masked(transformer, layer_mask((0, 2), 3)), BlockInfluence(transformer) as influence:
        transformer(**inputs)
    assert influence.scores()[1].abs() < 1e-5 < influence.scores()[0]


def test_the_most_influential_stay():
    assert kept_layers(by_influence(torch.tensor([0.3, 0.1, 0.4, 0.2]), 2)) == (0, 2)
    assert kept_layers(by_influence(torch.tensor([0.3, 0.3, 0.3]), 2)) == (0, 1)
    with pytest.raises(ConfigError, match="From 1 to 2"):
        by_influence(torch.ones(2), 3)


def test_what_influence_cannot_say(make_transformer):
    transformer = make_transformer(1)
    with pytest.raises(ConfigError, match="cosine or angular"):
        BlockInfluence(transformer, "euclidean")
    with BlockInfluence(transformer) as influence, pytest.raises(ConfigError, match="nothing yet"):
        influence.scores()


def test_tinyfusion_has_local_groups_alone():
    masks = tinyfusion([Group(4, 2), Group(4, 1)])
    assert not len(masks.pair_gates)
    masks.option_gates[0].data[4] += 0.1  # 13
    masks.option_gates[1].data[2] += 0.1
    assert kept_layers(masks.final(decision="options")) == (1, 3, 6)
    drawn = masks.sample(1.0, 1.0, 50).detach()
    assert (drawn[:, :4].sum(1) == 2).all() and (drawn[:, 4:].sum(1) == 1).all()

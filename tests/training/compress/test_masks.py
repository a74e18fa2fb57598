"""The distribution over masks against enumeration by hand, and the decision."""

import itertools
import math
from collections import Counter

import pytest
import torch

from tsdsr.training.compress.masks import (
    Annealing,
    Group,
    MaskDistribution,
    binary_options,
    corrosion,
    even_groups,
    expansion,
    gumbel_softmax,
    kept_layers,
    layer_mask,
    swaps,
)
from tsdsr.training.config import ConfigError

# (size, keep) of the groups
LAYOUTS = {
    "tinysr": [(4, 2)] * 6,
    "two": [(4, 2)] * 2,
    "odd": [(4, 2)] * 3,
    "unequal": [(3, 1), (5, 3)],
    "one_of_n": [(4, 1), (4, 1)],
    "all_but_one": [(3, 2), (5, 4)],
    "full": [(4, 4), (4, 1)],
    "empty": [(3, 0), (5, 2), (2, 2)],
    "nowhere": [(2, 2), (3, 3)],
    "single": [(8, 4)],
}
# Distributions of 2 of 4, by option: 01, 02, 03, 12, 13, 23
PARTED = (0.40, 0.30, 0.0, 0.0, 0.0, 0.30)  # marginals .7 .4 .6 .3
PARTNERS_DIFFER = (0.30, 0.04, 0.24, 0.22, 0.0, 0.20)  # marginals .58 .52 .46 .44


def distribution(layout, seed: int | None = 0, pairs=True, partner="marginals", spread=0.01) -> MaskDistribution:
    """With random gates, or with those it begins with (seed None)."""
    masks = MaskDistribution(
        [Group(*numbers) for numbers in (LAYOUTS[layout] if isinstance(layout, str) else layout)], pairs, partner
    )
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for gate in masks.parameters():
            gate.data = spread * torch.randn(gate.shape, generator=generator)
    return masks


def set_probabilities(gate, values, scaling=100.0):
    gate.data = torch.tensor(values).clamp(min=1e-12).log() / scaling


def choices(group: tuple[int, int], logits: list[float]) -> dict[tuple[int, ...], float]:
    """p of each set of kept blocks."""
    options = list(itertools.combinations(range(group[0]), group[1]))
    weights = [math.exp(logit) for logit in logits]
    return {option: weight / sum(weights) for option, weight in zip(options, weights, strict=True)}


def alike(candidates, score) -> list:
    best = max((score(one) for one in candidates), default=None)
    return [one for one in candidates if score(one) > best - 1e-5]


def lesser_and_greater(p: dict, chosen: tuple[int, ...], size: int, partner: str) -> tuple[dict, dict]:
    """Distributions of the sets after corrosion and after expansion, enumerated."""
    marginal = {block: sum(q for option, q in p.items() if block in option) for block in range(size)}
    if partner == "logits" and len(p) > 1:
        others = [option for option in p if len({*option} & {*chosen}) == len(chosen) - 1]
        found = alike(others, lambda option: math.log(p[option]))
        lost = [next(iter({*chosen} - {*option})) for option in found]
        won = [next(iter({*option} - {*chosen})) for option in found]
    else:
        lost = alike(chosen, lambda block: -marginal[block])
        won = alike([block for block in range(size) if block not in chosen], lambda block: marginal[block])
    less, more = Counter(), Counter()
    for block in lost:
        less[tuple(one for one in chosen if one != block)] += 1 / len(lost)
    for block in won:
        more[tuple(sorted({*chosen, block}))] += 1 / len(won)
    return less, more


def enumerated(masks: MaskDistribution, scaling: float) -> dict[tuple[int, ...], float]:
    """The probability of each set of kept blocks of the whole transformer, by brute force over one or two groups."""
    sizes = [(group.size, group.keep) for group in masks.groups]
    ps = [choices(s, (scaling * gate).tolist()) for s, gate in zip(sizes, masks.option_gates, strict=True)]
    found: dict[tuple[int, ...], float] = Counter()
    if not len(masks.pair_gates):
        for combination in itertools.product(*(p.items() for p in ps)):
            blocks, probability, start = [], 1.0, 0
            for (chosen, q), (size, _) in zip(combination, sizes, strict=True):
                blocks += [start + block for block in chosen]
                probability, start = probability * q, start + size
            found[tuple(blocks)] += probability
        return found
    (first, keep_first), (second, keep_second) = sizes
    room = [keep_first > 0 and keep_second < second, True, keep_first < first and keep_second > 0]
    weights = [math.exp(scaling * gate) * r for gate, r in zip(masks.pair_gates[0].tolist(), room, strict=True)]
    for (a, pa), (b, pb) in itertools.product(ps[0].items(), ps[1].items()):
        less_a, more_a = lesser_and_greater(ps[0], a, first, masks.partner)
        less_b, more_b = lesser_and_greater(ps[1], b, second, masks.partner)
        for weight, ones, others in zip(weights, (less_a, {a: 1.0}, more_a), (more_b, {b: 1.0}, less_b), strict=True):
            for (x, px), (y, py) in itertools.product(ones.items(), others.items()):
                found[(*x, *(first + block for block in y))] += pa * pb * px * py * weight / sum(weights)
    return found


def test_options_are_all_combinations_in_order():
    kept = [tuple(row.nonzero().flatten().tolist()) for row in binary_options(Group(4, 2))]
    assert kept == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert binary_options(Group(3, 0)).tolist() == [[0, 0, 0]] and binary_options(Group(2, 2)).tolist() == [[1, 1]]


def test_tinysr_searches_a_small_part_of_all_masks():
    groups = even_groups(24)
    assert groups == (Group(4, 2),) * 6
    assert math.prod(len(binary_options(group)) for group in groups) == 46_656


def test_groups_of_any_depth_keep_the_share():
    assert even_groups(10) == (Group(4, 2), Group(3, 2), Group(3, 1))
    assert even_groups(3, 4, 1) == (Group(3, 1),)
    for depth, size in itertools.product(range(1, 40), range(1, 9)):
        for keep in range(1, size + 1):
            total = math.floor(depth * keep / size + 0.5)
            if not total:
                with pytest.raises(ConfigError, match="none of"):
                    even_groups(depth, size, keep)
                continue
            groups = even_groups(depth, size, keep)
            sizes = [group.size for group in groups]
            assert sum(sizes) == depth and max(sizes) <= size and max(sizes) - min(sizes) <= 1
            assert sum(group.keep for group in groups) == total
            assert all(abs(group.keep - group.size * keep / size) <= 1 for group in groups)
            if depth % size == 0:
                assert {*groups} == {Group(size, keep)}


@pytest.mark.parametrize("partner", ["marginals", "logits"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mask_keeps_the_right_number(layout, partner):
    masks = distribution(layout, partner=partner)
    drawn = masks.sample(1.0, 100.0, 300, torch.Generator().manual_seed(0)).detach()
    assert drawn.shape == (300, masks.depth) and {*drawn.flatten().tolist()} <= {0.0, 1.0}
    assert (drawn.sum(1) == masks.keep).all()
    counts = torch.stack([part.sum(1) for part in drawn.split([g.size for g in masks.groups], dim=1)], dim=1)
    trades = counts - torch.tensor([float(group.keep) for group in masks.groups])
    for index, (first, second) in enumerate(zip(masks.groups[::2], masks.groups[1::2], strict=False)):
        assert (trades[:, 2 * index] == -trades[:, 2 * index + 1]).all()
        possible = {0.0}
        possible |= {-1.0} if first.keep and second.keep < second.size else set()
        possible |= {1.0} if second.keep and first.keep < first.size else set()
        assert {*trades[:, 2 * index].tolist()} == possible
    if len(masks.groups) % 2:
        assert not trades[:, -1].any()
    final = masks.final()
    assert final.shape == (masks.depth,) and final.sum() == masks.keep and {*final.tolist()} <= {0.0, 1.0}
    assert masks.expected().sum().item() == pytest.approx(masks.keep, abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1, None])  # None: everything is alike
@pytest.mark.parametrize("partner", ["marginals", "logits"])
@pytest.mark.parametrize(
    "layout", [[(4, 2), (4, 2)], [(3, 1), (5, 3)], [(4, 1), (4, 3)], [(4, 4), (4, 1)], [(8, 4)]], ids=str
)
def test_masks_of_eight_blocks_are_those_of_enumeration(layout, partner, seed):
    masks, scaling = distribution(layout, seed, partner=partner), 80.0
    wanted = enumerated(masks, scaling)
    assert sum(wanted.values()) == pytest.approx(1)
    mean = torch.zeros(8)
    for blocks, probability in wanted.items():
        mean[list(blocks)] += probability
    torch.testing.assert_close(masks.expected(scaling).detach(), mean, rtol=0, atol=1e-5)
    # A sample has not only this mean, it has these masks in these shares, whatever the temperature.
    drawn = masks.sample(0.5, scaling, 20_000, torch.Generator().manual_seed(2)).detach()
    found = Counter(tuple(row) for row in drawn.int().tolist())
    shares = {tuple(i for i, one in enumerate(row) if one): count / 20_000 for row, count in found.items()}
    assert shares.keys() <= wanted.keys()
    assert sum(abs(shares.get(blocks, 0) - q) for blocks, q in wanted.items()) / 2 < 0.035


def test_without_pairs_every_group_keeps_its_own():
    masks = distribution("unequal", pairs=False)
    drawn = masks.sample(1.0, 100.0, 100, torch.Generator().manual_seed(0)).detach()
    assert (drawn[:, :3].sum(1) == 1).all() and (drawn[:, 3:].sum(1) == 3).all()
    wanted = enumerated(masks, 100.0)
    mean = torch.tensor([sum(q for blocks, q in wanted.items() if block in blocks) for block in range(8)])
    torch.testing.assert_close(masks.expected().detach(), mean, rtol=0, atol=1e-5)
    assert torch.equal(masks.expected(), masks.marginals())


def test_paper_and_code_choose_other_partners():
    options = binary_options(Group(4, 2))
    logits = torch.tensor(PARTNERS_DIFFER).clamp(min=1e-12).log()
    picked = options[:1]  # blocks 0 and 1
    assert [row.tolist() for row in swaps(picked, options, logits, "marginals")] == [[[0, 1, 0, 0]], [[0, 0, 1, 0]]]
    assert [row.tolist() for row in swaps(picked, options, logits, "logits")] == [[[0, 1, 0, 0]], [[0, 0, 0, 1]]]


def test_masks_that_share_nothing_are_no_partners():
    options = binary_options(Group(4, 2))
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 9.0])  # 23 has the largest
    dropped, added = swaps(options[:1], options, logits, "logits")
    assert dropped.tolist() == [[1, 0, 0, 0]] and added.tolist() == [[0, 0, 0, 1]]  # 13


def test_expansion_and_corrosion_are_or_and_and():
    for m, partner in itertools.product((0.0, 1.0), repeat=2):
        mask = torch.tensor(m, requires_grad=True)
        more, fewer = expansion(mask, torch.tensor(partner)), corrosion(mask, torch.tensor(partner))
        assert more.item() == max(m, partner) and fewer.item() == min(m, partner)
        assert torch.autograd.grad(more, mask)[0].item() == 1 - partner
        assert torch.autograd.grad(fewer, mask)[0].item() == partner


def test_gumbel_softmax_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0]).expand(20_000, -1)
    for tau in (0.1, 4.0):
        drawn = gumbel_softmax(logits, tau, torch.Generator().manual_seed(0))
        assert {*drawn.flatten().tolist()} == {0.0, 1.0} and (drawn.sum(1) == 1).all()
        torch.testing.assert_close(drawn.mean(0), logits[0].softmax(0), rtol=0, atol=0.012)


def test_gumbel_softmax_has_the_gradient_of_its_softmax():
    weights = torch.tensor([1.0, -2.0, 0.5])
    gradients = []
    for hard in (True, False):
        logits = torch.tensor([0.3, 0.1, -0.4], requires_grad=True)
        (gumbel_softmax(logits, 0.7, torch.Generator().manual_seed(3), hard) * weights).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)
    logits = torch.tensor([0.3, 0.1, -0.4])
    soft = gumbel_softmax(logits, 0.7, torch.Generator().manual_seed(3), hard=False)
    wanted = soft * (weights - (soft * weights).sum()) / 0.7
    torch.testing.assert_close(gradients[0], wanted)
    sharp = gumbel_softmax(logits, 0.07, torch.Generator().manual_seed(3), hard=False)
    assert sharp.max() > soft.max()


@pytest.mark.parametrize("layout", ["tinysr", "odd", "unequal"])
def test_gradients_reach_all_gates(layout):
    masks = distribution(layout, None)
    weights = torch.randn(masks.depth, generator=torch.Generator().manual_seed(1))
    (masks.sample(2.0, 10.0, 4, torch.Generator().manual_seed(0)) * weights).sum().backward()
    for gate in masks.parameters():
        assert torch.isfinite(gate.grad).all() and gate.grad.abs().min() > 1e-6


@pytest.mark.parametrize(("trade", "partner"), [(-1, "marginals"), (0, "logits"), (1, "logits")])
def test_gates_learn_the_best_mask(trade, partner):
    """Blocks of known worth: the decision is the best mask that there is, with the trade it needs."""
    worth = {
        -1: [0.1, 1.0, 0.0, 0.2, 0.8, 0.0, 0.9, 0.7],
        0: [0.1, 1.0, 0.0, 0.9, 0.2, 0.8, 0.1, 0.7],
        1: [0.7, 1.0, 0.0, 0.9, 0.2, 0.8, 0.1, 0.0],
    }[trade]
    masks = distribution("two", None, partner=partner)
    optimizer = torch.optim.Adam(masks.parameters(), lr=2e-3)
    annealing, generator = Annealing(), torch.Generator().manual_seed(0)
    for step in range(60):
        optimizer.zero_grad()
        drawn = masks.sample(*annealing.at(step / 59), count=8, generator=generator)
        (-drawn * torch.tensor(worth)).sum().backward()
        optimizer.step()
    best = sorted(range(8), key=lambda block: -worth[block])[:4]
    assert kept_layers(masks.final()) == tuple(sorted(best))
    assert masks.final()[:4].sum() == 2 + trade and masks.confidence() > 0.6


def test_the_decision_is_by_marginals():
    masks = distribution("two", None)
    for gate in masks.option_gates:
        set_probabilities(gate, PARTED)
    torch.testing.assert_close(masks.marginals().detach(), torch.tensor([0.7, 0.4, 0.6, 0.3] * 2))
    for q, wanted in (
        ((0.6, 0.3, 0.1), (0, 4, 5, 6)),
        ((0.3, 0.4, 0.3), (0, 2, 4, 6)),
        ((0.1, 0.3, 0.6), (0, 1, 2, 4)),
        ((0.5, 0.5, 0.0), (0, 2, 4, 6)),
    ):
        set_probabilities(masks.pair_gates[0], q)
        assert kept_layers(masks.final()) == wanted
    alone = distribution("two", None, pairs=False)
    for gate in alone.option_gates:
        set_probabilities(gate, PARTED)
    assert kept_layers(alone.final()) == (0, 2, 4, 6)
    assert kept_layers(alone.final(decision="options")) == (0, 1, 4, 5)
    with pytest.raises(ConfigError, match="without pairs"):
        masks.final(decision="options")


def test_an_untrained_distribution_favours_no_block():
    masks = distribution("tinysr", None)
    torch.testing.assert_close(masks.expected().detach(), torch.full((24,), 0.5))
    assert kept_layers(masks.final()) == tuple(block for block in range(24) if block % 4 < 2)
    assert masks.confidence() == pytest.approx((6 / 6 + 3 / 3) / 9)


def test_a_decided_distribution_is_sampled_as_decided():
    masks = distribution("two", None)
    for gate in masks.option_gates:
        gate.data += torch.tensor([0.0, 0.1, 0.5, 0.1, 0.2, 0.0])
    masks.pair_gates[0].data[0] += 0.5
    drawn = masks.sample(0.1, 100.0, 20, torch.Generator().manual_seed(0)).detach()
    # Blocks 0 and 3 of each; what is left of all others says that the first loses 0, and that the second wins 1.
    assert kept_layers(masks.final()) == (3, 4, 5, 7)
    assert (drawn == masks.final()).all() and (masks.expected() - masks.final()).abs().max() < 1e-3
    assert masks.confidence() > 0.99


def test_draws_depend_on_the_generator_alone():
    masks = distribution("tinysr")
    one, again, other = (masks.sample(1.0, 100.0, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and len(one.unique(dim=0)) > 1


def test_soft_masks_lie_between():
    masks = distribution("two")
    drawn, sharp = (
        masks.sample(tau, 10.0, 50, torch.Generator().manual_seed(0), hard=False).detach() for tau in (4.0, 0.01)
    )
    assert ((drawn > 0) & (drawn < 1)).all() and (drawn.sum(1) - masks.keep).abs().max() < 1
    assert (sharp - sharp.round()).abs().mean() < 0.03 < (drawn - drawn.round()).abs().mean()
    alone = distribution("two", pairs=False).sample(4.0, 10.0, 50, hard=False).detach()
    torch.testing.assert_close(alone.sum(1), torch.full((50,), 4.0))


def test_autocast_leaves_masks_alone():
    masks = distribution("tinysr")
    with torch.autocast("cpu", torch.bfloat16):
        drawn = masks.sample(1.0, 100.0, 5, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, masks.sample(1.0, 100.0, 5, torch.Generator().manual_seed(0)))


def test_annealing_goes_in_a_straight_line():
    assert Annealing().at(0) == (4.0, 100.0) and Annealing().at(1) == pytest.approx((0.1, 100.0))
    assert Annealing((4.0, 2.0), [10.0, 100.0]).at(0.5) == (3.0, 55.0)
    assert Annealing((1.0,), (2.0,)).at(0.7) == (1.0, 2.0)


def test_masks_and_blocks():
    assert layer_mask([0, 3], 4).tolist() == [1, 0, 0, 1] and kept_layers(torch.tensor([0, 1.0, 1])) == (1, 2)
    for mask in ([0.5, 1.0], [0.0, 0.0], [[1.0]]):
        with pytest.raises(ConfigError, match="decided mask"):
            kept_layers(torch.tensor(mask))
    for kept in ([], [1, 0], [0, 0], [-1, 2], [0, 4]):
        with pytest.raises(ConfigError, match="rising numbers"):
            layer_mask(kept, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group(0, 0), "needs a block"),
        (lambda: Group(4, 5), "not 5 of 4"),
        (lambda: Group(24, 12), "2704156 ways"),
        (lambda: even_groups(0), "cannot be cut"),
        (lambda: even_groups(8, 4, 5), "cannot be cut"),
        (lambda: MaskDistribution([]), "keep no block"),
        (lambda: MaskDistribution([Group(4, 0)]), "keep no block"),
        (lambda: MaskDistribution([Group(4, 2)], partner="best"), "marginals, logits, not 'best'"),
        (lambda: Annealing(tau=(4.0, 0.0)), "tau must be"),
        (lambda: Annealing(scaling=()), "scaling must be"),
        (lambda: MaskDistribution([Group(4, 2)]).final(decision="x"), "decision must be"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

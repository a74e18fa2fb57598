"""Which blocks of a transformer stay: distributions over masks, sampling that gradients pass, and the decision.

Depth pruning of TinySR (arXiv 2508.17434): Dynamic Inter-block Activation and Expansion-Corrosion, on top of
TinyFusion's local groups (arXiv 2412.01199). The N blocks are cut into groups of adjacent ones, of which each keeps
some; two adjacent groups form a pair, within which one block more may stay in one group and one less in the other.

    p_j(m) = softmax(scaling * option_gates[j])   over the binary masks m of group j that keep its count
    q_i(s) = softmax(scaling * pair_gates[i])     over s = 0, 1, 2: the first group of pair i loses one block to the
                                                  second, nothing moves, or it wins one
    pi_l   = sum over m with m_l = 1 of p_j(m)    the marginal of block l

A sample draws m ~ p_j in each group and s ~ q_i in each pair (`gumbel_softmax`). Where a group wins or loses a block, a
partner m^ of m says which (`swaps`):

    expansion   m or m^  = m + m^ - m * m^
    corrosion   m and m^ = m * m^
    first group:   [m and m^, m, m or m^] at s          second group: [m or m^, m, m and m^] at s

Everything here is a function of gates and of a generator; `search` puts masks onto a network.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError

# Who says which block a group wins or loses: the paper, and the published code.
PARTNERS = ("marginals", "logits")
# How the decision is made within a group: TinySR's, and TinyFusion's.
DECISIONS = ("marginals", "options")
# All gates begin here (models/tinyfusion/tinysr_sd3.py), so that every choice is as likely as every other.
INITIAL_GATE = 0.02
# Of a group: more of them is a sign that the group should be cut.
MAX_OPTIONS = 20_000
# Scaled logits and log-odds that differ by no more are the same.
TIE = 1e-4


@dataclass(frozen=True)
class Group:
    """Adjacent blocks that are decided upon together.

    Args:
        size: how many they are, from 1.
        keep: how many of them stay, 0..size; 0 and `size` leave nothing to choose but by trade.

    Raises:
        ConfigError: for other numbers, or for more ways to choose than `MAX_OPTIONS`.
    """

    size: int
    keep: int

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.keep <= self.size:
            raise ConfigError(f"A group needs a block, and keeps 0 to all of them, not {self.keep} of {self.size}.")
        if math.comb(self.size, self.keep) > MAX_OPTIONS:
            raise ConfigError(
                f"There are {math.comb(self.size, self.keep)} ways of keeping {self.keep} of {self.size} blocks, more "
                f"than {MAX_OPTIONS}; use smaller groups."
            )


def even_groups(depth: int, size: int = 4, keep: int = 2) -> tuple[Group, ...]:
    """Groups of `size` blocks of which `keep` stay, for a transformer of any depth; by default TinySR's.

    Where `size` does not divide `depth`, there are as few groups as sizes up to `size` allow, of sizes that differ by
    at most one, the larger first: no group is left with a block or two and nothing to choose. What is kept then is the
    share keep / size: R(depth * keep / size) blocks in all, and a group that reaches from block a to before block b
    keeps R(b * keep / size) - R(a * keep / size) of them; R rounds halves up. So 10 blocks are groups of 4, 3 and 3,
    of which 2, 2 and 1 stay.

    Raises:
        ConfigError: if `depth` or `size` is not at least 1, `keep` not 0..`size`, or no block stays.
    """
    if depth < 1 or size < 1 or not 0 <= keep <= size:
        raise ConfigError(f"{depth} blocks cannot be cut into groups of {size} that keep {keep}.")

    def kept_before(block: int) -> int:
        return (2 * block * keep + size) // (2 * size)

    if not kept_before(depth):
        raise ConfigError(f"Keeping {keep} of {size} leaves none of {depth} blocks; keep more.")
    count = -(-depth // size)
    least, larger = divmod(depth, count)
    ends = list(itertools.accumulate([least + 1] * larger + [least] * (count - larger)))
    return tuple(Group(b - a, kept_before(b) - kept_before(a)) for a, b in zip([0, *ends], ends, strict=False))


@dataclass(frozen=True)
class Annealing:
    """Temperature and scaling over a search; one number, or two to go from to in a straight line.

    Args:
        tau: temperature of the Gumbel-softmax: the lower, the closer gradients are to those of a choice.
        scaling: of all gates before the softmax: the higher, the less a gate has to move to decide.

    The defaults are published for both TinyFusion and TinySR. Their progress is that of the whole run: one
    counted within epochs would begin anew with each.

    Raises:
        ConfigError: for numbers that are not above 0.
    """

    tau: Sequence[float] = (4.0, 0.1)
    scaling: Sequence[float] = (100.0, 100.0)

    def __post_init__(self) -> None:
        for name, values in (("tau", self.tau), ("scaling", self.scaling)):
            if len(values) not in (1, 2) or not all(value > 0 for value in values):
                raise ConfigError(f"{name} must be one or two numbers above 0, not {list(values)}.")

    def at(self, progress: float) -> tuple[float, float]:
        """tau and scaling, `progress` 0..1 through the run: step / (steps - 1)."""
        tau, scaling = (values[0] + (values[-1] - values[0]) * progress for values in (self.tau, self.scaling))
        return tau, scaling


def binary_options(group: Group) -> Tensor:
    """All masks of a group, (C(size, keep), size) of 0.0 and 1.0, in the order of `itertools.combinations`."""
    rows = list(itertools.combinations(range(group.size), group.keep))
    options = torch.zeros(len(rows), group.size)
    for row, kept in enumerate(rows):
        options[row, list(kept)] = 1
    return options


def layer_marginals(probabilities: Tensor, options: Tensor) -> Tensor:
    """pi_l = sum over options m with m_l = 1 of p(m): (C,) and (C, size) to (size,), each 0..1, `keep` in sum."""
    return probabilities @ options


def layer_log_odds(logits: Tensor, options: Tensor) -> Tensor:
    """log pi_l - log(1 - pi_l): in the order of pi, also where float32 rounds it to 0 or 1; (C,), (C, size) to (size,).

    It is infinite where every option holds a block, or none.
    """

    def log_sum(holds: Tensor) -> Tensor:
        return logits[:, None].masked_fill(~holds, -math.inf).logsumexp(0)

    return log_sum(options > 0.5) - log_sum(options < 0.5)


def gumbel_softmax(logits: Tensor, tau: float, generator: torch.Generator | None = None, hard: bool = True) -> Tensor:
    """A choice from softmax(logits), with gradient: softmax((g + log p) / tau), g ~ Gumbel(0, 1) (arXiv 1611.01144).

    Args:
        logits: (..., C); log p up to a number that is the same for all. -inf is never chosen.
        tau: temperature, above 0.
        generator: draws g; its device may be another than the logits'.
        hard: exactly one-hot, with the gradient of the softmax (straight-through); else the softmax itself.

    Returns:
        (..., C), rows sum to 1.
    """
    noise = -_exponential(logits.shape, generator).log()
    soft = ((logits + noise.to(logits)) / tau).softmax(-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return one_hot + (soft - soft.detach())  # the bracket is exactly 0: masks are exactly 0 and 1


@torch.no_grad()
def swaps(picked: Tensor, options: Tensor, logits: Tensor, partner: str = "marginals") -> tuple[Tensor, Tensor]:
    """Which block a group loses (corrosion), and which it wins (expansion), after it picked masks.

    The partner of m is m^ = m - dropped + added, so that |m or m^| - |m| = 1 = |m| - |m and m^|.

    * "marginals" (paper): blocks enter m^ in the order of falling pi until the condition holds. So the block that is
      won is the one outside of m with the largest pi, the one that is lost the one inside with the smallest.
    * "logits" (published code): m^ is the option with the largest logit among those that differ from m and share a
      block with it. Of 4 blocks of which 2 stay, such options differ from m in one block; for other numbers this is
      asked of them (a larger difference would not move one block, and 1 of n would have no partner). A group with a
      single option goes by marginals, which are alike.

    What is alike is drawn with equal probability.

    Args:
        picked: masks (R, size) of the group, each one of its options.
        options: all of them, (C, size).
        logits: (C,), scaled.
        partner: one of `PARTNERS`.

    Returns:
        Distributions (R, size) of the block that is dropped and of the one that is added; rows sum to 1, or to 0 where
        the mask holds no block, or all.
    """
    inside, outside = picked > 0.5, picked < 0.5
    if partner == "marginals" or len(options) == 1:
        odds = layer_log_odds(logits, options)
        return _best(-odds, inside), _best(odds, outside)
    neighbours = (picked @ options.T).round() == picked.sum(-1, keepdim=True).round() - 1
    expected = _best(logits, neighbours) @ options  # m^, over what is alike
    return picked * (1 - expected), (1 - picked) * expected


def expansion(mask: Tensor, partner: Tensor) -> Tensor:
    """m or m^, relaxed to m + m^ - m * m^ (paper).

    The published clamp(m + m^, 0, 1) has the same values, but lets the gradient of a block that m^ adds through to m,
    on which that block does not depend.
    """
    return mask + partner - mask * partner


def corrosion(mask: Tensor, partner: Tensor) -> Tensor:
    """m and m^, relaxed to m * m^."""
    return mask * partner


class MaskDistribution(nn.Module):
    """A learnable distribution over which blocks of a transformer stay.

    Args:
        groups: from the first block on; together they are the transformer. Sizes and counts may differ.
        pairs: whether groups 0 and 1, 2 and 3, ... may trade one block; without it the distribution is TinyFusion's.
            The last of an odd number of groups trades with nobody. A trade that a pair has no room for (a group would
            win a block when it keeps all, or lose one when it keeps none) has probability 0.
        partner: who says which block is won or lost, "marginals" (paper) or "logits" (published code).

    Attributes:
        option_gates: for each group (C,), one number for each of its options.
        pair_gates: for each pair (3,), for losing a block to the second group, for no trade, and for winning one.

    Raises:
        ConfigError: for an unknown partner, for no groups, and if no block stays.
    """

    def __init__(self, groups: Sequence[Group], pairs: bool = True, partner: str = "marginals"):
        super().__init__()
        if partner not in PARTNERS:
            raise ConfigError(f"partner must be one of {', '.join(PARTNERS)}, not {partner!r}.")
        if not sum(group.keep for group in groups):
            raise ConfigError("The groups keep no block at all.")
        self.groups, self.partner = tuple(groups), partner
        gates = [torch.full((math.comb(group.size, group.keep),), INITIAL_GATE) for group in groups]
        self.option_gates = nn.ParameterList(nn.Parameter(gate) for gate in gates)
        count = len(groups) // 2 if pairs else 0
        self.pair_gates = nn.ParameterList(nn.Parameter(torch.full((3,), INITIAL_GATE)) for _ in range(count))
        for index, group in enumerate(groups):
            self.register_buffer(f"options_{index}", binary_options(group), persistent=False)
        for index in range(count):
            first, second = groups[2 * index : 2 * index + 2]
            room = [
                first.keep > 0 and second.keep < second.size,
                True,
                first.keep < first.size and second.keep > 0,
            ]
            self.register_buffer(f"room_{index}", torch.tensor(room), persistent=False)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(group.size for group in self.groups)

    @property
    def keep(self) -> int:
        """How many of them stay, whatever is sampled or decided."""
        return sum(group.keep for group in self.groups)

    def options(self, index: int) -> Tensor:
        """All masks of a group, (C, size)."""
        return getattr(self, f"options_{index}")

    def sample(
        self,
        tau: float,
        scaling: float,
        count: int = 1,
        generator: torch.Generator | None = None,
        hard: bool = True,
    ) -> Tensor:
        """Masks (count, depth), with gradient to all gates.

        The published training has one picture in a batch and so one mask for it, on 8 devices; here each picture of a
        batch may have its own.

        Args:
            tau, scaling: of `Annealing.at`.
            count: how many masks are drawn, independently.
            generator: of all that is drawn; on any device.
            hard: exactly 0 and 1, exactly `keep` of them 1. Else what is drawn is mixed: entries lie in 0..1, and where
                a trade is part of the mixture they only about sum to `keep`.
        """
        found: list[Tensor] = []
        moves: Tensor | None = None
        with torch.autocast(self.option_gates[0].device.type, enabled=False):
            for index in range(len(self.groups)):
                if index % 2 == 0:
                    moves = self._sample_move(index // 2, tau, scaling, count, generator, hard)
                logits, options = self._logits(index, scaling), self.options(index)
                choice = gumbel_softmax(logits.expand(count, -1), tau, generator, hard)
                mask = choice @ options
                if moves is not None:
                    picked = options[choice.argmax(-1)]
                    dropped, added = (_draw(of, generator) for of in swaps(picked, options, logits, self.partner))
                    partner = picked - dropped + added  # without gradient
                    fewer, more = corrosion(mask, partner), expansion(mask, partner)
                    candidates = [fewer, mask, more] if index % 2 == 0 else [more, mask, fewer]
                    mask = (moves[..., None] * torch.stack(candidates, dim=1)).sum(1)
                found.append(mask)
        return torch.cat(found, dim=-1)

    def probabilities(self, scaling: float = 100.0) -> tuple[list[Tensor], list[Tensor]]:
        """p(m) of each group, (C,), in the order of its options; q(s) of each pair, (3,). With gradient."""
        return (
            [self._logits(index, scaling).softmax(-1) for index in range(len(self.groups))],
            [self._pair_logits(index, scaling).softmax(-1) for index in range(len(self.pair_gates))],
        )

    def marginals(self, scaling: float = 100.0) -> Tensor:
        """pi of every block, (depth,): how likely its group keeps it before anything is traded."""
        options, _ = self.probabilities(scaling)
        return torch.cat([layer_marginals(p, self.options(index)) for index, p in enumerate(options)])

    def expected(self, scaling: float = 100.0) -> Tensor:
        """The mean of all masks that `sample` may draw, exactly: (depth,), 0..1, `keep` in sum.

        E[mask] = sum over s of q(s) * sum over m of p(m) * (m, without the block it loses, or with the one it wins)
        """
        found = []
        of_options, of_pairs = self.probabilities(scaling)
        for index, p in enumerate(of_options):
            options, logits = self.options(index), self._logits(index, scaling)
            mean = layer_marginals(p, options)
            if index // 2 < len(of_pairs):
                loses, _, wins = of_pairs[index // 2] if index % 2 == 0 else of_pairs[index // 2].flip(0)
                for weights, rows in zip(p.split(1024), options.split(1024), strict=True):
                    dropped, added = swaps(rows, options, logits, self.partner)
                    mean = mean - loses * (weights @ dropped) + wins * (weights @ added)
            found.append(mean)
        return torch.cat(found)

    @torch.no_grad()
    def final(self, scaling: float = 100.0, decision: str = "marginals") -> Tensor:
        """The mask that the search has come to, (depth,) of 0.0 and 1.0, `keep` of them 1.

        "marginals" (TinySR): the most likely trade of each pair says how many blocks a group keeps; these are the ones
        with the largest pi. "options" (TinyFusion, prune_by_learning.py): the most likely option of each group.

        What is alike is decided for no trade, and for the first blocks and options.

        Args:
            scaling: of the gates.
            decision: one of `DECISIONS`.

        Raises:
            ConfigError: for an unknown decision, and for options where there are pairs: no option has another count.
        """
        if decision not in DECISIONS or (decision == "options" and len(self.pair_gates)):
            raise ConfigError(
                f"decision must be one of {', '.join(DECISIONS)}, the latter without pairs, not {decision!r}."
            )
        found = []
        for index, group in enumerate(self.groups):
            options, logits, keep = self.options(index), self._logits(index, scaling), group.keep
            if decision == "options":
                found.append(options[_first_best(logits)])
                continue
            if index // 2 < len(self.pair_gates):
                move = self._pair_logits(index // 2, scaling)
                won = 0 if move[1] >= move.max() - TIE else _first_best(move) - 1
                keep += won if index % 2 == 0 else -won
            mask, odds = torch.zeros_like(options[0]), layer_log_odds(logits, options)
            for _ in range(keep):
                mask[_first_best(odds.masked_fill(mask > 0, -math.inf))] = 1
            found.append(mask)
        return torch.cat(found)

    @torch.no_grad()
    def confidence(self, scaling: float = 100.0) -> float:
        """How decided the search is, for logs: the mean, over gates, of the largest probability; 1 is decided."""
        groups, pairs = self.probabilities(scaling)
        return torch.stack([p.max() for p in (*groups, *pairs)]).mean().item()

    def _logits(self, index: int, scaling: float) -> Tensor:
        return scaling * self.option_gates[index].float()

    def _pair_logits(self, index: int, scaling: float) -> Tensor:
        room = getattr(self, f"room_{index}")
        return (scaling * self.pair_gates[index].float()).masked_fill(~room, -math.inf)

    def _sample_move(
        self, pair: int, tau: float, scaling: float, count: int, generator: torch.Generator | None, hard: bool
    ) -> Tensor | None:
        """s of a pair, (count, 3), which both of its groups share; None where a group trades with nobody."""
        if pair >= len(self.pair_gates):
            return None
        return gumbel_softmax(self._pair_logits(pair, scaling).expand(count, -1), tau, generator, hard)


def layer_mask(kept: Sequence[int], depth: int) -> Tensor:
    """A mask (depth,) with 1.0 for the blocks that are kept.

    Raises:
        ConfigError: if they are none, not rising, or outside of 0..depth-1.
    """
    if not kept or list(kept) != sorted({*kept}) or kept[0] < 0 or kept[-1] >= depth:
        raise ConfigError(f"The blocks to keep must be rising numbers from 0 to {depth - 1}, not {list(kept)}.")
    mask = torch.zeros(depth)
    mask[list(kept)] = 1
    return mask


def kept_layers(mask: Tensor) -> tuple[int, ...]:
    """The blocks that a mask (depth,) keeps, by their numbers.

    Raises:
        ConfigError: if it holds anything but 0 and 1, or no 1.
    """
    values = mask.detach().flatten().tolist()
    if mask.ndim != 1 or not {*values} <= {0.0, 1.0} or not any(values):
        raise ConfigError(f"A decided mask holds 0 and 1, one number a block and at least one 1, not {mask.tolist()}.")
    return tuple(index for index, value in enumerate(values) if value)


def _exponential(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    return torch.empty(shape, device=device).exponential_(generator=generator)


def _best(scores: Tensor, among: Tensor) -> Tensor:
    """Rows of `among` (R, X) to equal shares of what has the largest score (X,) in them; of nothing, zeros."""
    best = scores.masked_fill(~among, -math.inf)
    alike = (among & (best >= best.amax(-1, keepdim=True) - TIE)).to(scores)
    return alike / alike.sum(-1, keepdim=True).clamp(min=1)


def _first_best(scores: Tensor) -> int:
    """The first of those that are as large as the largest."""
    return int((scores >= scores.max() - TIE).int().argmax())


@torch.no_grad()
def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of each row (R, X), as one-hot rows, with probability in proportion to its weight; of zeros, zeros."""
    race = _exponential(weights.shape, generator).to(weights)
    return F.one_hot((weights / race).argmax(-1), weights.shape[-1]).to(weights) * (weights > 0)

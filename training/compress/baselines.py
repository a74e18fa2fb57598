"""How else the blocks that stay can be chosen, as masks (depth,) of 0.0 and 1.0 like the search's.

Most need only numbers; `BlockInfluence` watches the transformer at work, `tinyfusion` is learned as TinySR's search is.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ConfigError
from .masks import Group, MaskDistribution, layer_mask


def uniform(depth: int, keep: int) -> Tensor:
    """Blocks at equal distances, the first and the last among them: round(i * (depth - 1) / (keep - 1)), halves up.

    A single one is the first.

    Raises:
        ConfigError: if `keep` is not 1..depth, here and in the next three.
    """
    _check(depth, keep)
    gaps = max(keep - 1, 1)
    return layer_mask([(2 * index * (depth - 1) + gaps) // (2 * gaps) for index in range(keep)], depth)


def first(depth: int, keep: int) -> Tensor:
    """The first blocks."""
    _check(depth, keep)
    return layer_mask(range(keep), depth)


def last(depth: int, keep: int) -> Tensor:
    """The last blocks."""
    _check(depth, keep)
    return layer_mask(range(depth - keep, depth), depth)


def ends(depth: int, keep: int) -> Tensor:
    """The first and the last blocks, without those in the middle; one more of the first where `keep` is odd."""
    _check(depth, keep)
    front = (keep + 1) // 2
    return layer_mask([*range(front), *range(depth - keep + front, depth)], depth)


# Those that ask for nothing but numbers: `BASELINES[name](depth, keep)`.
BASELINES: dict[str, Callable[[int, int], Tensor]] = {"uniform": uniform, "first": first, "last": last, "ends": ends}


class BlockInfluence:
    """How much each block changes the picture's tokens, over all that the transformer computes within the block.

    With c the cosine of a token's hidden states X_i before and X_{i+1} after block i, and E the mean over tokens and
    pictures:

        cosine    BI_i = 1 - E[c]                    Block Influence of ShortGPT, arXiv 2403.03853: 0..2
        angular   d_i  = E[arccos(c)] / pi           arXiv 2403.17887, for one block: 0..1

    Both papers look at a language model's one stream; here it is the picture's, because the prompt's is dropped when a
    TinySR is baked. The second looks at the last token alone, which sees all others there; here all are alike.

        with BlockInfluence(transformer) as influence:
            transformer(...)                         # on as many pictures as wanted
        mask = by_influence(influence.scores(), keep)

    Args:
        transformer: with `transformer_blocks` like SD3's.
        distance: "cosine" or "angular".

    Raises:
        ConfigError: for an unknown distance.
    """

    def __init__(self, transformer: Any, distance: str = "cosine"):
        if distance not in ("cosine", "angular"):
            raise ConfigError(f"distance must be cosine or angular, not {distance!r}.")
        self._blocks, self._distance = transformer.transformer_blocks, distance
        self._sums = torch.zeros(len(self._blocks), dtype=torch.float64)
        self._counts = torch.zeros(len(self._blocks), dtype=torch.int64)
        self._hooks: list[Any] = []

    def __enter__(self) -> "BlockInfluence":
        self._hooks = [
            block.register_forward_hook(partial(self._look, index), with_kwargs=True)
            for index, block in enumerate(self._blocks)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def scores(self) -> Tensor:
        """(depth,), on the CPU.

        Raises:
            ConfigError: if nothing was computed.
        """
        if not self._counts.all():
            raise ConfigError("The transformer has computed nothing yet: run it within the block.")
        return (self._sums / self._counts).float()

    @torch.no_grad()
    def _look(self, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cosine = F.cosine_similarity(before.float(), output[1].float(), dim=-1)
        changed = 1 - cosine if self._distance == "cosine" else cosine.clamp(-1, 1).arccos() / math.pi
        self._sums[index] += changed.sum().cpu()
        self._counts[index] += changed.numel()


def by_influence(scores: Tensor, keep: int) -> Tensor:
    """The `keep` blocks with the largest scores (depth,); the earlier ones of those that are alike."""
    _check(len(scores), keep)
    order = scores.argsort(descending=True, stable=True)
    return layer_mask(sorted(order[:keep].tolist()), len(scores))


def tinyfusion(groups: Sequence[Group]) -> MaskDistribution:
    """TinyFusion's distribution (arXiv 2412.01199): local groups that trade nothing.

    It is sampled, trained (in `DepthSearch`) and annealed as TinySR's; the decision is
    `final(decision="options")`. TinyFusion's own training has gates at ten times the rate of the weights, which is up
    to the optimiser.
    """
    return MaskDistribution(groups, pairs=False)


def _check(depth: int, keep: int) -> None:
    if not 1 <= keep <= depth:
        raise ConfigError(f"From 1 to {depth} blocks can stay, not {keep}.")

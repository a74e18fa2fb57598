"""TinySR of any one-step SD3 model (arXiv 2508.17434): `run` is the whole of it, stage by stage (`stages`, `config`).

What is exported here is the search for the blocks that stay. `masks`: the distribution over masks, with its formulas;
`search`: a mask on a transformer, LoRA co-training, the pruned transformer; `baselines`: how else blocks are chosen. A
training loop does, in each step,

    mask = search.masks.sample(*annealing.at(progress), count=len(latents), generator=draws(seed, ...))
    with search.role(STUDENT, mask):
        z = model(latents, prompt)                      # model: the search, or what DDP put around it
        with search.role(TEACHER), torch.no_grad():
            wanted = search(latents, prompt)
        (terms of z and wanted).backward()

and at the end `search.pruned(search.masks.final())`.
"""

from .baselines import BASELINES, BlockInfluence, by_influence, ends, first, last, tinyfusion, uniform
from .masks import (
    Annealing,
    Group,
    MaskDistribution,
    even_groups,
    gumbel_softmax,
    kept_layers,
    layer_marginals,
    layer_mask,
)
from .search import DepthSearch, masked, prune, pruned_config, pruned_weights

__all__ = [
    "BASELINES",
    "Annealing",
    "BlockInfluence",
    "DepthSearch",
    "Group",
    "MaskDistribution",
    "by_influence",
    "ends",
    "even_groups",
    "first",
    "gumbel_softmax",
    "kept_layers",
    "last",
    "layer_marginals",
    "layer_mask",
    "masked",
    "prune",
    "pruned_config",
    "pruned_weights",
    "tinyfusion",
    "uniform",
]

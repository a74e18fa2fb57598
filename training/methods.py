"""The methods, as what they set of a phase: `objective: tsd | vsd | tad` in a recipe, or as a flag.

A method is a choice of terms, and the terms decide all else: which roles, networks and optimisers a run has.

| | reconstruction | score distillation | also |
| --- | --- | --- | --- |
| tsd | latent_mse | tsd: lambda 0.7, 4 points (DASM) | a fake score |
| vsd | latent_mse | tsd: lambda 1, 1 point | a fake score |
| tad | teacher_mse | hsd | latent_adversarial: a discriminator of noisy latents |

Whatever a recipe or a flag says of a phase wins over this.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        title: its name.
        paper: where it is published.
        settings: of a phase, where they differ from the defaults, which are those of TSD-SR.
    """

    title: str
    paper: str
    settings: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "tsd": Method("TSD-SR", "https://arxiv.org/abs/2411.18263"),
    # Equations 3 to 7: variational score distillation beside reconstruction, both of weight 1.
    "vsd": Method("OSEDiff", "https://arxiv.org/abs/2406.08177", {"vsd_weight": 1.0, "dasm_steps": 1}),
    # Equation 12 with the released weights of the variant that distils ResShift.
    "tad": Method(
        "TAD-SR",
        "https://arxiv.org/abs/2408.07476",
        {"latent_mse": [0.0], "tsd": [0.0], "teacher_mse": [1.0], "hsd": [1.0], "latent_adversarial": [0.02]},
    ),
}
# What a method sets, in any of them.
SET = frozenset(name for method in METHODS.values() for name in method.settings)

"""Random numbers that depend on a seed and a key alone, never on what was drawn before."""

import numpy as np
import torch

# What a stream of numbers is for, the first part of a key: what one of them draws leaves the others alone.
ORDER, CROPS, DEGRADATION, PLACES, SCORES, FAKE_SCORE, PRETRAINING = range(7)
SAMPLING, SIZES, RESTORING, JUDGED, MASKS, SHIFTS = range(7, 13)


def draws(seed: int, *key: int) -> torch.Generator:
    """A CPU generator: the same seed and key (whole numbers from 0) always give the same numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0]))

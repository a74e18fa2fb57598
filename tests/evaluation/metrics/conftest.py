"""Pictures that are the same everywhere, made of whole numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def pair() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function for a softened picture and its original: `pair(height, width)`, 8 bits as (1, 3, H, W), 0..1."""

    def make(height: int, width: int, grey: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        generator = np.random.Generator(np.random.PCG64(0))
        channels = 1 if grey else 3
        coarse = generator.integers(30, 226, (-(-height // 8), -(-width // 8), channels))
        hr = np.kron(coarse, np.ones((8, 8, 1), int))[:height, :width]
        hr = hr + generator.integers(-20, 21, hr.shape)
        sr = sum(np.roll(hr, shift, (0, 1)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1))) // 4
        sr = sr + generator.integers(-5, 6, sr.shape)
        return tensor(sr), tensor(hr)

    return make


def tensor(picture: np.ndarray) -> torch.Tensor:
    """Levels (H, W, 1 or 3) -> (1, 3, H, W), float32, 0..1."""
    rgb = np.broadcast_to(picture.clip(0, 255), (*picture.shape[:2], 3)).astype(np.float32)
    return torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="session")
def from_levels() -> Callable[[np.ndarray], torch.Tensor]:
    """A function for pictures of levels: (H, W, 1 or 3) -> (1, 3, H, W), float32, 0..1, after rounding to 8 bits."""
    return lambda picture: tensor(np.rint(picture))

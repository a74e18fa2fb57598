"""Photographs of a few pixels, real files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tsdsr.imaging import Picture, write


@pytest.fixture
def save() -> Callable[..., Path]:
    """A function that writes a picture of random pixels: `save(path, height, width)`."""

    def make(path: Path, height: int = 40, width: int = 48, seed: int | None = None) -> Path:
        # Without a seed each name has its own pixels, so a picture is known by what it shows.
        pixels = np.random.default_rng(list(path.name.encode()) if seed is None else seed).random((height, width, 3))
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(Picture(pixels.astype(np.float32)), path)

    return make


@pytest.fixture
def folder(tmp_path, save) -> Path:
    """Ten photographs of different sizes, none smaller than 40 pixels."""
    for number in range(10):
        save(tmp_path / "photographs" / f"p{number}.png", 40 + 2 * number, 52 - number)
    return tmp_path / "photographs"

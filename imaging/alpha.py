"""Colours behind transparency."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_LEVELS = 6
_BLOCK = 1 << _LEVELS  # how far colours reach into what is hidden


def fill_hidden(colours: Callable[[int, int], np.ndarray], alpha: np.ndarray, top: int, bottom: int) -> np.ndarray:
    """Rows with the colours under full transparency taken from their visible neighbours, near ones first.

    Pull and push (Gortler and others, The Lumigraph, SIGGRAPH 1996, 3.4): averages of the visible pixels over squares
    of 2, 4, ... 64 pixels, of which each pixel takes the smallest that has any. What is further from all that is
    visible takes grey. The squares lie on one grid for the whole picture, so that it does not matter how it is cut.

    Args:
        colours: gives rows of the picture, float32 (bottom - top, W, 3), for (top, bottom).
        alpha: of the whole picture, (H, W), of any type; zero is hidden.
        top, bottom: the rows asked for.

    Returns:
        float32 (bottom - top, W, 3), contiguous.
    """
    if alpha[top:bottom].all():
        return np.ascontiguousarray(colours(top, bottom))
    height, width = alpha.shape
    # Whole squares, and one more on each side for the averages over neighbouring ones.
    first = max(0, (top // _BLOCK - 1) * _BLOCK)
    last = min(height, (-(-bottom // _BLOCK) + 1) * _BLOCK)
    visible = alpha[first:last] > 0
    rgb = np.where(visible[..., None], colours(first, last), np.float32(0))
    padded = np.zeros((-(-(last - first) // _BLOCK) * _BLOCK, -(-width // _BLOCK) * _BLOCK, 4), np.float32)
    padded[: last - first, :width, :3] = rgb
    padded[: last - first, :width, 3] = visible
    levels = [padded]
    for _ in range(_LEVELS):
        finer = levels[-1]
        levels.append(finer.reshape(finer.shape[0] // 2, 2, finer.shape[1] // 2, 2, 4).mean(axis=(1, 3)))
    filled = np.full((*levels[-1].shape[:2], 3), 0.5, np.float32)
    for level in reversed(levels):
        if filled.shape[:2] != level.shape[:2]:
            filled = _smoothed(filled.repeat(2, axis=0).repeat(2, axis=1))
        weight = level[..., 3:]
        own = level[..., :3] / np.maximum(weight, 1e-6)
        # A square with few visible pixels knows their colour as well as one with many.
        filled = np.where(weight > 0, own, filled)
    return np.ascontiguousarray(filled[top - first : bottom - first, :width])


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Averages over 3 x 3, edges repeated."""
    padded = np.pad(values, ((1, 1), (0, 0), (0, 0)), mode="edge")
    values = (padded[:-2] + padded[1:-1] + padded[2:]) / np.float32(3)
    padded = np.pad(values, ((0, 0), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / np.float32(3)

"""Enlarging strip by strip, with what the whole picture would give."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image


class Enlarged:
    """A picture of another size (bicubic, as Pillow has it), of which any rows can be asked for.

    Args:
        rows: gives rows of the picture, float32 (bottom - top, W, C), for (top, bottom).
        size: of the picture, (H, W).
        new_size: (H', W').
    """

    def __init__(
        self, rows: Callable[[int, int], np.ndarray], size: tuple[int, int], new_size: tuple[int, int]
    ) -> None:
        self._rows, self._size, self._new_size = rows, size, new_size
        # Bicubic reaches two pixels, or two of the result where that is smaller; one more is for rounding.
        self._reach = math.ceil(2 * max(1.0, size[0] / new_size[0])) + 1

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows `top` to `bottom` of the result, float32 (bottom - top, W', C); bicubic overshoots."""
        if self._new_size == self._size:
            return self._rows(top, bottom)
        (height, width), (new_height, new_width) = self._size, self._new_size
        start, end = top * height / new_height, bottom * height / new_height
        first = max(0, math.floor(start) - self._reach)
        last = min(height, math.ceil(end) + self._reach)
        source = self._rows(first, last)
        box = (0, start - first, width, end - first)
        result = np.empty((bottom - top, new_width, source.shape[2]), np.float32)
        for channel in range(source.shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(source[..., channel]))
            resized = plane.resize((new_width, bottom - top), Image.Resampling.BICUBIC, box)
            result[..., channel] = np.asarray(resized)
        return result

"""JPEG compression as a degradation."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def jpeg_round_trip(rgb: np.ndarray, quality: int) -> np.ndarray:
    """Compresses with JPEG (4:2:0 chroma) and decodes again, in memory.

    Args:
        rgb: uint8 (H, W, 3).
        quality: 1 (worst) .. 100, libjpeg's scale.

    Returns:
        uint8 (H, W, 3), a new writable array.

    Raises:
        ValueError: wrong shape or type, or a quality outside 1..100.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"jpeg_round_trip takes uint8 (height, width, 3), not {rgb.dtype} {rgb.shape}.")
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be within 1..100, not {quality}.")
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=int(quality), subsampling="4:2:0")
    return np.array(Image.open(buffer))

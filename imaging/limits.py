"""How large a picture may be before it is taken for a decompression bomb."""

from __future__ import annotations

import ctypes
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

from PIL import Image

# A film of ten minutes in 720p. Frames are decoded one by one, so this bounds time, not memory.
_FRAMES_OF_THE_LARGEST_PICTURE = 100

_lock = threading.Lock()
_lifters = 0
_saved: int | None = None

# They warn through Python's last resort, on stderr, about files that are refused or read without what is damaged.
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


@lru_cache(maxsize=1)
def quiet_libtiff() -> None:
    """Pillow's libtiff writes to stderr what Pillow then raises; where it can be reached, it is told not to."""
    with suppress(Exception):
        for setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            getattr(ctypes.CDLL(Image.core.__file__), setter)(None)


@contextmanager
def bomb_limit(lifted: bool) -> Iterator[None]:
    """Lifts Pillow's limit if asked, and silences its warnings: about pictures near the limit, and about damaged
    metadata, which is left out.
    """
    global _lifters, _saved
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if not lifted:
            yield
            return
        # Counted, so that of two overlapping calls the later one to finish restores the true limit.
        with _lock:
            if _lifters == 0:
                _saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            _lifters += 1
        try:
            yield
        finally:
            with _lock:
                _lifters -= 1
                if _lifters == 0:
                    Image.MAX_IMAGE_PIXELS = _saved


def check_size(width: int, height: int, frames: int = 1) -> None:
    """Pillow's own limit, for what Pillow does not decode, and one for all frames together.

    Raises:
        PIL.Image.DecompressionBombError: more than twice `PIL.Image.MAX_IMAGE_PIXELS` a frame, or a hundred times that
            in all.
    """
    if Image.MAX_IMAGE_PIXELS is None:
        return
    limit = 2 * Image.MAX_IMAGE_PIXELS
    if width * height > limit:
        raise Image.DecompressionBombError(f"{width} x {height} pixels, where {limit} are the limit")
    if width * height * frames > _FRAMES_OF_THE_LARGEST_PICTURE * limit:
        raise Image.DecompressionBombError(f"{frames} frames of {width} x {height} pixels")

"""Files to pictures and back: every format Pillow knows, with bit depth, alpha, profile, orientation and metadata.

The only room that knows PIL and file formats. It needs NumPy and Pillow, never torch, so importing it is cheap.
"""

from .jpeg import jpeg_round_trip
from .picture import Picture
from .reading import UnreadableImageError, find_images, read
from .writing import SUPPORTED_OUTPUT_SUFFIXES, write

__all__ = [
    "SUPPORTED_OUTPUT_SUFFIXES",
    "Picture",
    "UnreadableImageError",
    "find_images",
    "jpeg_round_trip",
    "read",
    "write",
]

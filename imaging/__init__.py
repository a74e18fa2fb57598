"""Files to pictures and back: every format Pillow knows, with bit depth, alpha, profile, orientation and metadata.

The only room that knows PIL and file formats. It needs NumPy and Pillow, never torch, so importing it is cheap.
"""

from .jpeg import jpeg_round_trip
from .picture import Picture
from .reading import UnreadableImageError, find_images, read
from .sheet import COLORS, RESAMPLING, Crops, data_uri, draw_sheet, resize
from .writing import SUPPORTED_OUTPUT_SUFFIXES, write

__all__ = [
    "COLORS",
    "RESAMPLING",
    "SUPPORTED_OUTPUT_SUFFIXES",
    "Crops",
    "Picture",
    "UnreadableImageError",
    "data_uri",
    "draw_sheet",
    "find_images",
    "jpeg_round_trip",
    "read",
    "resize",
    "write",
]

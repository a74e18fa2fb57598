"""Files to pictures and back: every format Pillow knows, with bit depth, alpha, profile, orientation and metadata.

The only room that knows PIL and file formats. Importing it loads NumPy and Pillow, never torch; tifffile, pillow-heif
and OpenEXR are imported when a file needs them.
"""

from .jpeg import jpeg_round_trip
from .picture import Picture
from .reading import Frames, UnreadableImageError, find_images, open_frames, read
from .sheet import COLORS, RESAMPLING, Crops, LabelledPicture, data_uri, draw_rows, draw_sheet, resize
from .writing import SUPPORTED_OUTPUT_SUFFIXES, PictureWriter, create, write

__all__ = [
    "COLORS",
    "RESAMPLING",
    "SUPPORTED_OUTPUT_SUFFIXES",
    "Crops",
    "Frames",
    "LabelledPicture",
    "Picture",
    "PictureWriter",
    "UnreadableImageError",
    "create",
    "data_uri",
    "draw_rows",
    "draw_sheet",
    "find_images",
    "jpeg_round_trip",
    "open_frames",
    "read",
    "resize",
    "write",
]

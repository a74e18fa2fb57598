"""HEIC and HEIF through pillow-heif, which is installed or not."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np

from .decoding import Kind, fitting_profile
from .encoding import Layout
from .exif import PREFIX, resized
from .limits import check_size
from .picture import Picture

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class HeifFile:
    """The primary picture of a HEIF file, with 8 bits per channel or, where it has 10 or 12, in 16.

    libheif itself turns it upright, by the properties of the file, and EXIF's orientation does not count (ISO/IEC
    23008-12, A.2.1).
    """

    kind: Kind = "still"
    count = 1
    loop = 0

    def __init__(self, stream: BinaryIO) -> None:
        try:
            import pillow_heif
        except ImportError as error:
            raise ModuleNotFoundError("install the package pillow-heif with pip install pillow-heif") from error
        stream.seek(0)
        self._image = pillow_heif.open_heif(stream, convert_hdr_to_8bit=False)
        width, height = self._image.size
        check_size(width, height)
        self.size = height, width

    def load(self, index: int) -> Picture:
        info = self._image.info
        pixels = np.asarray(self._image)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        exif, xmp = info.get("exif"), info.get("xmp")
        if exif:
            exif = resized(exif if exif.startswith(PREFIX) else PREFIX + exif, pixels.shape[:2], None)
        return Picture(
            pixels=np.ascontiguousarray(pixels),
            icc_profile=fitting_profile(info.get("icc_profile"), pixels.shape[2] < 3),
            exif=exif or None,
            xmp=xmp if isinstance(xmp, bytes) else None,
        )


class HeifEncoder:
    """Writes HEIC, whose encoder wants the whole picture, of 8 bits per channel or 10."""

    def __init__(self, stream: BinaryIO, options: dict[str, Any]) -> None:
        self._stream, self._options = stream, options

    def begin(self, layout: Layout) -> None:
        self._layout = layout
        self._pixels = np.empty((*layout.size, layout.channels), f"u{layout.depth // 8}")
        self._top = 0

    def write(self, rows: np.ndarray) -> None:
        self._pixels[self._top : self._top + len(rows)] = rows
        self._top += len(rows)

    def end(self) -> None:
        import pillow_heif

        mode = _MODES[self._layout.channels] + (";16" if self._layout.depth == 16 else "")
        image = pillow_heif.from_bytes(mode, self._layout.size[::-1], self._pixels.tobytes())
        if self._layout.icc_profile is not None:
            image.info["icc_profile"] = self._layout.icc_profile
        # pillow-heif asks what it is given for a name.
        whole = io.BytesIO()
        image.save(whole, exif=self._layout.exif, xmp=self._layout.xmp, **self._options)
        self._stream.write(whole.getbuffer())

    def close(self) -> None:
        pass

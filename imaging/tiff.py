"""TIFF: written as a stream of strips, and read where Pillow has no mode for the pixels."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import numpy as np

from .decoding import Kind, PillowFile, fitting_profile, from_unknown_range, positive_pair, turned
from .deflate import deflated
from .encoding import Layout
from .exif import EXIF_IFD, GPS_IFD, descriptive
from .limits import check_size
from .picture import Picture

_BYTE, _ASCII, _SHORT, _LONG, _RATIONAL, _UNDEFINED, _LONG8 = 1, 2, 3, 4, 5, 7, 16
_STRIP = 1 << 18  # bytes before compression; TIFF 6.0 advises small strips, deflate likes larger ones

Entry = tuple[int, int, int, bytes]


class TiffByPillow(PillowFile):
    """A TIFF that Pillow opens, though it may have too few modes for its pixels."""

    def load(self, index: int) -> Picture:
        try:
            return super().load(index)
        except NotImplementedError:
            return TiffFile(self._stream).load(index)


class TiffFile:
    """A TIFF whose pixels Pillow has no mode for, such as floating point in colour, or 16 bits in grey with alpha.

    Raises:
        ValueError: compressed or coloured in a way that is not known.
    """

    loop = 0

    def __init__(self, stream: BinaryIO) -> None:
        import tifffile

        stream.seek(0)
        self._file = tifffile.TiffFile(stream)
        pages: Any = self._file.pages
        self._pages = [page for page in pages if not page.is_reduced and not page.is_mask]
        for page in self._pages:
            check_size(page.imagewidth, page.imagelength, len(self._pages))
        self.count = len(self._pages)
        self.kind: Kind = "pages" if self.count > 1 else "still"
        first = self._pages[0]
        sides = first.imagelength, first.imagewidth
        self.size = sides[::-1] if self._orientation(first) > 4 else sides

    @staticmethod
    def _orientation(page: Any) -> int:
        value = page.tags.valueof(274, 1)
        return value if value in range(1, 9) else 1

    def load(self, index: int) -> Picture:
        page = self._pages[index]
        end = self._file.filehandle.size
        strips = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        # Of strips that are not there it makes zeros.
        if not strips or any(not 0 < length <= end - offset for offset, length in strips):
            raise ValueError("its strips are not in the file")
        values = page.asarray()
        values = values[..., None] if page.axes == "YX" else np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
        photometric = int(page.photometric)
        if values.ndim != 3 or photometric not in (0, 1, 2):
            raise ValueError(f"pixels {page.axes} of {page.photometric!r}")
        colours = 3 if photometric == 2 else 1
        kind = next((int(k) for k in page.extrasamples if k in (1, 2)), 0) if values.shape[2] > colours else 0
        values = values[..., : colours + bool(kind)]
        if values.dtype not in (np.uint8, np.uint16):
            # One range for all channels but alpha, which has its own.
            parts = [from_unknown_range(part) for part in np.split(values, [colours], axis=2) if part.shape[2]]
            values = np.concatenate(parts, axis=2)
        if photometric == 0:
            largest = np.iinfo(values.dtype).max if values.dtype.kind == "u" else np.float32(1)
            values[..., :1] = largest - values[..., :1]
        if kind == 1:
            values = straight(values)
        dpi = positive_pair((self._ratio(page, 282), self._ratio(page, 283)))
        if dpi is not None and page.tags.valueof(296, 2) == 3:
            dpi = dpi[0] * 2.54, dpi[1] * 2.54
        turn = self._orientation(page)
        if dpi is not None and turn > 4:
            dpi = dpi[1], dpi[0]
        pixels = np.ascontiguousarray(turned(values, turn))
        profile, xmp = page.tags.valueof(34675), page.tags.valueof(700)
        return Picture(
            pixels=pixels.astype(pixels.dtype.newbyteorder("="), copy=False),
            icc_profile=fitting_profile(profile, colours == 1) if isinstance(profile, bytes) else None,
            xmp=xmp if isinstance(xmp, bytes) else None,
            dpi=dpi,
        )

    @staticmethod
    def _ratio(page: Any, tag: int) -> float | None:
        value = page.tags.valueof(tag)
        return value[0] / value[1] if isinstance(value, tuple) and len(value) == 2 and value[1] else None


def straight(values: np.ndarray) -> np.ndarray:
    """Colours that are multiplied by their alpha, the last channel, as they are without."""
    alpha = values[..., -1:].astype(np.float32)
    scale = np.divide(1, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    if values.dtype.kind == "u":
        largest = np.iinfo(values.dtype).max
        colours = np.rint(np.minimum(values[..., :-1] * scale, 1) * largest).astype(values.dtype)
    else:
        colours = (values[..., :-1] * scale).astype(values.dtype)
    return np.concatenate([colours, values[..., -1:]], axis=2)


class TiffEncoder:
    """Writes TIFF 6.0, with offsets of 64 bits (BigTIFF) where the pixels might need them; each picture is a page.

    Strips are compressed with deflate, after differences between neighbours (predictor 2) for integers.

    Args:
        stream: open for writing, seekable.
        pixel_bytes: of all pages together, before compression.
    """

    def __init__(self, stream: BinaryIO, pixel_bytes: int) -> None:
        self._stream = stream
        # Deflate may add a little, and metadata has to fit as well.
        self._big = pixel_bytes * 1.01 > (1 << 32) - (1 << 26)
        stream.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if self._big else struct.pack("<2sHI", b"II", 42, 0))
        self._link = 8 if self._big else 4  # where the offset of the next directory goes

    def begin(self, layout: Layout) -> None:
        self._layout = layout
        self._rows_a_strip = max(1, _STRIP // (layout.size[1] * layout.channels * layout.depth // 8))
        self._waiting = np.empty((0, layout.size[1], layout.channels), f"u{layout.depth // 8}")
        if layout.depth == 32:
            self._waiting = self._waiting.astype(np.float32)
        self._offsets: list[int] = []
        self._lengths: list[int] = []

    def write(self, rows: np.ndarray) -> None:
        """(n, W, C) of uint8, uint16 or float32, top to bottom."""
        rows = np.concatenate([self._waiting, rows]) if len(self._waiting) else rows
        whole = len(rows) - len(rows) % self._rows_a_strip
        for top in range(0, whole, self._rows_a_strip):
            self._strip(rows[top : top + self._rows_a_strip])
        self._waiting = rows[whole:].copy()

    def end(self) -> None:
        if len(self._waiting):
            self._strip(self._waiting)
        layout, address = self._layout, _LONG8 if self._big else _LONG
        sample_format = 3 if layout.depth == 32 else 1
        entries = [
            self._numbers(256, _LONG, layout.size[1]),
            self._numbers(257, _LONG, layout.size[0]),
            self._numbers(258, _SHORT, *[layout.depth] * layout.channels),
            self._numbers(259, _SHORT, 8),  # deflate
            self._numbers(262, _SHORT, 2 if layout.channels > 2 else 1),
            self._numbers(273, address, *self._offsets),
            self._numbers(277, _SHORT, layout.channels),
            self._numbers(278, _LONG, self._rows_a_strip),
            self._numbers(279, address, *self._lengths),
            self._numbers(284, _SHORT, 1),  # channels side by side
            self._numbers(317, _SHORT, 1 if layout.depth == 32 else 2),
            self._numbers(339, _SHORT, *[sample_format] * layout.channels),
        ]
        if layout.channels in (2, 4):
            entries.append(self._numbers(338, _SHORT, 2))  # alpha, not premultiplied
        if layout.dpi is not None:
            for tag, value in zip((282, 283), layout.dpi, strict=True):
                precision = 10_000 if value < 400_000 else 1
                entries.append(
                    (tag, _RATIONAL, 1, struct.pack("<II", min(round(value * precision), (1 << 32) - 1), precision))
                )
            entries.append(self._numbers(296, _SHORT, 2))  # per inch
        if layout.icc_profile is not None:
            entries.append((34675, _UNDEFINED, len(layout.icc_profile), layout.icc_profile))
        if layout.xmp is not None:
            entries.append((700, _BYTE, len(layout.xmp), layout.xmp))
        directories = {} if layout.exif is None else descriptive(layout.exif)
        entries += directories.get(0, [])
        for tag in (EXIF_IFD, GPS_IFD):
            if directories.get(tag):
                entries.append(self._numbers(tag, _LONG, self._directory(directories[tag])))
        place = self._directory(entries)
        end = self._stream.tell()
        self._stream.seek(self._link)
        self._stream.write(struct.pack("<Q" if self._big else "<I", place))
        self._stream.seek(end)
        self._link = end - (8 if self._big else 4)

    def close(self) -> None:
        pass

    def _strip(self, rows: np.ndarray) -> None:
        if rows.dtype != np.float32:
            rows = np.concatenate([rows[:, :1], np.diff(rows, axis=1)], axis=1)
        data = deflated(rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes())
        self._offsets.append(self._stream.tell())
        self._lengths.append(len(data))
        self._stream.write(data)

    def _numbers(self, tag: int, kind: int, *values: int) -> Entry:
        letter = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}[kind]
        return tag, kind, len(values), struct.pack(f"<{len(values)}{letter}", *values)

    def _directory(self, entries: list[Entry]) -> int:
        """Writes values and entries, with no directory after it; returns where it begins."""
        room = 8 if self._big else 4
        packed = []
        for tag, kind, count, value in sorted(entries):
            if len(value) > room:
                self._even()
                place = self._stream.tell()
                self._stream.write(value)
                value = struct.pack("<Q" if self._big else "<I", place)
            packed.append(struct.pack("<HHQ" if self._big else "<HHI", tag, kind, count) + value.ljust(room, b"\0"))
        self._even()
        place = self._stream.tell()
        self._stream.write(struct.pack("<Q" if self._big else "<H", len(packed)) + b"".join(packed) + bytes(room))
        return place

    def _even(self) -> None:
        """Offsets are even (TIFF 6.0, section 2)."""
        if self._stream.tell() % 2:
            self._stream.write(b"\0")

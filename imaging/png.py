"""PNG and APNG as a stream: rows in, chunks out, of any size and of 8 or 16 bits."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from typing import BinaryIO

import numpy as np

from .deflate import Deflater
from .encoding import Layout

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
# Bytes of a chunk of pixels, at least; and of the rows that are filtered at once, which fit a processor's cache.
_CHUNK = 1 << 18
_BLOCK = 1 << 18
# Rows among which one filter is chosen, by trying all of them on one row.
_ROWS_A_CHOICE = 4
_XMP = "XML:com.adobe.xmp"


# What is read of a profile; Pillow stops at one megabyte, where tables of printers are larger.
_LARGEST_PROFILE = 1 << 24
_COLOUR_CHUNKS = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND")


def described(stream: BinaryIO) -> dict[str, bytes]:
    """What a PNG says of its colours and of how it was taken, by name of the chunk: sRGB, gAMA, cHRM, cICP, eXIf, and
    the profile of iCCP.

    Reads on from after the signature, past the pixels to the end; what is damaged is left out.
    """
    found: dict[str, bytes] = {}
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name not in (*_COLOUR_CHUNKS, b"iCCP", b"eXIf") or length > _LARGEST_PROFILE:
            stream.seek(length + 4, 1)
            continue
        data, crc = stream.read(length), stream.read(4)
        if crc != struct.pack(">I", zlib.crc32(data, zlib.crc32(name))):
            continue
        if name == b"iCCP":
            try:
                data = zlib.decompressobj().decompress(data[data.index(0) + 2 :], _LARGEST_PROFILE)
            except (ValueError, zlib.error):
                continue
        found[name.decode()] = data
    return found


def without_metadata(data: bytes) -> bytes:
    """The PNG with nothing but its pixels, and its resolution and EXIF where they are not damaged."""
    kept = [SIGNATURE]
    place = len(SIGNATURE)
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        crc = struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if name in _PIXEL_CHUNKS or (name in (b"pHYs", b"eXIf") and chunk[-4:] == crc):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


class PngEncoder:
    """Writes a PNG (PNG Specification, Third Edition), with more than one frame an APNG.

    Args:
        stream: open for writing.
        frames: how many there will be.
        loop: how often an animation runs, 0 for ever.
    """

    def __init__(self, stream: BinaryIO, frames: int = 1, loop: int = 0) -> None:
        self._stream, self._frames, self._loop = stream, frames, loop
        self._begun = self._sequence = 0

    def begin(self, layout: Layout) -> None:
        """Starts a frame; all of them have the layout of the first."""
        height, width = layout.size
        self._pixel = layout.channels * layout.depth // 8
        if not self._begun:
            self._stream.write(SIGNATURE)
            colour_type = _COLOUR_TYPES[layout.channels]
            self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, layout.depth, colour_type, 0, 0, 0))
            self._describe(layout)
            if self._frames > 1:
                self._chunk(b"acTL", struct.pack(">II", self._frames, self._loop))
        if self._frames > 1:
            seconds = Fraction(layout.duration or 0) / 1000
            if max(seconds.numerator, seconds.denominator) > 65535:
                seconds = Fraction(min(round(layout.duration or 0), 65535), 1000)
            frame = (self._next(), width, height, 0, 0, seconds.numerator, seconds.denominator, 0, 0)
            self._chunk(b"fcTL", struct.pack(">IIIIIHHBB", *frame))
        self._begun += 1
        self._above = np.zeros((1, width * self._pixel), np.uint8)
        self._deflate = Deflater()
        self._pending = bytearray()

    def write(self, rows: np.ndarray) -> None:
        """(n, W, C) of uint8 or uint16, top to bottom."""
        if rows.dtype == np.uint16:
            rows = rows.astype(">u2")
        lines = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        step = max(_ROWS_A_CHOICE, _BLOCK // lines.shape[1])
        for top in range(0, len(lines), step):
            block = lines[top : top + step]
            self._pending += self._deflate.compress(_filtered(block, self._above, self._pixel).tobytes())
            self._above = block[-1:].copy()
            if len(self._pending) >= _CHUNK:
                self._flush()

    def end(self) -> None:
        """Ends a frame."""
        self._pending += self._deflate.flush()
        self._flush()

    def close(self) -> None:
        self._chunk(b"IEND", b"")

    def _flush(self) -> None:
        if self._begun == 1:
            self._chunk(b"IDAT", bytes(self._pending))
        else:
            self._chunk(b"fdAT", struct.pack(">I", self._next()) + bytes(self._pending))
        self._pending.clear()

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _chunk(self, name: bytes, data: bytes) -> None:
        self._stream.write(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))
        )

    def _describe(self, layout: Layout) -> None:
        for name, data in layout.color_chunks.items():
            self._chunk(name.encode(), data)
        if layout.icc_profile is not None:
            self._chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(layout.icc_profile))
        if layout.dpi is not None:
            horizontal, vertical = (round(value / 0.0254) for value in layout.dpi)
            self._chunk(b"pHYs", struct.pack(">IIB", horizontal, vertical, 1))
        text = dict(layout.text)
        if layout.xmp is not None:
            text.setdefault(_XMP, layout.xmp.decode("utf-8", "replace"))
        for key, value in text.items():
            keyword = key.encode("latin-1", "replace")[:79]
            # The XMP specification (part 3, 1.1.5) wants its packet in iTXt, even if Latin-1 could hold it.
            if key != _XMP and all(ord(letter) < 256 for letter in value):
                self._chunk(b"tEXt", keyword + b"\0" + value.encode("latin-1"))
            else:
                self._chunk(b"iTXt", keyword + b"\0\0\0\0\0" + value.encode("utf-8", "replace"))
        if layout.exif is not None:
            self._chunk(b"eXIf", layout.exif.removeprefix(b"Exif\0\0"))


def _filtered(lines: np.ndarray, above: np.ndarray, pixel: int) -> np.ndarray:
    """Rows with the filter that leaves the smallest sum of absolute differences, each with its type before it.

    The heuristic of the PNG specification, 12.7; one choice holds for a few rows.
    """
    count, width = lines.shape
    up = np.concatenate([above, lines[:-1]])
    left = np.zeros_like(lines)
    left[:, pixel:] = lines[:, :-pixel]
    result = np.empty((count, width + 1), np.uint8)
    trial = slice(_ROWS_A_CHOICE // 2 if count > _ROWS_A_CHOICE // 2 else 0, None, _ROWS_A_CHOICE)
    costs = []
    for kind in range(5):
        tried = _filter(kind, lines[trial], left[trial], up[trial], pixel)
        costs.append(np.minimum(tried, -tried).sum(axis=1, dtype=np.int64))
    kinds = np.argmin(costs, axis=0).repeat(_ROWS_A_CHOICE)
    kinds = np.concatenate([kinds, kinds[-1:].repeat(max(0, count - len(kinds)))])[:count]
    for kind in range(5):
        chosen = np.flatnonzero(kinds == kind)
        if len(chosen):
            result[chosen, 1:] = _filter(kind, lines[chosen], left[chosen], up[chosen], pixel)
    result[:, 0] = kinds
    return result


def _filter(kind: int, line: np.ndarray, left: np.ndarray, up: np.ndarray, pixel: int) -> np.ndarray:
    """PNG specification, 9.2: none, sub, up, average, Paeth."""
    if kind == 0:
        return line
    if kind == 1:
        return line - left
    if kind == 2:
        return line - up
    if kind == 3:
        # Without the carry that 8 bits have no room for.
        return line - ((left & up) + ((left ^ up) >> 1))
    corner = np.zeros_like(up)
    corner[:, pixel:] = up[:, :-pixel]
    a, b, c = left.astype(np.int16), up.astype(np.int16), corner.astype(np.int16)
    to_a, to_b = np.abs(b - c), np.abs(a - c)
    to_c = np.abs(a + b - 2 * c)
    nearest = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))
    return line - nearest

"""Whether a file holds all of a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from .reading import UnreadableImageError, open_frames


def is_whole(path: str | Path, size: tuple[int, int] | None = None, frames: int = 1) -> bool:
    """Whether a file is a picture of the expected size, from its first byte to its last.

    What its format says of its own length (the last chunk of PNG, the end marker of JPEG, the sizes within WebP, TIFF
    and BMP) is compared with the file; pixels are decoded only where there is no such thing.

    Args:
        path: the file; one that does not exist is not whole.
        size: height and width in pixels, upright, of the first frame; None where size and frames are known to be right.
        frames: how many pictures the file holds.
    """
    try:
        with open(path, "rb") as stream:
            complete = _complete(stream, os.fstat(stream.fileno()).st_size)
        if complete is False or (complete and size is None):
            return complete
        with open_frames(path, allow_large=True) as opened:
            if size is not None and ((opened.height, opened.width) != size or len(opened) != frames):
                return False
            if complete is None:
                for _ in opened:
                    pass
    except (OSError, UnreadableImageError):
        return False
    return True


def _complete(stream: BinaryIO, length: int) -> bool | None:
    """Whether nothing is missing at the end of a file of `length` bytes; None where its format does not say."""
    head = stream.read(12)
    stream.seek(max(0, length - 12))
    tail = stream.read(12)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return tail == b"\0\0\0\0IEND\xaeB`\x82"
    if head.startswith(b"\xff\xd8\xff"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"GIF8"):
        return tail.endswith(b"\x3b")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= length
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") <= length
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        from tifffile import TiffFile

        stream.seek(0)
        try:
            with TiffFile(stream) as tiff:
                # Directories that lie beyond the end are not found.
                ends = [
                    offset + count
                    for page in tiff.pages
                    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
                ]
                return bool(ends) and max(ends) <= length
        except Exception:  # of nearly every type, where a directory is damaged
            return False
    return None

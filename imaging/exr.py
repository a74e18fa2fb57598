"""OpenEXR through its own package, which is installed or not."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .decoding import Kind
from .encoding import Layout
from .limits import check_size
from .picture import Picture
from .tiff import straight

MAGIC = b"\x76\x2f\x31\x01"


class ExrFile:
    """The first part of an OpenEXR file: RGB or Y, with A (premultiplied, as the format has it) or without.

    Colours are taken to be linear light of the primaries that sRGB has, the format's own default.
    """

    kind: Kind = "still"
    count = 1
    loop = 0

    def __init__(self, stream: BinaryIO) -> None:
        try:
            import OpenEXR  # type: ignore
        except ImportError as error:
            raise ModuleNotFoundError("install the package OpenEXR with pip install OpenEXR") from error
        # The library opens files by their name.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "picture.exr")
            stream.seek(0)
            with open(path, "wb") as copy:
                shutil.copyfileobj(stream, copy)
            with OpenEXR.File(str(path), header_only=True) as file:
                (left, top), (right, bottom) = (corner.tolist() for corner in file.header()["dataWindow"])
            self.size = bottom - top + 1, right - left + 1
            check_size(*self.size)
            with OpenEXR.File(str(path), separate_channels=True) as file:
                channels = {name.rpartition(".")[2]: channel.pixels for name, channel in file.channels().items()}
        names = ["R", "G", "B"] if {"R", "G", "B"} <= channels.keys() else ["Y"]
        if "A" in channels:
            names.append("A")
        if names[0] not in channels:
            raise ValueError(f"it has channels {', '.join(sorted(channels))}, and neither R, G and B nor Y")
        if any(channels[name].shape != self.size for name in names):
            raise ValueError("its channels are of several sizes")
        self._half = all(channels[name].dtype == np.float16 for name in names)
        pixels = np.stack([np.nan_to_num(channels[name].astype(np.float32)) for name in names], axis=2)
        self._pixels = straight(pixels) if "A" in names else pixels

    def load(self, index: int) -> Picture:
        return Picture(pixels=self._pixels, linear=True, bit_depth=16 if self._half else 32)


class ExrEncoder:
    """Writes OpenEXR, whose library wants the whole picture, as half or single precision."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def begin(self, layout: Layout) -> None:
        self._layout = layout
        self._pixels = np.empty((*layout.size, layout.channels), np.float16 if layout.depth == 16 else np.float32)
        self._top = 0

    def write(self, rows: np.ndarray) -> None:
        if rows.shape[2] in (2, 4):
            rows = np.concatenate([rows[..., :-1] * rows[..., -1:], rows[..., -1:]], axis=2)
        self._pixels[self._top : self._top + len(rows)] = rows
        self._top += len(rows)

    def end(self) -> None:
        import OpenEXR

        names = {1: "Y", 2: "YA", 3: "RGB", 4: "RGBA"}[self._layout.channels]
        channels = {name: np.ascontiguousarray(self._pixels[..., i]) for i, name in enumerate(names)}
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        with ExitStack() as stack:
            path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "picture.exr")
            stack.enter_context(OpenEXR.File(header, channels)).write(path)
            shutil.copyfileobj(stack.enter_context(open(path, "rb")), self._stream)

    def close(self) -> None:
        pass

"""What encoders are told of a picture, and those that hold a picture until it is whole."""

from __future__ import annotations

import io
import struct
import tempfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import GifImagePlugin, Image

from .limits import bomb_limit


@dataclass(frozen=True)
class Layout:
    """The shape of one picture in a file, and what is said of it there.

    Attributes:
        size: (height, width).
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        depth: bits per channel: 8, 16, or 32 for floating point.
    """

    size: tuple[int, int]
    channels: int
    depth: int
    icc_profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)
    xmp: bytes | None = None
    color_chunks: dict[str, bytes] = field(default_factory=dict)
    duration: float | None = None


class Encoder(Protocol):
    """Writes pictures into a stream: `begin`, `write` from top to bottom and `end` for each; in the end `close`."""

    def begin(self, layout: Layout) -> None: ...

    def write(self, rows: np.ndarray) -> None:
        """(n, W, C) of uint8, uint16 or float32, as the layout has it."""

    def end(self) -> None: ...

    def close(self) -> None: ...


class _Held:
    """Collects the rows of a picture of 8 bits as a Pillow image, `_image`."""

    def begin(self, layout: Layout) -> None:
        self._layout = layout
        self._image = Image.new(("L", "LA", "RGB", "RGBA")[layout.channels - 1], layout.size[::-1])
        self._top = 0

    def write(self, rows: np.ndarray) -> None:
        self._image.paste(Image.fromarray(rows[..., 0] if rows.shape[2] == 1 else rows), (0, self._top))
        self._top += len(rows)


class PillowEncoder(_Held):
    """One picture in a format that Pillow writes."""

    def __init__(self, stream: BinaryIO, format_name: str, options: dict[str, Any]) -> None:
        self._stream, self._format, self._options = stream, format_name, options

    def end(self) -> None:
        described = {name: getattr(self._layout, name) for name in ("icc_profile", "exif", "xmp", "dpi")}
        options = {name: value for name, value in described.items() if value is not None}
        # By way of memory: into a file Pillow's encoders write themselves, and libjpeg does not notice a full disk.
        whole = io.BytesIO()
        self._image.save(whole, self._format, **options, **self._options)
        self._stream.write(whole.getbuffer())

    def close(self) -> None:
        pass


class AnimationEncoder:
    """An animation in a format that Pillow writes, which wants all frames at once: they wait in a file without loss."""

    def __init__(self, stream: BinaryIO, format_name: str, frames: int, loop: int, options: dict[str, Any]) -> None:
        from .png import PngEncoder

        self._stream, self._format, self._options = stream, format_name, {"loop": loop, **options}
        self._waiting = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`, or with this)
        self._png = PngEncoder(self._waiting, frames)
        self._durations: list[int] = []
        self.write = self._png.write
        self.end = self._png.end

    def begin(self, layout: Layout) -> None:
        if not self._durations:
            described = {name: getattr(layout, name) for name in ("icc_profile", "exif", "xmp")}
            self._options |= {name: value for name, value in described.items() if value is not None}
        self._durations.append(round(layout.duration or 0))
        self._png.begin(Layout(layout.size, layout.channels, layout.depth))

    def close(self) -> None:
        self._png.close()
        self._waiting.seek(0)
        with bomb_limit(lifted=True), self._waiting, Image.open(self._waiting) as image:
            whole = io.BytesIO()
            image.save(whole, self._format, save_all=True, duration=self._durations, **self._options)
            self._stream.write(whole.getbuffer())


class GifEncoder(_Held):
    """A GIF of one or more frames, each with a palette of its own and dithered (Floyd and Steinberg)."""

    def __init__(self, stream: BinaryIO, frames: int = 1, loop: int = 0) -> None:
        self._stream, self._animated, self._loop = stream, frames > 1, loop
        self._begun = False

    def begin(self, layout: Layout) -> None:
        super().begin(layout)
        if not self._begun:
            self._begun = True
            self._stream.write(b"GIF89a" + struct.pack("<HHBBB", *layout.size[::-1], 0x70, 0, 0))
            if self._animated and self._loop != 1:
                # Counts repetitions, where others count how often it runs.
                self._stream.write(b"!\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<HB", max(0, self._loop - 1), 0))

    def end(self) -> None:
        alpha = self._image.getchannel("A") if self._layout.channels in (2, 4) else None
        see_through = alpha is not None and np.asarray(alpha).min() < 128
        if self._image.mode == "L":
            frame = self._image.convert("P")
        else:
            rgb = self._image.convert("RGB")
            # A part of the pixels is enough to choose colours by.
            small = rgb.resize((min(rgb.width, 1000), min(rgb.height, 1000)), Image.Resampling.NEAREST)
            frame = rgb.quantize(palette=small.quantize(255 if see_through else 256, Image.Quantize.MEDIANCUT))
        options: dict[str, Any] = {"duration": round(self._layout.duration or 0), "include_color_table": True}
        if see_through:
            assert alpha is not None
            frame.paste(255, mask=alpha.point(lambda value: 255 * (value < 128)))
            options["transparency"] = 255
        if self._animated:
            options["disposal"] = 2  # every frame is whole
        for block in GifImagePlugin.getdata(frame, **options):
            self._stream.write(block)

    def close(self) -> None:
        self._stream.write(b";")

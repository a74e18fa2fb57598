"""Pictures to files."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import features

from .encoding import AnimationEncoder, Encoder, GifEncoder, Layout, PillowEncoder
from .enlarging import Enlarged
from .exif import resized
from .exr import ExrEncoder
from .heif import HeifEncoder
from .picture import Picture, luma, to_unit
from .png import PngEncoder
from .profiles import LINEAR_SRGB, ColourSpace
from .reading import Frames
from .tiff import TiffEncoder

logger = logging.getLogger("tsdsr")


@dataclass(frozen=True)
class _Format:
    """What a file format can hold.

    Attributes:
        side: the longest one allowed. libjpeg: JPEG_MAX_DIMENSION; libwebp: WEBP_MAX_DIMENSION; AV1: 16-bit frame
            size; PNG: 31 bits.
        dpi: pixels per inch that fit the field: JFIF's 16 bits, and the 31 bits for pixels per metre of PNG and BMP.
        several: the kind of frames of which it holds more than one.
        needs: module that has to be installed, or codec that Pillow has to be built with.
    """

    name: str
    depths: tuple[int, ...] = (8,)
    grey: bool = True
    alpha: bool = True
    side: int = 65535
    dpi: float = float("inf")
    several: str | None = None
    needs: str | None = None


_PNG = _Format("PNG", depths=(8, 16), side=(1 << 31) - 1, dpi=54_000_000, several="animation")
_JPEG = _Format("JPEG", alpha=False, side=65500, dpi=65535)
_TIFF = _Format("TIFF", depths=(8, 16, 32), side=(1 << 31) - 1, several="pages")
_HEIF = _Format("HEIF", depths=(8, 16), grey=False, side=16384, needs="pillow_heif")
_FORMATS = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", grey=False, side=16383, several="animation", needs="webp"),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _Format("BMP", alpha=False, dpi=54_000_000),
    ".gif": _Format("GIF", several="animation"),
    ".apng": _PNG,
    ".avif": _Format("AVIF", grey=False, several="animation", needs="avif"),
    ".heic": _HEIF,
    ".heif": _HEIF,
    ".exr": _Format("EXR", depths=(16, 32), needs="OpenEXR"),
}
_PACKAGES = {"pillow_heif": "pillow-heif", "OpenEXR": "OpenEXR"}


def _available(format: _Format) -> bool:
    if format.needs in _PACKAGES:
        return importlib.util.find_spec(format.needs) is not None
    return format.needs is None or (format.needs in features.modules and features.check_module(format.needs))


SUPPORTED_OUTPUT_SUFFIXES: tuple[str, ...] = tuple(suffix for suffix, format in _FORMATS.items() if _available(format))
"""Suffixes `write` accepts, in lower case. AVIF and WebP are there if Pillow was built with them, HEIC and OpenEXR if
their packages are installed."""

SUBSAMPLING = ("4:4:4", "4:2:2", "4:2:0")
"""Of a JPEG's colours, from full to a quarter of the resolution."""

# An APP1 segment counts its own two length bytes in 16 bits.
_LARGEST_JPEG_EXIF = 65533
# Chroma at half resolution would undo part of an upscaling that asks for high quality.
_FULL_CHROMA_FROM_QUALITY = 90
# Pixels of the result that are worked on at once.
_STRIP_PIXELS = 1 << 20


class PictureWriter:
    """Takes the pictures of a file, each from top to bottom, and writes it; see `create`.

    A context manager: what was written appears under its name, whole, when it is left without an error.
    """

    def __init__(
        self,
        name: str,
        format: _Format,
        frames: int,
        first: tuple[int, int],
        size: tuple[int, int],
        encoder: Encoder,
        stack: ExitStack,
        commit: Callable[[], None],
    ) -> None:
        self._name, self._format, self._frames, self._first, self._size = name, format, frames, first, size
        self._encoder, self._stack, self._commit = encoder, stack, commit
        self._picture: Picture | None = None
        self._layout: Layout | None = None
        self._begun = 0

    def begin(self, picture: Picture, size: tuple[int, int] | None = None, *, own_colours: bool = False) -> None:
        """Says of which picture the rows are that follow.

        Args:
            picture: as it was read: its alpha, colour space, depth and metadata are for the result.
            size: (height, width) of the result; by default that of `create`, or for a page of another size than the
                first as much larger.
            own_colours: rows will be in the colour space of the picture, and not in sRGB.

        Raises:
            ValueError: the picture before it is not whole, the size is not possible, or all frames are there.
        """
        self._end()
        if self._begun == self._frames:
            raise ValueError(f"{self._name} was to hold {self._frames} pictures, and here comes one more.")
        if size is None:
            size = (
                round(self._size[0] * picture.height / self._first[0]),
                round(self._size[1] * picture.width / self._first[1]),
            )
        _check_size(self._name, self._format, size)
        before = self._layout
        self._linear = self._format.name == "EXR"
        space = None if own_colours else picture.space
        self._layout = self._layout_of(picture, size, space is None or space.both_ways)
        if before is not None and self._format.several == "animation":
            shape = (self._layout.size, self._layout.channels, self._layout.depth)
            if shape != (before.size, before.channels, before.depth):
                raise ValueError(f"{self._name} is an animation, and its frames must be of one size and kind.")
        self._picture, self._top, self._begun = picture, 0, self._begun + 1
        old_size = picture.height, picture.width
        self._alpha = self._beyond = None
        if picture.has_alpha:
            self._alpha = Enlarged(lambda top, bottom: to_unit(picture.pixels[top:bottom, :, -1:]), old_size, size)
        self._space: ColourSpace | None = LINEAR_SRGB
        if not self._linear:
            self._space = None if picture.linear or space is None or not space.both_ways else space
        if self._space is not None and space is not None:
            self._beyond = Enlarged(self._beyond_srgb, old_size, size)
        if picture.linear and not self._linear and picture.pixels[..., :3].max() > 1:
            logger.warning(
                "%s cannot hold the values above 1 (white) of its source; write .exr to keep them.", self._name
            )
        self._encoder.begin(self._layout)

    def write(self, rows: np.ndarray) -> None:
        """Takes the next rows of the picture.

        Args:
            rows: floating point (n, W', 3), sRGB, 0..1; values outside are clipped.

        Raises:
            ValueError: wrong shape or type, more rows than the picture has, or values that are not finite.
            OSError: the file cannot be written.
        """
        if self._picture is None or self._layout is None:
            raise ValueError(f"{self._name}: say with `begin` which picture these rows are of.")
        height, width = self._layout.size
        if rows.ndim != 3 or rows.shape[1:] != (width, 3) or not np.issubdtype(rows.dtype, np.floating):
            raise ValueError(f"{self._name} takes floating point rows (n, {width}, 3), not {rows.dtype} {rows.shape}.")
        if self._top + len(rows) > height:
            raise ValueError(f"{self._name} is {height} rows high, and there come {self._top + len(rows)}.")
        step = max(1, _STRIP_PIXELS // width)
        for start in range(0, len(rows), step):
            part = rows[start : start + step].astype(np.float32, copy=False)
            self._encoder.write(self._finished(part, self._top, self._top + len(part)))
            self._top += len(part)

    def _finished(self, rgb: np.ndarray, top: int, bottom: int) -> np.ndarray:
        """Rows as the file has them."""
        picture, layout = self._picture, self._layout
        assert picture is not None and layout is not None
        if not np.isfinite(rgb).all():
            raise ValueError(f"{self._name} is not written because the picture holds NaN or infinite values.")
        if self._space is not None:
            rgb = self._space.from_srgb(np.clip(rgb, 0, 1))
        if self._beyond is not None:
            rgb = rgb + self._beyond.rows(top, bottom)
        values = luma(rgb)[..., None] if picture.grey else rgb
        if self._alpha is not None:
            alpha = self._alpha.rows(top, bottom)
            if not np.isfinite(alpha).all():
                raise ValueError(f"{self._name} is not written because the picture holds NaN or infinite values.")
            alpha = np.clip(alpha, 0, 1)
            if self._format.alpha:
                values = np.concatenate([values, alpha], axis=2)
            else:
                values = values * alpha + (1 - alpha)
        if picture.grey and layout.channels > 2:
            values = np.concatenate([values[..., :1].repeat(3, axis=2), values[..., 1:]], axis=2)
        return values if self._linear else quantized(values, layout.depth)

    def _beyond_srgb(self, top: int, bottom: int) -> np.ndarray:
        """What of the picture's colours sRGB cannot hold, as a difference in the colour space of the result."""
        picture, space = self._picture, self._space
        assert picture is not None and picture.space is not None and space is not None
        own = picture.colours(top, bottom)
        srgb = picture.space.to_srgb(own)
        held = np.clip(srgb, 0, 1)
        if space is not picture.space:
            own = space.from_srgb(srgb)
        rest = own - space.from_srgb(held)
        if picture.space.exact:
            rest[(held == srgb).all(axis=2)] = 0
        if picture.has_alpha:
            rest[picture.pixels[top:bottom, :, -1] == 0] = 0
        return rest

    def _layout_of(self, picture: Picture, size: tuple[int, int], keeps_profile: bool) -> Layout:
        format = self._format
        channels = (1 if picture.grey and format.grey else 3) + (picture.has_alpha and format.alpha)
        depth = max((depth for depth in format.depths if depth <= picture.bit_depth), default=format.depths[0])
        dpi = picture.dpi
        if dpi is not None:
            dpi = dpi[0] * size[1] / picture.width, dpi[1] * size[0] / picture.height
            if not all(1 <= value <= format.dpi for value in dpi):
                dpi = None
        exif = picture.exif
        if exif is not None and size != (picture.height, picture.width):
            exif = resized(exif, size, dpi)
        if exif is not None and format.name == "JPEG" and len(exif) > _LARGEST_JPEG_EXIF:
            exif = None
        xmp = picture.xmp
        if xmp is None and "XML:com.adobe.xmp" in picture.text:
            xmp = picture.text["XML:com.adobe.xmp"].encode()
        keeps_profile &= format.name != "EXR" and not (picture.grey and not format.grey)
        return Layout(
            size,
            channels,
            depth,
            icc_profile=picture.icc_profile if keeps_profile else None,
            exif=exif,
            dpi=dpi,
            text=picture.text,
            xmp=xmp,
            color_chunks=picture.color_chunks,
            duration=picture.duration,
        )

    def _end(self) -> None:
        if self._picture is None or self._layout is None:
            return
        if self._top != self._layout.size[0]:
            raise ValueError(f"{self._name} has {self._top} of {self._layout.size[0]} rows only.")
        self._encoder.end()
        self._picture = None

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        with self._stack:
            if kind is None:
                self._end()
                if self._begun < self._frames:
                    raise ValueError(f"{self._name} has {self._begun} of {self._frames} pictures only.")
                self._encoder.close()
                self._commit()


def create(
    source: Frames | Picture,
    path: str | Path | BinaryIO,
    size: tuple[int, int],
    *,
    format: str | None = None,
    quality: int = 95,
    subsampling: str | None = None,
    lossless: bool = False,
) -> PictureWriter:
    """Opens a file for a result that comes in strips.

    ```
    with open_frames(source) as frames, create(frames, path, size) as writer:
        for picture in frames:
            writer.begin(picture)
            writer.write(rows)  # as often as it takes
    ```

    The file is written beside its destination as `.{name}.{hex}.part` and moved into place when whole, so `path` never
    holds half a picture and an existing file survives a failure. Values are rounded, not truncated.

    * Colours come as sRGB and are written in the colour space of the source, with its profile. What sRGB cannot hold of
      the source's colours is enlarged beside them (bicubic) and added. Where a profile leads to sRGB alone, as those of
      scanners may, the result stays in sRGB.
    * Depth: PNG keeps 8 and 16 bits per channel, TIFF floating point as well, OpenEXR is floating point (half or
      single); other formats have 8, HEIF 10.
    * Alpha: enlarged (bicubic); composited on white for JPEG and BMP, on or off in GIF.
    * Grey: kept, except by WebP, AVIF and HEIF, which store colour only; a GRAY profile is left out there.
    * Metadata: profile, EXIF and resolution are kept where the format has a place for them (BMP: resolution only;
      WebP, AVIF and HEIF: profile, EXIF and XMP; JPEG: EXIF up to 64 KiB), text chunks by PNG. The resolution is
      scaled so that the printed size stays. One below 1 pixel per inch, or too large for the format, is left out.
    * Animations are written by PNG (as APNG), GIF, WebP and AVIF, pages by TIFF.
    * Memory: PNG and TIFF (BigTIFF where it takes that) are written as rows come. All others hold the whole result of
      one frame in 8 bits (OpenEXR in floating point) until it is complete; frames of WebP and AVIF wait on disk.

    Args:
        source: what the result is made from: says how many pictures there will be, and of which kind.
        path: destination, in an existing folder; a symbolic link is followed. Or a stream open for writing, which is
            left open, and stays empty if an error occurs.
        size: (height, width) of the result of the first picture.
        format: a suffix such as "png", by default that of `path`.
        quality: 1..100 for JPEG, WebP, AVIF and HEIF. JPEG keeps full chroma resolution from 90 on.
        subsampling: of JPEG's chroma, one of `SUBSAMPLING`.
        lossless: WebP without loss.

    Raises:
        ValueError: format not supported, or not for so many pictures or such a size; a wrong option.
        FileNotFoundError, IsADirectoryError: the folder does not exist, or `path` is one.
        OSError: the file cannot be written.
    """
    to_stream = not isinstance(path, (str, os.PathLike))
    name = "the stream" if to_stream else str(path)
    suffix = Path(name).suffix.lower() if format is None else f".{format.lower().removeprefix('.')}"
    if suffix not in SUPPORTED_OUTPUT_SUFFIXES:
        if suffix in _FORMATS and _FORMATS[suffix].needs in _PACKAGES:
            package = _PACKAGES[str(_FORMATS[suffix].needs)]
            raise ValueError(
                f"{name} needs the package {package} to be written; install it with pip install {package}."
            )
        raise ValueError(
            f"{name} has no suffix that can be written; use one of {', '.join(SUPPORTED_OUTPUT_SUFFIXES)}."
        )
    chosen = _FORMATS[suffix]
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be within 1..100, not {quality}.")
    if subsampling is not None and subsampling not in SUBSAMPLING:
        raise ValueError(f"subsampling must be one of {', '.join(SUBSAMPLING)}, not {subsampling}.")
    if lossless and chosen.name in ("JPEG", "AVIF", "HEIF", "GIF"):
        raise ValueError(f"{name} cannot be written without loss; use .png, .tif or .webp.")
    _check_size(name, chosen, size)
    frames, kind, loop = 1, "still", 0
    if isinstance(source, Frames):
        frames, kind, loop = len(source), source.kind, source.loop
    if frames > 1 and chosen.several != kind:
        able = [s for s in SUPPORTED_OUTPUT_SUFFIXES if _FORMATS[s].several == kind]
        raise ValueError(
            f"{name} can hold one picture, and there are {frames} {'frames' if kind == 'animation' else 'pages'}; "
            f"use {', '.join(able)}."
        )
    with ExitStack() as stack:
        stream: Any
        if to_stream:
            stream = stack.enter_context(tempfile.TemporaryFile())

            def commit() -> None:
                stream.seek(0)
                shutil.copyfileobj(stream, path)  # type: ignore[arg-type, type-var]
        else:
            target = Path(os.path.realpath(path))  # type: ignore[arg-type]
            if target.is_dir():
                raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
            if not target.parent.is_dir():
                raise FileNotFoundError(f"The folder {target.parent} does not exist; create it first.")
            # The same folder, because a rename is atomic only within one file system. A plain open(), because unlike
            # tempfile's 0600 it leaves the permissions to the umask.
            temporary = _beside(target)
            stack.callback(temporary.unlink, missing_ok=True)
            stream = stack.enter_context(open(temporary, "x+b"))

            def commit() -> None:
                stream.close()
                os.replace(temporary, target)

        encoder: Encoder
        if chosen.name == "PNG":
            encoder = PngEncoder(stream, frames, loop)
        elif chosen.name == "TIFF":
            encoder = TiffEncoder(stream, size[0] * size[1] * 16 * frames)
        elif chosen.name == "GIF":
            encoder = GifEncoder(stream, frames, loop)
        elif chosen.name == "EXR":
            encoder = ExrEncoder(stream)
        elif chosen.name == "HEIF":
            encoder = HeifEncoder(stream, _options(chosen, quality, subsampling, lossless))
        else:
            options = _options(chosen, quality, subsampling, lossless)
            encoder = (
                PillowEncoder(stream, chosen.name, options)
                if frames == 1
                else AnimationEncoder(stream, chosen.name, frames, loop, options)
            )
        first = source.height, source.width
        return PictureWriter(name, chosen, frames, first, size, encoder, stack.pop_all(), commit)


def write(picture: Picture, path: str | Path, *, quality: int = 95) -> Path:
    """Writes a picture as it is, in the format its suffix names: as `create` does, but its colours stay what they are.

    Args:
        picture: of which the colours are taken to be in the colour space of its profile.
        path: as `create` has it.
        quality: likewise.

    Returns:
        `path`.

    Raises:
        ValueError, OSError: as `create`, or pixels that are not finite numbers.
    """
    height, width = picture.height, picture.width
    with create(picture, path, (height, width), quality=quality) as writer:
        own = not picture.linear and Path(path).suffix.lower() != ".exr"
        writer.begin(picture, own_colours=own)
        rows = picture.colours if own else picture.rows
        step = max(1, _STRIP_PIXELS // width)
        for top in range(0, height, step):
            writer.write(rows(top, min(top + step, height)))
    return Path(path)


def _check_size(name: str, format: _Format, size: tuple[int, int]) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"{name} would be {width} x {height} pixels; both sides must be at least 1.")
    if max(size) > format.side:
        raise ValueError(
            f"{name} would be {width} x {height} pixels, but {format.name} allows {format.side} a"
            " side; write .png or .tif instead."
        )
    if format.name == "BMP" and height * width * 3 > 0xFFFF_0000:
        raise ValueError(f"{name} would have more than the 4 GiB that BMP allows; write .png or .tif instead.")


def _beside(target: Path) -> Path:
    """A new name in the same folder; file systems allow 255 bytes."""
    encoded = os.fsencode(target.name)  # which names that are no Unicode survive
    kept = target.name if len(encoded) <= 210 else encoded[:210].decode(errors="ignore")
    return target.with_name(f".{kept}.{uuid.uuid4().hex}.part")


def quantized(values: np.ndarray, depth: int) -> np.ndarray:
    """Floating point to what a file stores: unsigned integers of 8 or 16 bits, or float32 for 32; 0..1 and clipped."""
    values = np.clip(values, 0.0, 1.0)
    if depth == 32:
        return values.astype(np.float32, copy=False)
    values *= np.float32((1 << depth) - 1)
    return np.rint(values, out=values).astype(np.uint8 if depth == 8 else np.uint16)


def _options(format: _Format, quality: int, subsampling: str | None, lossless: bool) -> dict[str, Any]:
    if format.name == "JPEG":
        default = "4:4:4" if quality >= _FULL_CHROMA_FROM_QUALITY else "4:2:0"
        return {"quality": quality, "subsampling": subsampling or default}
    if format.name == "WEBP":
        # Without `exact` libwebp is free to change the colour under full transparency.
        return {"quality": quality, "exact": True, "lossless": lossless}
    return {"quality": quality} if format.name in ("AVIF", "HEIF") else {}

"""Pictures to files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, features

from .picture import Picture, luma

_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".avif": "AVIF",
}
_OPTIONAL_CODECS = {"WEBP": "webp", "AVIF": "avif"}

SUPPORTED_OUTPUT_SUFFIXES: tuple[str, ...] = tuple(
    suffix
    for suffix, format_name in _FORMATS.items()
    if format_name not in _OPTIONAL_CODECS or features.check_module(_OPTIONAL_CODECS[format_name])
)
"""Suffixes `write` accepts, in lower case. AVIF and WebP are there if Pillow was built with them."""

_FORMATS_WITHOUT_ALPHA = ("JPEG", "BMP")
_FORMATS_WITHOUT_GREY = ("WEBP", "AVIF")
# libjpeg: JPEG_MAX_DIMENSION; libwebp: WEBP_MAX_DIMENSION; AV1: 16-bit frame size.
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "AVIF": 65536}
# Pixels per inch that fit the field: JFIF's 16 bits, and the 31 bits for pixels per metre of PNG and BMP.
_LARGEST_DPI = {"JPEG": 65535, "PNG": 54_000_000, "BMP": 54_000_000}
# An APP1 segment counts its own two length bytes in 16 bits.
_LARGEST_JPEG_EXIF = 65533
# Chroma at half resolution would undo part of an upscaling that asks for high quality.
_FULL_CHROMA_FROM_QUALITY = 90
# zlib level: 9 costs several times the time of 4 and saves a few percent.
_PNG_COMPRESS_LEVEL = 4


def write(picture: Picture, path: str | Path, *, quality: int = 95) -> Path:
    """Writes a picture in the format its suffix names.

    The file is written beside its destination under a temporary name and moved into place when whole, so `path` never
    holds half a picture and an existing file survives a failure. Values are rounded, not truncated.

    * Depth: grey pictures of `bit_depth` 16 without alpha are written with 16 bits to PNG and TIFF; everything else
      with 8, since Pillow has no mode for 16 bits per channel in colour or with alpha.
    * Alpha: kept by PNG, TIFF, WebP and AVIF; composited on white for JPEG and BMP.
    * Grey: kept, except by WebP and AVIF, which store colour only; a GRAY profile is left out there.
    * Metadata: profile, EXIF and resolution are kept where the format has a place for them (BMP: resolution only;
      WebP and AVIF: profile and EXIF; JPEG: EXIF up to 64 KiB), text chunks by PNG. A resolution below 1 pixel per
      inch, or too large for the format, is left out.

    Args:
        path: destination, in an existing folder; a symbolic link is followed. Suffixes: `SUPPORTED_OUTPUT_SUFFIXES`.
        quality: 1..100 for JPEG, WebP and AVIF (always lossy). JPEG keeps full chroma resolution from 90 on.

    Returns:
        `path`.

    Raises:
        ValueError: suffix not supported, quality out of range, a side longer than the format allows, or pixels that
            are not finite numbers.
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUPPORTED_OUTPUT_SUFFIXES:
        raise ValueError(
            f"{path} has no suffix that can be written; use one of {', '.join(SUPPORTED_OUTPUT_SUFFIXES)}."
        )
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be within 1..100, not {quality}.")
    format_name = _FORMATS[suffix]
    largest_side = _LARGEST_SIDE.get(format_name)
    if largest_side is not None and max(picture.width, picture.height) > largest_side:
        raise ValueError(
            f"{path} would be {picture.width} x {picture.height} pixels, but {format_name} allows {largest_side} a"
            " side; write .png or .tif instead."
        )
    if not np.isfinite(picture.rgb).all() or not (picture.alpha is None or np.isfinite(picture.alpha).all()):
        raise ValueError(f"{path} is not written because the picture holds NaN or infinite values.")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder {target.parent} does not exist; create it first.")
    _save_whole(_to_image(picture, format_name), target, format_name, _save_options(picture, format_name, quality))
    return path


def _save_whole(image: Image.Image, target: Path, format_name: str, options: dict[str, Any]) -> None:
    # The same folder, because a rename is atomic only within one file system. A plain open(), because unlike
    # tempfile's 0600 it leaves the permissions to the umask.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x+b") as stream:
            image.save(stream, format=format_name, **options)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _to_image(picture: Picture, format_name: str) -> Image.Image:
    rgb, alpha = picture.rgb, picture.alpha
    if alpha is not None and format_name in _FORMATS_WITHOUT_ALPHA:
        opacity = np.clip(alpha, 0.0, 1.0)[..., None]
        rgb = rgb * opacity + (1.0 - opacity)
        alpha = None
    pixels = luma(rgb) if picture.grey else rgb
    if alpha is None:
        sixteen = picture.bit_depth == 16 and picture.grey and format_name in ("PNG", "TIFF")
        return Image.fromarray(_quantize(pixels, np.uint16 if sixteen else np.uint8))
    if picture.grey and format_name not in _FORMATS_WITHOUT_GREY:
        return Image.fromarray(_quantize(np.stack([pixels, alpha], axis=2), np.uint8))
    if picture.grey:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return Image.fromarray(_quantize(np.concatenate([pixels, alpha[..., None]], axis=2), np.uint8))


def _quantize(values: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    largest = np.iinfo(dtype).max
    return np.rint(np.clip(values, 0.0, 1.0) * np.float32(largest)).astype(dtype)


def _save_options(picture: Picture, format_name: str, quality: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if format_name == "PNG":
        options["compress_level"] = _PNG_COMPRESS_LEVEL
        options["pnginfo"] = _png_text(picture.text)
    elif format_name == "TIFF" and features.check_codec("libtiff"):
        options["compression"] = "tiff_adobe_deflate"
    elif format_name == "JPEG":
        options["quality"] = quality
        options["subsampling"] = "4:4:4" if quality >= _FULL_CHROMA_FROM_QUALITY else "4:2:0"
    elif format_name in ("WEBP", "AVIF"):
        options["quality"] = quality
    if format_name == "WEBP":
        # Without it libwebp is free to change the colour under full transparency.
        options["exact"] = True
    if picture.icc_profile is not None and not (picture.grey and format_name in _FORMATS_WITHOUT_GREY):
        options["icc_profile"] = picture.icc_profile
    if picture.exif is not None and not (format_name == "JPEG" and len(picture.exif) > _LARGEST_JPEG_EXIF):
        options["exif"] = picture.exif
    if picture.dpi is not None and all(1 <= value <= _LARGEST_DPI.get(format_name, value) for value in picture.dpi):
        options["dpi"] = picture.dpi
    return options


def _png_text(text: dict[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        if key == "XML:com.adobe.xmp":
            # The XMP specification (part 3, 1.1.5) wants its packet in an iTXt chunk, even if Latin-1 could hold it.
            chunks.add_itxt(key, value)
        else:
            chunks.add_text(key, value)
    return chunks

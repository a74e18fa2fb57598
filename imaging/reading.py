"""Files to pictures."""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from .picture import Picture


class UnreadableImageError(ValueError):
    """A file that cannot be read as a picture. The message is one sentence that names the file and the mend."""


# Pillow registers these suffixes but only recognises the files; it has no decoder for them.
_RECOGNISED_ONLY = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})

# A TIFF keeps its pixel layout (strip offsets, sizes, compression) in the same directory as these; only these describe
# the photograph and may travel into another file.
_TIFF_DESCRIPTIVE_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
)


def read(source: str | Path | BinaryIO, allow_large: bool = False) -> Picture:
    """Reads a picture from a file or an open binary stream.

    Everything Pillow decodes is accepted: bilevel, grey, palette, RGB, CMYK, YCbCr, LAB, HSV, integer and floating
    point images, each with or without transparency. Of an animation or a multi-page file the first frame is read.

    * Orientation from EXIF or XMP is applied to the pixels and removed from the metadata.
    * RGB pixels stay in the colour space of their embedded profile, which is kept byte for byte; likewise grey pixels
      with a GRAY profile. A profile that does not fit the decoded pixels is dropped.
    * CMYK is converted to sRGB through its embedded profile (by Pillow's plain formula where there is none), LAB
      through Pillow's; their profiles are dropped.
    * Pixels under full transparency keep the colour the file stores.
    * 16-bit grey is exact and gives `bit_depth` 16. 16 bits per channel in colour, or grey with alpha, is decoded by
      Pillow to 8 bits, so such files give `bit_depth` 8.
    * 32-bit integers are taken as 16-bit values, or scaled by their largest value where that exceeds 65535. Floating
      point is taken as 0..1, or as 0..255, 0..65535 or 0..largest value, whichever is the first to hold them all.
      Negative values and NaN become 0.

    Args:
        source: path of a file, or a stream opened in binary mode (read to its end, left open).
        allow_large: lifts Pillow's limit against decompression bombs for this call. The limit is global to the
            process, so reads in other threads run without it for as long as this call takes.

    Returns:
        The picture: `rgb` float32 (H, W, 3) in 0..1, `alpha` float32 (H, W) in 0..1 or None.

    Raises:
        UnreadableImageError: there is no such file, or it is not a whole picture within the limits.
    """
    with ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            name = os.fspath(source)
            stream = stack.enter_context(_open_file(name))
        else:
            stream_name = getattr(source, "name", None)
            name = stream_name if isinstance(stream_name, str) else "the image stream"
            stream = _buffer_stream(source, name)
        stack.enter_context(_bomb_limit(lifted=allow_large))
        try:
            image = stack.enter_context(Image.open(stream))
            layout = _layout(image)
            # Pillow turns a TIFF upright while it decodes it; everything else is turned by `_orient`.
            turned = image.format == "TIFF" and _swaps_sides(image)
            image.load()
            return _to_picture(image, layout, turned or _swaps_sides(image))
        except Exception as error:
            # Decoders meet damaged data with exceptions of nearly every type (SyntaxError, struct.error, EOFError,
            # IndexError, zlib.error, OverflowError, ...): any of them means the file is at fault.
            raise UnreadableImageError(_explain(error, name)) from error


def find_images(folder: str | Path) -> list[Path]:
    """The picture files directly inside `folder`, in natural order (2.png before 10.png).

    A file counts by its suffix, if Pillow can decode that format. Hidden files and subfolders are left out.

    Raises:
        UnreadableImageError: `folder` is not a folder that can be listed.
    """
    Image.init()
    suffixes = {
        suffix
        for suffix, format_name in Image.registered_extensions().items()
        if format_name in Image.OPEN and format_name not in _RECOGNISED_ONLY
    }
    try:
        entries = list(Path(folder).iterdir())
    except OSError as error:
        raise UnreadableImageError(
            f"{folder} cannot be listed ({error.strerror}); give an existing folder of pictures."
        ) from error
    images = [
        path for path in entries if not path.name.startswith(".") and path.suffix.lower() in suffixes and path.is_file()
    ]
    return sorted(images, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    # Splitting by a group alternates text and digits, so keys compare text with text and numbers with numbers.
    parts = re.split(r"(\d+)", path.name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def _open_file(name: str) -> BinaryIO:
    if os.path.isdir(name):
        raise UnreadableImageError(f"{name} is a folder; give the path of one picture inside it.")
    try:
        stream = open(name, "rb")  # noqa: SIM115  (the caller closes it)
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{name} does not exist; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableImageError(
            f"{name} cannot be opened ({reason}); check the path and its permissions."
        ) from error
    with ExitStack() as on_failure:
        on_failure.callback(stream.close)
        if not stream.seekable():
            return _buffer_stream(stream, name)
        if stream.seek(0, io.SEEK_END) == 0:
            raise UnreadableImageError(_empty(name))
        stream.seek(0)
        on_failure.pop_all()
    return stream


def _buffer_stream(stream: BinaryIO, name: str) -> io.BytesIO:
    """Pillow seeks; pipes and sockets cannot."""
    try:
        data = stream.read()
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"{name} cannot be read ({error}); open it for reading in binary mode.") from error
    if not isinstance(data, bytes):
        raise UnreadableImageError(f"{name} does not give bytes; open it in binary mode.")
    if not data:
        raise UnreadableImageError(_empty(name))
    return io.BytesIO(data)


def _empty(name: str) -> str:
    return f"{name} is empty (zero bytes); copy or download it again."


def _explain(error: Exception, name: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return (
            f"{name} is not an image that Pillow can read, or its header is damaged; "
            "convert it to PNG, JPEG, TIFF or WebP first."
        )
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"{name} is too large to read safely ({reason}); pass allow_large=True if you trust the file."
    if isinstance(error, MemoryError):
        return f"{name} needs more memory than there is; make the picture smaller, or check that it is not damaged."
    return f"{name} is damaged, cut short or of an unsupported kind ({reason}); copy it again or convert it to PNG."


_bomb_limit_lock = threading.Lock()
_bomb_limit_lifters = 0
_bomb_limit_saved: int | None = None


@contextmanager
def _bomb_limit(lifted: bool) -> Iterator[None]:
    """Lifts Pillow's limit if asked, and silences its warnings: about pictures near the limit, and about damaged
    metadata, which is left out.
    """
    global _bomb_limit_lifters, _bomb_limit_saved
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if not lifted:
            yield
            return
        # Counted, so that of two overlapping calls the later one to finish restores the true limit.
        with _bomb_limit_lock:
            if _bomb_limit_lifters == 0:
                _bomb_limit_saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            _bomb_limit_lifters += 1
        try:
            yield
        finally:
            with _bomb_limit_lock:
                _bomb_limit_lifters -= 1
                if _bomb_limit_lifters == 0:
                    Image.MAX_IMAGE_PIXELS = _bomb_limit_saved


def _layout(image: Image.Image) -> str:
    """Pillow's raw mode, the pixel layout inside the file; known only before `load()`.

    It says what the decoded mode hides: that RGBA was grey with alpha, or that 16-bit values only use 12 bits.
    """
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    args = tiles[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _swaps_sides(image: Image.Image) -> bool:
    """Whether rows of the file are columns of the upright picture: by a quarter turn or a transposition."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:
        return False


def _to_picture(image: Image.Image, layout: str, turned: bool) -> Picture:
    exif = _orient(image)
    # `info` and not `text` has the values, because there the orientation was also taken out of the XMP packet.
    text = {key: str(image.info.get(key, value)) for key, value in getattr(image, "text", {}).items()}
    dpi = _dpi(image.info.get("dpi"))
    if isinstance(image, TiffImagePlugin.TiffImageFile) and ExifTags.Base.XResolution not in image.tag_v2:
        dpi = None  # Pillow gives 1 pixel per inch where the file gives nothing
    if dpi is not None and turned:
        dpi = dpi[1], dpi[0]
    profile = image.info.get("icc_profile") or None
    if image.mode in ("CMYK", "LAB"):
        image = _to_srgb(image, profile)
        profile = None

    bit_depth = 8
    if image.mode.startswith("I;16"):
        pixels, alpha, bit_depth = *_decode_16_bit_grey(image, layout), 16
    elif image.mode in ("I", "F"):
        pixels, alpha, bit_depth = _scale_to_unit(np.asarray(image)), None, 16
    else:
        pixels, alpha = _decode_8_bit(image, layout)

    grey = pixels.ndim == 2
    # Bytes 16..20 of an ICC profile name the colour space of the pixels it is for (ICC.1:2022, 7.2.6).
    if profile is not None and profile[16:20] != (b"GRAY" if grey else b"RGB "):
        profile = None
    return Picture(
        rgb=np.repeat(pixels[..., None], 3, axis=2) if grey else pixels,
        alpha=alpha,
        grey=grey,
        bit_depth=bit_depth,
        icc_profile=profile,
        exif=exif,
        dpi=dpi,
        text=text,
    )


def _orient(image: Image.Image) -> bytes | None:
    """Applies the orientation in place and returns the EXIF block without it, or None if that cannot be parsed."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        exif = image.getexif()
        if not exif:
            return None
        if image.format == "TIFF":
            exif = _descriptive(exif)
            return exif.tobytes() if exif else None
        raw = image.info.get("exif")
        if not raw:
            return exif.tobytes()
        return raw if raw.startswith(b"Exif\0\0") else b"Exif\0\0" + raw
    except Exception:
        return None


def _descriptive(exif: Image.Exif) -> Image.Exif:
    kept = Image.Exif()
    for tag in _TIFF_DESCRIPTIVE_TAGS:
        if tag in exif:
            kept[tag] = exif[tag]
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        entries = exif.get_ifd(directory)
        if entries:
            kept[directory] = dict(entries)
    return kept


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile is not None and image.mode == "CMYK":
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:  # it is None where a picture is converted in place
                return converted
        except ImageCms.PyCMSError:
            # A damaged or mismatched profile costs colour accuracy, not the picture.
            pass
    return image.convert("RGB")


def _decode_8_bit(image: Image.Image, layout: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W) for grey or (H, W, 3) for colour, and alpha, float32 in 0..1."""
    mode = image.mode
    transparency = image.info.get("transparency")
    if mode in ("1", "L"):
        values = np.asarray(image.convert("L"))
        if not isinstance(transparency, int):
            return _to_unit(values), None
        # Pillow scales 2- and 4-bit grey to 8 bits, but not the transparent value that goes with it.
        transparency *= {"L;2": 85, "L;4": 17}.get(layout, 1)
        return _to_unit(values), (values != transparency).astype(np.float32)
    if mode in ("LA", "La"):
        values = _to_unit(np.asarray(image.convert("LA")))
        return values[..., 0].copy(), values[..., 1].copy()
    if mode == "RGBA" and layout.startswith("LA"):
        values = _to_unit(np.asarray(image)[..., 2:])
        return values[..., 0].copy(), values[..., 1].copy()
    if mode == "RGB" and isinstance(transparency, tuple):
        # 16-bit colour arrives as its high bytes, its transparent colour does not.
        shift = 8 if ";16" in layout else 0
        colour = np.array([value >> shift for value in transparency])
        values = np.asarray(image)
        return _to_unit(values), (values != colour).any(axis=2).astype(np.float32)
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and image.has_transparency_data):
        values = _to_unit(np.asarray(image.convert("RGBA")))
        return values[..., :3].copy(), values[..., 3].copy()
    return _to_unit(np.asarray(image.convert("RGB"))), None


def _decode_16_bit_grey(image: Image.Image, layout: str) -> tuple[np.ndarray, np.ndarray | None]:
    values = np.asarray(image).astype(np.uint16)
    largest = 4095 if layout == "I;12" else 65535
    transparency = image.info.get("transparency")
    alpha = (values != transparency).astype(np.float32) if isinstance(transparency, int) else None
    # Pillow inverts "white is zero" TIFFs (PhotometricInterpretation 0) of up to 8 bits, but not these.
    if (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    ):
        values = largest - values
    return np.clip(values.astype(np.float32) / largest, 0.0, 1.0), alpha


def _scale_to_unit(values: np.ndarray) -> np.ndarray:
    """Numbers of unknown range to float32 0..1; see `read` for the rule."""
    ranges = (1.0, 255.0, 65535.0) if np.issubdtype(values.dtype, np.floating) else (65535.0,)
    values = values.astype(np.float64)
    values[~np.isfinite(values)] = 0.0
    largest = values.max()
    scale = next((limit for limit in ranges if largest <= limit), largest)
    return np.clip(values / scale, 0.0, 1.0).astype(np.float32)


def _to_unit(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / np.float32(255)


def _dpi(dpi: object) -> tuple[float, float] | None:
    """Two positive finite numbers, or None: files also hold zeros, 0/0 rationals and single values."""
    try:
        horizontal, vertical = (float(value) for value in dpi)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not (0 < horizontal < math.inf and 0 < vertical < math.inf):
        return None
    return horizontal, vertical

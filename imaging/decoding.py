"""What Pillow opens to pictures, in the depth of the file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from .exif import PREFIX
from .limits import check_size
from .picture import Picture
from .png import SIGNATURE, described, without_metadata

# Pixels that are converted at once: what is needed beside the picture itself.
_STRIP_PIXELS = 1 << 22

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

# 1032 to one is the most that deflate reaches: a header that claims more is damaged.
_LARGEST_DEFLATE_RATIO = 1032

Reopen = Callable[[], Image.Image]
Kind = Literal["still", "animation", "pages"]
# Files of other formats hold further pictures too (previews, layers, sizes of an icon): no frames of the first.
_KINDS: dict[str | None, Kind] = {
    "GIF": "animation",
    "PNG": "animation",
    "WEBP": "animation",
    "AVIF": "animation",
    "FLI": "animation",
    "TIFF": "pages",
    "DCX": "pages",
}
# PostScript is a program, and Ghostscript would run it.
FORMATS_LEFT_OUT = frozenset({"EPS"})


class OpenFile(Protocol):
    """An open file of pictures: how many and which, and what decodes one of them.

    Attributes:
        size: (height, width) of the first, upright.
        loop: how often an animation runs, 0 for ever.
    """

    size: tuple[int, int]
    kind: Kind
    count: int
    loop: int

    def load(self, index: int) -> Picture: ...


class PillowFile:
    """A file of one of the formats that Pillow decodes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._described: dict[str, bytes] = {}
        self._is_png = stream.read(8) == SIGNATURE
        if self._is_png:
            self._described = described(stream)
        try:
            self._image = self._open()
        except Exception:
            if not self._is_png:
                raise
            self._repair()
        width, height = self._image.size
        if self._is_png and width * height / 8 > _LARGEST_DEFLATE_RATIO * stream.seek(0, io.SEEK_END):
            raise ValueError(f"{width} x {height} pixels are more than so few bytes can hold")
        self.size = (width, height) if swaps_sides(self._image) else (height, width)
        kind = _KINDS.get(self._image.format, "still")
        frames = getattr(self._image, "n_frames", 1) if kind != "still" else 1
        check_size(width, height, frames)
        self._frames = list(range(frames)) if kind != "pages" else self._pages(frames)
        self.count = len(self._frames)
        self.kind: Kind = kind if self.count > 1 else "still"
        loop = self._image.info.get("loop")
        if self._image.format == "GIF":  # it counts repetitions, the others count how often they run
            loop = 1 if loop is None else loop and loop + 1
        self.loop = loop if isinstance(loop, int) and loop > 0 else 0

    def load(self, index: int) -> Picture:
        try:
            return self._load(self._frames[index])
        except Exception:
            if not self._is_png:
                raise
            self._repair()
            return self._load(index)

    def _load(self, number: int) -> Picture:
        if self.kind == "animation":
            self._image.seek(number)
            picture = to_picture(self._image, flatten=True)
        else:
            picture = to_picture(self._at(number), lambda: self._at(number))
        picture.color_chunks = {name: data for name, data in self._described.items() if name not in ("iCCP", "eXIf")}
        if picture.icc_profile is None:
            picture.icc_profile = fitting_profile(self._described.get("iCCP"), picture.grey)
        return picture

    def _open(self) -> Image.Image:
        Image.init()
        # To the end first: libtiff moves the file behind the back of its buffer, within which a seek moves nothing.
        self._stream.seek(0, io.SEEK_END)
        self._stream.seek(0)
        image = Image.open(self._stream, formats=[name for name in Image.ID if name not in FORMATS_LEFT_OUT])
        if "eXIf" in self._described:
            image.info.setdefault("exif", PREFIX + self._described["eXIf"])
        return image

    def _at(self, number: int) -> Image.Image:
        """The file opened once more, where nothing is decoded yet."""
        image = self._open()
        if number:
            image.seek(number)
        return image

    def _repair(self) -> None:
        """Damaged metadata of a PNG costs only itself."""
        self._is_png = False
        self._stream.seek(0)
        self._stream = io.BytesIO(without_metadata(self._stream.read()))
        self._image = self._open()

    def _pages(self, count: int) -> list[int]:
        """Those that are neither a smaller version of another page nor a mask (TIFF 6.0, NewSubfileType)."""
        pages = []
        for number in range(count):
            self._image.seek(number)
            tags = getattr(self._image, "tag_v2", {})
            if not int(tags.get(254, 0)) & 5:
                pages.append(number)
            check_size(*self._image.size)
        return pages or [0]


def layout(image: Image.Image) -> str:
    """Pillow's raw mode, the pixel layout inside the file; known only before `load()`.

    It says what the decoded mode hides: that RGBA was grey with alpha, or that 16-bit values only use 12 bits.
    """
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    args = tiles[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def swaps_sides(image: Image.Image) -> bool:
    """Whether rows of the file are columns of the upright picture: by a quarter turn or a transposition."""
    return orientation(image) in (5, 6, 7, 8)


def orientation(image: Image.Image) -> int:
    """EXIF's or XMP's, 1 (upright) to 8; 1 where it cannot be read."""
    try:
        # The base class's, because that of PNG decodes the pixels to see what stands behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels, (H, W, ...), as they are to be seen (EXIF 2.32, 4.6.4 A)."""
    if orientation in (5, 6, 7, 8):
        stored = stored.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    return stored


def to_picture(image: Image.Image, reopen: Reopen | None = None, *, flatten: bool = False) -> Picture:
    """The frame that `image` stands at.

    Args:
        image: opened, not yet loaded.
        reopen: opens the same frame again, to decode it twice: needed for more than 8 bits per channel.
        flatten: give RGB or RGB and alpha, whatever the layout: frames of one animation differ in it.
    """
    raw = layout(image)
    quarter = swaps_sides(image)
    pixels, turn = _decode(image, raw, reopen)
    if flatten and pixels.shape[2] < 3:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    grey = pixels.shape[2] < 3
    # `info` and not `text` has the values that Pillow corrects.
    text = {key: str(image.info.get(key, value)) for key, value in getattr(image, "text", {}).items()}
    xmp = image.info.get("xmp") or getattr(image, "tag_v2", {}).get(700)
    if isinstance(xmp, str):
        xmp = xmp.encode()
    exif = exif_block(image)
    if turn != 1:
        for key, value in text.items():
            if key == "XML:com.adobe.xmp":
                text[key] = _upright_xmp(value.encode()).decode()
        xmp = _upright_xmp(xmp) if xmp else None
    dpi = positive_pair(image.info.get("dpi"))
    if isinstance(image, TiffImagePlugin.TiffImageFile) and ExifTags.Base.XResolution not in image.tag_v2:
        dpi = None  # Pillow gives 1 pixel per inch where the file gives nothing
    if dpi is not None and quarter:
        dpi = dpi[1], dpi[0]
    duration = image.info.get("duration")
    return Picture(
        pixels=pixels,
        icc_profile=None if image.mode in ("CMYK", "LAB") else fitting_profile(image.info.get("icc_profile"), grey),
        exif=exif,
        dpi=dpi,
        text=text,
        xmp=xmp or None,
        duration=float(duration) if isinstance(duration, (int, float)) else None,
    )


def fitting_profile(profile: bytes | None, grey: bool) -> bytes | None:
    """The profile if it is for such pixels: bytes 16..20 name their colour space (ICC.1:2022, 7.2.6)."""
    return bytes(profile) if profile and profile[16:20] == (b"GRAY" if grey else b"RGB ") else None


def _decode(image: Image.Image, raw: str, reopen: Reopen | None) -> tuple[np.ndarray, int]:
    """Upright pixels (H, W, 1..4), and the orientation that they had."""
    tags = getattr(image, "tag_v2", {})
    if 16 in tags.get(258, ()) and tags.get(284) == 2:
        raise NotImplementedError("Pillow takes planes of 16 bits for 8")
    if ";16" in raw and image.mode in ("RGB", "RGBA") and reopen is not None:
        if raw.split(";")[0] not in ("LA", "RGB", "RGBA", "RGBX"):
            raise NotImplementedError(f"Pillow reads 8 bits only of {raw}")
        return _decode_16_bit(image, raw, reopen)
    image.load()
    turn = orientation(image)  # 1 for a TIFF, which Pillow turns upright while it decodes
    if image.mode.startswith("I;16"):
        pixels = _16_bit_grey(image, raw)
    elif image.mode in ("I", "F"):
        pixels = from_unknown_range(np.asarray(image))[..., None]
    else:
        pixels = _in_strips(image, turn, _converter(image, raw))
        return pixels, turn
    return np.ascontiguousarray(turned(pixels, turn)), turn


def _in_strips(image: Image.Image, turn: int, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Upright uint8 pixels; nothing but the result is held for the whole picture."""
    width, height = image.size
    pixels: np.ndarray | None = None
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip = convert(image if step >= height else image.crop((0, top, width, bottom)))
        if pixels is None:
            sides = (width, height) if turn in (5, 6, 7, 8) else (height, width)
            pixels = np.empty((*sides, strip.shape[2]), strip.dtype)
        # The orientations that turn by a quarter are each other's inverses; all others are their own.
        turned(pixels, {6: 8, 8: 6}.get(turn, turn))[top:bottom] = strip
    assert pixels is not None
    return pixels


def _converter(image: Image.Image, raw: str) -> Callable[[Image.Image], np.ndarray]:
    """What makes uint8 (H, W, 1..4) of a strip of an image of up to 8 bits."""
    mode, transparency = image.mode, image.info.get("transparency")
    if mode in ("1", "L"):
        if not isinstance(transparency, int):
            return lambda strip: np.asarray(strip.convert("L"))[..., None]
        # Pillow scales 2- and 4-bit grey to 8 bits, but not the transparent value that goes with it.
        value = 255 * bool(transparency) if mode == "1" else transparency * {"L;2": 85, "L;4": 17}.get(raw, 1)
        return lambda strip: with_key(np.asarray(strip.convert("L"))[..., None], [value])
    if mode in ("LA", "La"):
        return lambda strip: np.asarray(strip.convert("LA"))
    if mode == "RGBA" and raw.startswith("LA"):
        return lambda strip: np.asarray(strip)[..., 2:]
    if mode == "RGB" and isinstance(transparency, tuple):
        # 16-bit colour arrives as its high bytes, its transparent colour does not.
        colour = [value >> (8 if ";16" in raw else 0) for value in transparency]
        return lambda strip: with_key(np.asarray(strip), colour)
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and image.has_transparency_data):
        return lambda strip: np.asarray(strip.convert("RGBA"))
    if mode == "CMYK":
        return _cmyk_converter(image.info.get("icc_profile"))
    return lambda strip: np.asarray(strip.convert("RGB"))


def _cmyk_converter(profile: bytes | None) -> Callable[[Image.Image], np.ndarray]:
    transform: Any = None
    if profile:
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
        except ImageCms.PyCMSError:
            # A damaged or mismatched profile costs colour accuracy, not the picture.
            pass
    if transform is None:
        return lambda strip: np.asarray(strip.convert("RGB"))
    return lambda strip: np.asarray(transform.apply(strip))


def with_key(colours: np.ndarray, key: list[int]) -> np.ndarray:
    """Pixels with the alpha of a file that names one colour as transparent."""
    opaque = (colours != np.array(key)).any(axis=2, keepdims=True)
    alpha = np.where(opaque, np.iinfo(colours.dtype).max, 0).astype(colours.dtype)
    return np.concatenate([colours, alpha], axis=2)


def _decode_16_bit(image: Image.Image, raw: str, reopen: Reopen) -> tuple[np.ndarray, int]:
    """Pillow has no mode for 16 bits per channel in colour, but its decoders unpack the bytes that they are told to."""
    mode, transparency = image.mode, image.info.get("transparency")
    if raw.startswith("LA"):
        # As four channels of 8 bits: the high and the low byte of grey, then those of alpha.
        _set_layout(image, "RGBA")
        image.load()
        turn = orientation(image)
        pixels = _in_strips(
            image, turn, lambda strip: np.ascontiguousarray(np.asarray(strip)).view(">u2").astype("=u2")
        )
        return pixels, turn
    kind = raw.split(";")[0]
    big = raw.endswith("B") or (raw.endswith("N") and np.little_endian is False)
    names = ("B", "L") if big else ("L", "B")
    parts: list[np.ndarray] = []
    for name in names:
        _set_layout(image, f"{kind};16{name}")
        image.load()
        turn = orientation(image)
        parts.append(_in_strips(image, turn, lambda strip: np.asarray(strip)))
        image = reopen()
    high, low = parts
    pixels = high.astype(np.uint16)
    pixels <<= 8
    pixels |= low
    if mode == "RGB" and isinstance(transparency, tuple):
        pixels = with_key(pixels, list(transparency))
    return pixels, turn


def _set_layout(image: Image.Image, raw: str) -> None:
    tiles = []
    for tile in image.tile:  # type: ignore[attr-defined]
        *place, args = tile
        args = (raw, *args[1:]) if isinstance(args, tuple) else raw
        tiles.append(tile._replace(args=args) if hasattr(tile, "_replace") else (*place, args))
    image.tile = tiles  # type: ignore[attr-defined]


def _16_bit_grey(image: Image.Image, raw: str) -> np.ndarray:
    values = np.asarray(image).astype(np.uint16)[..., None]
    transparency = image.info.get("transparency")
    if isinstance(transparency, int):
        return with_key(values, [transparency])
    if raw == "I;12":
        values = np.rint(np.minimum(values, 4095) * np.float32(65535 / 4095)).astype(np.uint16)
    # Pillow inverts "white is zero" TIFFs (PhotometricInterpretation 0) of up to 8 bits, but not these.
    if (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    ):
        values = 65535 - values
    return values


def from_unknown_range(values: np.ndarray) -> np.ndarray:
    """Integers of more than 16 bits to uint16, floating point to float32 in 0..1; see `read` for the rule."""
    floating = np.issubdtype(values.dtype, np.floating)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) if floating else values
    largest = values.max()
    scale = next((limit for limit in ((1.0, 255.0, 65535.0) if floating else (65535,)) if largest <= limit), largest)
    unit = np.clip(values / scale, 0, 1)
    return unit.astype(np.float32) if floating else np.rint(unit * 65535).astype(np.uint16)


def exif_block(image: Image.Image) -> bytes | None:
    try:
        exif = image.getexif()
        if not exif:
            return None
        if image.format == "TIFF":
            exif = _descriptive(exif)
            return exif.tobytes() if exif else None
        raw = image.info.get("exif")
        if ExifTags.Base.Orientation in exif:
            del exif[ExifTags.Base.Orientation]
            return exif.tobytes() if exif else None
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


def _upright_xmp(packet: bytes) -> bytes:
    return re.sub(rb'(tiff:Orientation(?:="|>))[2-8]', rb"\g<1>1", packet)


def positive_pair(dpi: object) -> tuple[float, float] | None:
    """Two positive finite numbers, or None: files also hold zeros, 0/0 rationals and single values."""
    try:
        horizontal, vertical = (float(value) for value in dpi)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not (0 < horizontal < math.inf and 0 < vertical < math.inf):
        return None
    return horizontal, vertical

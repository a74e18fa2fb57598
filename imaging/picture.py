"""The one form in which pictures travel through the package."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image

from .alpha import fill_hidden
from .profiles import LINEAR_SRGB, ColourSpace, colour_space

# ITU-R BT.601, the weights Pillow itself uses between RGB and L.
_LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)

_LARGEST = {np.dtype(np.uint8): np.float32(255), np.dtype(np.uint16): np.float32(65535)}


def luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 luma of `rgb`, (H, W, 3) float32 to (H, W) float32; equal channels come back as they were."""
    return rgb @ _LUMA_WEIGHTS


def to_unit(values: np.ndarray) -> np.ndarray:
    """uint8 and uint16 to float32 in 0..1, float32 as it is."""
    largest = _LARGEST.get(values.dtype)
    return values if largest is None else np.divide(values, largest, dtype=np.float32)


class Picture:
    """A picture and everything of its file that has to survive processing.

    Pixels stay in the depth of the file, so that a photograph of 8 bits takes three bytes a pixel; `rows` gives a
    network what it needs of them, strip by strip.

    Args:
        rgb: floating point (H, W, 3), 0..1, in the colour space of `icc_profile` (sRGB where there is none).
        alpha: floating point (H, W), 0 transparent .. 1 opaque, not premultiplied; None for an opaque picture.
        grey: the picture is greyscale; of `rgb` the luma is kept.
        bit_depth: 8, 16 or 32 (floating point): bits per channel that a file of it keeps; by default those of
            `pixels`, or 8.
        pixels: instead of `rgb`, `alpha` and `grey`: (H, W, C) of uint8, uint16 or float32, with C = 1 grey, 2 grey and
            alpha, 3 RGB, 4 RGB and alpha.
        linear: colours are linear light of sRGB's primaries, with values beyond 1, as OpenEXR has them.

    Attributes:
        icc_profile: embedded ICC profile that fits the pixels (RGB, or GRAY where `grey`), byte for byte.
        exif: EXIF block with its `Exif\\0\\0` prefix. The orientation is already applied and its tag reset.
        dpi: horizontal and vertical resolution, pixels per inch.
        text: PNG text chunks by keyword.
        xmp: XMP packet of other formats than PNG.
        color_chunks: what a PNG says of its colours besides a profile: sRGB, gAMA, cHRM and cICP chunks by name.
        duration: of a frame of an animation, in milliseconds.

    Raises:
        ValueError: shapes, types, sizes or `bit_depth` are not as above.
    """

    def __init__(
        self,
        rgb: np.ndarray | None = None,
        alpha: np.ndarray | None = None,
        grey: bool = False,
        bit_depth: int | None = None,
        icc_profile: bytes | None = None,
        exif: bytes | None = None,
        dpi: tuple[float, float] | None = None,
        text: dict[str, str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        linear: bool = False,
        xmp: bytes | None = None,
        color_chunks: dict[str, bytes] | None = None,
        duration: float | None = None,
    ) -> None:
        if pixels is None:
            if rgb is None:
                raise ValueError("A picture needs `rgb` or `pixels`.")
            pixels = _joined(rgb, alpha, grey)
            bit_depth = bit_depth or 8
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or 0 in pixels.shape:
            raise ValueError(f"pixels must have the shape (height, width, 1 to 4), not {pixels.shape}.")
        if pixels.dtype not in (np.uint8, np.uint16, np.float32):
            raise ValueError(f"pixels must be uint8, uint16 or float32, not {pixels.dtype}.")
        if bit_depth not in (None, 8, 16, 32):
            raise ValueError(f"bit_depth must be 8, 16 or 32, not {bit_depth}.")
        self.pixels = pixels
        self.bit_depth: int = bit_depth or 8 * pixels.itemsize
        self.linear = linear
        self.icc_profile = icc_profile
        self.exif = exif
        self.dpi = dpi
        self.text: dict[str, str] = {} if text is None else text
        self.xmp = xmp
        self.color_chunks: dict[str, bytes] = {} if color_chunks is None else color_chunks
        self.duration = duration

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def grey(self) -> bool:
        """The picture is greyscale: the three channels of `rgb` are equal."""
        return self.pixels.shape[2] < 3

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)

    @property
    def rgb(self) -> np.ndarray:
        """float32 (H, W, 3), 0..1, in the colour space of `icc_profile`: a copy, unless `pixels` are just that."""
        return self.colours(0, self.height)

    @property
    def alpha(self) -> np.ndarray | None:
        """float32 (H, W), 0..1, or None."""
        return to_unit(np.ascontiguousarray(self.pixels[..., -1])) if self.has_alpha else None

    @cached_property
    def space(self) -> ColourSpace | None:
        """The colour space of the pixels, None where it is sRGB (or grey) and nothing needs converting."""
        if self.linear:
            return LINEAR_SRGB
        return None if self.icc_profile is None or self.grey else colour_space(self.icc_profile)

    def colours(self, top: int, bottom: int) -> np.ndarray:
        """Rows as they are in the file: float32 (bottom - top, W, 3), 0..1, in the picture's own colour space."""
        if self.grey:
            return np.repeat(to_unit(self.pixels[top:bottom, :, :1]), 3, axis=2)
        return to_unit(self.pixels[top:bottom, :, :3])

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows as a network is given them: float32 (bottom - top, W, 3), 0..1, sRGB, contiguous.

        Colours are converted through the embedded profile, and clipped to what sRGB holds. Under full transparency they
        are those of the nearest visible neighbours, because what a file stores there is as good as random.

        Raises:
            ValueError: not 0 <= top <= bottom <= height.
        """
        if not 0 <= top <= bottom <= self.height:
            raise ValueError(f"rows {top} to {bottom} are not within a picture of {self.height}.")
        if self.has_alpha:
            return fill_hidden(self._srgb, self.pixels[..., -1], top, bottom)
        return np.ascontiguousarray(self._srgb(top, bottom))

    def _srgb(self, top: int, bottom: int) -> np.ndarray:
        rgb = self.colours(top, bottom)
        if self.space is not None:
            rgb = self.space.to_srgb(rgb)
        return np.clip(rgb, 0, 1) if self.space is not None or rgb.base is not None else rgb

    def with_rgb(self, rgb: np.ndarray) -> Picture:
        """The same picture with new pixels.

        Alpha is resized to the new size (bicubic, in float), `dpi` is scaled so that the printed size stays, and
        everything else is kept. A grey picture stays grey: its new channels are replaced by their luma.

        Args:
            rgb: floating point (H', W', 3), 0..1, of any size, in the picture's own colour space; values outside are
                clipped.

        Raises:
            ValueError: `rgb` has another shape or is not floating point.
        """
        checked = Picture(rgb)
        height, width = checked.height, checked.width
        alpha = self.alpha
        if alpha is not None and alpha.shape != (height, width):
            # Mode "F" keeps soft edges free of 8-bit steps; bicubic overshoots, hence the clip.
            resized = Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC)
            alpha = np.clip(np.asarray(resized), 0.0, 1.0)
        dpi = self.dpi
        if dpi is not None:
            dpi = (dpi[0] * width / self.width, dpi[1] * height / self.height)
        return Picture(
            np.clip(checked.pixels, 0.0, 1.0),
            alpha,
            self.grey,
            self.bit_depth,
            self.icc_profile,
            self.exif,
            dpi,
            dict(self.text),
            xmp=self.xmp,
            color_chunks=self.color_chunks,
            duration=self.duration,
        )


def _joined(rgb: np.ndarray, alpha: np.ndarray | None, grey: bool) -> np.ndarray:
    if rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"rgb must have the shape (height, width, 3), not {rgb.shape}.")
    if not np.issubdtype(rgb.dtype, np.floating):
        raise ValueError(f"rgb must be floating point in 0..1, not {rgb.dtype}; divide integers by their maximum.")
    if alpha is not None and alpha.shape != rgb.shape[:2]:
        raise ValueError(f"alpha has the shape {alpha.shape}, but rgb has {rgb.shape}.")
    pixels = rgb.astype(np.float32, copy=False)
    if grey:
        pixels = luma(pixels)[..., None]
    return pixels if alpha is None else np.concatenate([pixels, alpha[..., None]], axis=2, dtype=np.float32)

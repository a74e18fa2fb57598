"""The one form in which pictures travel through the package."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

# ITU-R BT.601, the weights Pillow itself uses between RGB and L.
_LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 luma of `rgb`, (H, W, 3) float32 to (H, W) float32; equal channels come back as they were."""
    return rgb @ _LUMA_WEIGHTS


@dataclass(eq=False)
class Picture:
    """A picture and everything of its file that has to survive processing.

    Attributes:
        rgb: float32 (H, W, 3), 0..1, in the colour space of `icc_profile` (sRGB where there is none).
        alpha: float32 (H, W), 0 transparent .. 1 opaque, not premultiplied; None for an opaque format.
        grey: the file was greyscale; the three channels of `rgb` are equal.
        bit_depth: 8 or 16, bits per channel of the file as Pillow decodes it.
        icc_profile: embedded ICC profile that fits the pixels (RGB, or GRAY where `grey`), byte for byte.
        exif: EXIF block with its `Exif\\0\\0` prefix. The orientation is already applied and its tag reset.
        dpi: horizontal and vertical resolution, pixels per inch.
        text: PNG text chunks by keyword.

    Raises:
        ValueError: shapes, sizes or `bit_depth` are not as above.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    grey: bool = False
    bit_depth: int = 8
    icc_profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rgb.ndim != 3 or self.rgb.shape[2] != 3 or 0 in self.rgb.shape:
            raise ValueError(f"rgb must have the shape (height, width, 3), not {self.rgb.shape}.")
        if not np.issubdtype(self.rgb.dtype, np.floating):
            raise ValueError(
                f"rgb must be floating point in 0..1, not {self.rgb.dtype}; divide integers by their maximum."
            )
        self.rgb = self.rgb.astype(np.float32, copy=False)
        if self.alpha is not None:
            if self.alpha.shape != self.rgb.shape[:2]:
                raise ValueError(f"alpha has the shape {self.alpha.shape}, but rgb has {self.rgb.shape}.")
            self.alpha = self.alpha.astype(np.float32, copy=False)
        if self.bit_depth not in (8, 16):
            raise ValueError(f"bit_depth must be 8 or 16, not {self.bit_depth}.")

    @property
    def height(self) -> int:
        return self.rgb.shape[0]

    @property
    def width(self) -> int:
        return self.rgb.shape[1]

    def with_rgb(self, rgb: np.ndarray) -> Picture:
        """The same picture with new pixels.

        Alpha is resized to the new size (bicubic, in float), `dpi` is scaled so that the printed size stays, and
        everything else is kept. A grey picture stays grey: its new channels are replaced by their luma.

        Args:
            rgb: floating point (H', W', 3), 0..1, of any size; values outside are clipped.

        Raises:
            ValueError: `rgb` has another shape or is not floating point.
        """
        checked = Picture(rgb)
        height, width = checked.height, checked.width
        new_rgb = checked.rgb
        if self.grey:
            new_rgb = np.repeat(luma(new_rgb)[..., None], 3, axis=2)
        alpha = self.alpha
        if alpha is not None and alpha.shape != (height, width):
            # Mode "F" keeps soft edges free of 8-bit steps; bicubic overshoots, hence the clip.
            resized = Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC)
            alpha = np.clip(np.asarray(resized), 0.0, 1.0)
        dpi = self.dpi
        if dpi is not None:
            dpi = (dpi[0] * width / self.width, dpi[1] * height / self.height)
        return replace(self, rgb=np.clip(new_rgb, 0.0, 1.0), alpha=alpha, dpi=dpi, text=dict(self.text))

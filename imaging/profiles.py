"""Colour spaces of pictures to sRGB, which networks know, and back."""

from __future__ import annotations

import io
import struct
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image

# A conversion that moves no colour by more than two steps of 8 bits, and most by less than half of one, is none:
# profiles of sRGB itself differ by what they were rounded to, which shows next to black.
_IDENTITY_MEAN, _IDENTITY_MAX = 0.5 / 255, 2 / 255
# Samples a side of the tables that stand for profiles of other kinds than matrix and curves.
_TABLE = 33

# Linear light of sRGB's primaries to XYZ, adapted to D50, as littlecms rounds it in its own sRGB profile.
_SRGB_TO_XYZ = np.array([[28576, 25239, 9375], [14581, 46983, 3972], [912, 6361, 46787]], dtype=np.float64) / 65536


class ColourSpace(Protocol):
    """Colours (..., 3) of a picture to sRGB and back, float32.

    What is outside 0..1 after `to_srgb` is out of sRGB's gamut.

    Attributes:
        exact: for what is inside, the way there and back changes nothing.
        both_ways: there is a way back; profiles of scanners and cameras may have none.
    """

    exact: bool
    both_ways: bool

    def to_srgb(self, rgb: np.ndarray) -> np.ndarray: ...

    def from_srgb(self, rgb: np.ndarray) -> np.ndarray: ...


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB's curve (IEC 61966-2-1), mirrored below zero."""
    size = np.abs(linear)
    curve = np.where(size <= 0.0031308, size * 12.92, 1.055 * np.power(size, np.float32(1 / 2.4)) - 0.055)
    return np.copysign(curve, linear, dtype=np.float32)


def srgb_decoded(encoded: np.ndarray) -> np.ndarray:
    """sRGB's curve to linear light (IEC 61966-2-1), mirrored below zero."""
    size = np.abs(encoded)
    curve = np.where(
        size <= 0.04045, size / 12.92, np.power((size + np.float32(0.055)) / np.float32(1.055), np.float32(2.4))
    )
    return np.copysign(curve, encoded, dtype=np.float32)


class _LinearSrgb:
    exact = both_ways = True

    def to_srgb(self, rgb: np.ndarray) -> np.ndarray:
        return srgb_encoded(rgb)

    def from_srgb(self, rgb: np.ndarray) -> np.ndarray:
        return srgb_decoded(rgb)


LINEAR_SRGB: ColourSpace = _LinearSrgb()
"""What OpenEXR files hold where they say nothing else."""


class _MatrixSpace:
    """A profile of three curves and a matrix (ICC.1:2022, F.3).

    Args:
        curves: encoded values to linear light, sampled evenly over 0..1.
        to_xyz: columns are the primaries.

    Raises:
        ValueError: curves that do not lead from dark to light.
    """

    both_ways = True

    def __init__(self, curves: list[np.ndarray], to_xyz: np.ndarray) -> None:
        if not all(np.isfinite(curve).all() and curve[-1] - curve[0] > 0.5 for curve in curves):
            raise ValueError("curves that do not lead from dark to light")
        # A curve that stands still somewhere cannot be read backwards there.
        self.exact = all(bool((np.diff(curve) > 0).all()) for curve in curves)
        self._curves = [curve.astype(np.float32) for curve in curves]
        # The other way from the root of linear light, over which it is smooth next to black too.
        linear = np.linspace(0, 1, 2 * len(curves[0]) - 1) ** 2.4
        self._inverses = [
            np.interp(linear, np.maximum.accumulate(curve), np.linspace(0, 1, len(curve))).astype(np.float32)
            for curve in curves
        ]
        forward = np.linalg.inv(_SRGB_TO_XYZ) @ to_xyz
        self._forward = forward.T.astype(np.float32)
        self._backward = np.linalg.inv(forward).T.astype(np.float32)

    def to_srgb(self, rgb: np.ndarray) -> np.ndarray:
        return srgb_encoded(_read(self._curves, rgb) @ self._forward)

    def from_srgb(self, rgb: np.ndarray) -> np.ndarray:
        linear = np.clip(srgb_decoded(rgb) @ self._backward, 0, 1)
        return _read(self._inverses, np.power(linear, np.float32(1 / 2.4)))


def _read(tables: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    """A table for each channel, evenly sampled over 0..1, at `values` (..., 3), linearly interpolated."""
    result = np.empty(values.shape, np.float32)
    for channel, table in enumerate(tables):
        place = np.clip(values[..., channel], 0, 1) * np.float32(len(table) - 1)
        below = np.minimum(place.astype(np.int32), len(table) - 2)
        result[..., channel] = table[below] + (place - below) * np.diff(table)[below]
    return result


class _TableSpace:
    """A profile of another kind, such as one with tables of its own: littlecms, sampled and interpolated."""

    exact = False

    def __init__(self, to_srgb: np.ndarray, from_srgb: np.ndarray | None) -> None:
        self._to_srgb, self._from_srgb = to_srgb, from_srgb
        self.both_ways = from_srgb is not None

    def to_srgb(self, rgb: np.ndarray) -> np.ndarray:
        return _interpolated(self._to_srgb, rgb)

    def from_srgb(self, rgb: np.ndarray) -> np.ndarray:
        return rgb if self._from_srgb is None else _interpolated(self._from_srgb, rgb)


def _interpolated(table: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Trilinear: `table` (N, N, N, 3) at `rgb` (..., 3), 0..1."""
    side = len(table)
    place = np.clip(rgb.reshape(-1, 3), 0, 1) * np.float32(side - 1)
    corner = np.minimum(place.astype(np.int32), side - 2)
    part = place - corner
    strides = np.array([side * side, side, 1], np.int32)
    base = corner @ strides
    flat = table.reshape(-1, 3)
    result = np.zeros(place.shape, np.float32)
    for offset in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(offset, part, 1 - part), axis=1, keepdims=True)
        result += weight * flat[base + int(np.dot(offset, strides))]
    return result.reshape(rgb.shape)


@lru_cache(maxsize=16)
def colour_space(profile: bytes) -> ColourSpace | None:
    """What an RGB profile says of colours (media-relative, black point as it is), or None where that is sRGB.

    A damaged profile is taken for sRGB.
    """
    axis = np.linspace(0, 1, 9, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    try:
        with np.errstate(all="ignore"):
            space = _matrix_space(profile) or _table_space(profile)
            there, back = space.to_srgb(grid), space.from_srgb(grid)
    except Exception:
        return None
    moved = np.abs(there - grid)
    damaged = not (np.isfinite(there).all() and np.isfinite(back).all())
    return None if damaged or (moved.mean() < _IDENTITY_MEAN and moved.max() < _IDENTITY_MAX) else space


def _matrix_space(profile: bytes) -> _MatrixSpace | None:
    """None where the profile is of another kind; where it has tables as well, they are what counts."""
    tags = _tags(profile)
    wanted = (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
    if b"A2B0" in tags or profile[20:24] != b"XYZ " or not all(name in tags for name in wanted):
        return None
    columns = [np.array(struct.unpack(">3i", tags[name][8:20])) / 65536 for name in wanted[:3]]
    return _MatrixSpace([_curve(tags[name]) for name in wanted[3:]], np.stack(columns, axis=1))


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack(">I", profile[128:132])
    entries = [struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i]) for i in range(min(count, 100))]
    return {name: profile[offset : offset + size] for name, offset, size in entries}


def _curve(tag: bytes, samples: int = 4097) -> np.ndarray:
    """A curveType or parametricCurveType (ICC.1:2022, 10.6 and 10.18) as a table over 0..1."""
    x = np.linspace(0, 1, samples)
    if tag[:4] == b"curv":
        (count,) = struct.unpack(">I", tag[8:12])
        if count == 0:
            return x
        values = np.frombuffer(tag, ">u2", count, 12)
        return x ** (values[0] / 256) if count == 1 else values / 65535
    (kind,) = struct.unpack(">H", tag[8:10])
    number = (1, 3, 4, 5, 7)[kind]
    values = np.zeros(7)
    values[:number] = np.frombuffer(tag, ">i4", number, 12) / 65536
    g, a, b, c, d, e, f = values.tolist()
    if kind == 0:
        return x**g
    # Each kind is the last one with less of it.
    if kind in (1, 2):
        d, e, f, c = -b / a, (0.0 if kind == 1 else c), (0.0 if kind == 1 else c), 0.0
    return np.clip(np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f), 0, 1)


def _table_space(profile: bytes) -> _TableSpace:
    from PIL import ImageCms

    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    axis = np.rint(np.linspace(0, 255, _TABLE)).astype(np.uint8)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    image = Image.fromarray(grid.reshape(_TABLE, -1, 3))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC

    def table(source: ImageCms.ImageCmsProfile, target: ImageCms.ImageCmsProfile) -> np.ndarray:
        transform = ImageCms.buildTransform(source, target, "RGB", "RGB", intent)
        return np.asarray(transform.apply(image), np.float32).reshape(grid.shape) / 255

    to_srgb = table(own, srgb)
    try:
        return _TableSpace(to_srgb, table(srgb, own))
    except ImageCms.PyCMSError:
        return _TableSpace(to_srgb, None)

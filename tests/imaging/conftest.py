"""Pictures and profiles that the tests of this room share."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms


@pytest.fixture
def rng():
    return np.random.default_rng(20240917)


@pytest.fixture
def noise(rng):
    """uint8 (13, 17, 3): odd sides, no two pixels alike, so that a lost or moved pixel shows."""
    return rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)


@pytest.fixture
def ramp():
    """uint8 (24, 40, 3), smooth, the four corners in different colours: survives JPEG, shows every orientation."""
    rows, columns = np.mgrid[0:24, 0:40].astype(np.float64)
    return np.stack([columns / 39 * 255, rows / 23 * 255, np.full((24, 40), 64.0)], axis=2).round().astype(np.uint8)


@pytest.fixture(scope="session")
def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="session")
def gray_profile(srgb_profile):
    """Says it is for grey pixels, which is all that this package looks at."""
    return srgb_profile[:16] + b"GRAY" + srgb_profile[20:]


@pytest.fixture(scope="session")
def raw_png():
    """Function that builds a PNG by hand, for layouts that Pillow reads but cannot write.

    Takes bit depth, colour type (0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA), width, the packed bytes of each
    row, and further chunks as (name, data) that stand before the pixels.
    """

    def build(depth, colour_type, width, rows, *chunks):
        def chunk(name, data):
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
        body = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in body)

    return build


@pytest.fixture
def exif_block():
    """Function that gives an EXIF block with a camera maker and an orientation."""

    def build(orientation):
        exif = Image.Exif()
        exif[0x010F] = "Maker"
        exif[0x0112] = orientation
        return exif.tobytes()

    return build


@pytest.fixture(scope="session")
def wide_profile(srgb_profile):
    """sRGB's profile with the primaries of Adobe RGB (1998) in its place, and a gamma of 2.2 in its curves."""
    profile = bytearray(srgb_profile)
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    (count,) = struct.unpack_from(">I", profile, 128)
    for place in range(132, 132 + 12 * count, 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, place)
        if name in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in primaries[name]))
        elif name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv\0\0\0\0" + struct.pack(">I", 1)
            struct.pack_into(">H", profile, offset + 12, round(2.2 * 256))
    return bytes(profile)

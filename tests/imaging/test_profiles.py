"""Colour spaces against littlecms, which Pillow brings and tificc is."""

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from tsdsr.imaging import Picture, create, read, write
from tsdsr.imaging.profiles import colour_space, srgb_decoded, srgb_encoded


def with_curves(profile, curve):
    """A profile with another tone curve in all channels; the tag is put at its end."""
    profile = bytearray(profile) + bytes(-len(profile) % 4)
    (count,) = struct.unpack_from(">I", profile, 128)
    for place in range(132, 132 + 12 * count, 12):
        if profile[place : place + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">II", profile, place + 4, len(profile), len(curve))
    return with_length(bytes(profile) + curve + bytes(-len(curve) % 4))


def with_length(profile):
    return struct.pack(">I", len(profile)) + profile[4:]


def parametric(kind, *values):
    return (
        b"para\0\0\0\0"
        + struct.pack(">HH", kind, 0)
        + struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))
    )


CURVES = {
    "gamma": b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(1.8 * 256)) + b"\0\0",
    "linear": b"curv\0\0\0\0\0\0\0\0",
    "table": b"curv\0\0\0\0" + struct.pack(">I64H", 64, *(round(65535 * (i / 63) ** 2.4) for i in range(64))),
    "para 0": parametric(0, 2.2),
    "para 1": parametric(1, 2.4, 1 / 1.1, 0.1 / 1.1),
    "para 3": parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
    "para 4": parametric(4, 2.2, 0.9, 0.05, 0.3, 0.1, 0.05, 0.02),
}


def colours(rng, count=4000):
    return rng.integers(0, 65536, (50, count // 50, 3)).astype(np.uint16)


@pytest.mark.parametrize("name", CURVES)
def test_8_bits_as_littlecms_has_them(rng, wide_profile, name):
    profile = with_curves(wide_profile, CURVES[name])
    values = (colours(rng) >> 8).astype(np.uint8)
    expected = ImageCms.profileToProfile(
        Image.fromarray(values),
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    rows = Picture(pixels=values, icc_profile=profile).rows(0, len(values))
    assert np.abs(rows * 255 - np.asarray(expected)).max() <= 1


@pytest.mark.skipif(shutil.which("tificc") is None, reason="needs tificc of littlecms")
@pytest.mark.parametrize("name", ["gamma", "table", "para 3"])
def test_16_bits_as_littlecms_has_them(rng, wide_profile, tmp_path, name):
    profile = with_curves(wide_profile, CURVES[name])
    (tmp_path / "wide.icc").write_bytes(profile)
    values = colours(rng)
    tifffile.imwrite(tmp_path / "in.tif", values, photometric="rgb", metadata=None)
    command = ["tificc", "-i", tmp_path / "wide.icc", "-o", "*sRGB", "-t1", "-c0", "-w16"]
    subprocess.run([*command, tmp_path / "in.tif", tmp_path / "out.tif"], check=True, capture_output=True)
    rows = Picture(pixels=values, icc_profile=profile).rows(0, len(values))
    assert np.abs(rows - tifffile.imread(tmp_path / "out.tif") / 65535).max() <= 1 / 2000


@pytest.mark.parametrize("name", CURVES)
def test_there_and_back(rng, wide_profile, name):
    space = colour_space(with_curves(wide_profile, CURVES[name]))
    rgb = (colours(rng) / 65535).astype(np.float32)
    srgb = space.to_srgb(rgb)
    inside = ((srgb >= 0) & (srgb <= 1)).all(axis=2)
    if name == "para 1":  # which is flat next to black
        inside &= rgb.min(axis=2) > 0.01
    assert 0.2 < inside.mean() < 0.9
    difference = np.abs(space.from_srgb(srgb[inside]) - rgb[inside])
    assert difference.max() < 0.5 / 255 and difference.mean() < 1e-4


def table_tag(values):
    """A lut8Type of 9 samples a side that does nothing else: (729, 3), uint8."""
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    ramp = bytes(range(256)) * 3
    return b"mft1\0\0\0\0" + bytes([3, 3, 9, 0]) + identity + ramp + values.astype(np.uint8).tobytes() + ramp


@pytest.fixture(scope="module")
def table_profile():
    """Function for a profile whose colours are in tables alone: channels are swapped, and lie in CIE Lab."""
    axis = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    colours = np.asarray(to_lab.apply(Image.fromarray(grid[..., ::-1].copy()))).copy()
    colours[..., 1:] ^= 128  # Pillow's are signed, a profile's have an offset
    coded = grid.copy()
    coded[..., 1:] ^= 128
    image = Image.frombytes("LAB", (1, len(grid)), coded.tobytes())
    back = np.asarray(ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image))[..., ::-1]

    def build(both_ways):
        head = bytearray(128)
        head[8:12], head[12:16], head[16:20], head[20:24], head[36:40] = (
            b"\2\x40\0\0",
            b"scnr",
            b"RGB ",
            b"Lab ",
            b"acsp",
        )
        head[68:80] = struct.pack(">3i", 63190, 65536, 54061)
        tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061), b"A2B0": table_tag(colours)}
        if both_ways:
            tags[b"B2A0"] = table_tag(back)
        index, data = struct.pack(">I", len(tags)), b""
        for name, tag in tags.items():
            index += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(data), len(tag))
            data += tag + bytes(-len(tag) % 4)
        return with_length(bytes(head) + index + data)

    return build


def test_a_profile_of_tables_both_ways(rng, table_profile, tmp_path):
    """The tables are coarse; what they lose is added again."""
    picture = Picture(pixels=rng.integers(0, 256, (40, 50, 3)).astype(np.uint8), icc_profile=table_profile(True))
    rows = picture.rows(0, 40)
    assert np.abs(rows * 255 - picture.pixels[..., ::-1]).mean() < 12
    with create(picture, tmp_path / "photo.png", (40, 50)) as writer:
        writer.begin(picture)
        writer.write(rows)
    again = read(tmp_path / "photo.png")
    assert again.icc_profile == picture.icc_profile
    assert np.abs(again.pixels.astype(int) - picture.pixels).max() <= 1


def test_a_profile_of_tables(rng, table_profile, tmp_path):
    """Colours are as littlecms has them; as there is no way back, the result is sRGB."""
    table_profile = table_profile(False)
    values = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    source = ImageCms.ImageCmsProfile(io.BytesIO(table_profile))
    expected = ImageCms.profileToProfile(
        Image.fromarray(values), source, ImageCms.createProfile("sRGB"), renderingIntent=1
    )
    assert np.abs(np.asarray(expected).astype(int) - values[..., ::-1]).mean() < 12
    picture = Picture(pixels=values, icc_profile=table_profile)
    rows = picture.rows(0, 40)
    assert np.abs(rows * 255 - np.asarray(expected)).mean() < 1
    with create(picture, tmp_path / "photo.png", (40, 50)) as writer:
        writer.begin(picture)
        writer.write(rows)
    again = read(tmp_path / "photo.png")
    assert again.icc_profile is None
    np.testing.assert_allclose(again.rgb, rows, atol=0.51 / 255)
    again = read(write(picture, tmp_path / "as_it_is.png"))
    assert again.icc_profile == table_profile and np.array_equal(again.pixels, values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda profile: profile[:100],
        lambda profile: profile[:200],
        lambda profile: profile[:128] + b"\xff" * 200 + profile[328:],
        lambda profile: with_curves(profile, parametric(1, 2.2, 0, 0.1)),
        lambda profile: with_curves(profile, b"curv\0\0\0\0\xff\xff\xff\xff\0\0"),
        lambda profile: with_curves(profile, parametric(0, -30000)),
        lambda profile: b"x" * 16 + b"RGB ",
    ],
)
def test_a_damaged_profile_is_taken_for_srgb(noise, wide_profile, damage, recwarn):
    picture = Picture(pixels=noise, icc_profile=damage(wide_profile))
    assert np.array_equal(picture.rows(0, 13), Picture(pixels=noise).rows(0, 13))
    assert not recwarn


def test_srgbs_own_curve():
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    np.testing.assert_allclose(srgb_encoded(srgb_decoded(values)), values, atol=1e-5)
    np.testing.assert_allclose(srgb_decoded(np.float32([0.5, 0.04, 1])), [0.2140411, 0.0030960, 1], atol=1e-6)

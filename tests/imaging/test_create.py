"""Results that come in strips: colours, alpha, depth, metadata and memory of what is written."""

import io
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
import tifffile
from PIL import ExifTags, Image, TiffImagePlugin

from tsdsr.imaging import SUPPORTED_OUTPUT_SUFFIXES, Picture, create, open_frames, read, write
from tsdsr.imaging.deflate import Deflater
from tsdsr.imaging.profiles import LINEAR_SRGB, colour_space


def enlarged(rows, factor):
    """What a network might make of rows."""
    return rows.repeat(factor, axis=0).repeat(factor, axis=1)


def save(picture, path, factor=1, heights=(1000,), **options):
    """Enlarges with `enlarged`, handing over strips of the given heights in turn."""
    size = (picture.height * factor, picture.width * factor)
    whole = enlarged(picture.rows(0, picture.height), factor)
    with create(picture, path, size, **options) as writer:
        writer.begin(picture)
        top = number = 0
        while top < size[0]:
            bottom = min(size[0], top + heights[number % len(heights)])
            writer.write(whole[top:bottom])
            top, number = bottom, number + 1
    return path


@pytest.fixture
def smooth(rng):
    """Function for smooth random pixels of a type: (H, W, C)."""

    def make(height, width, channels, dtype=np.uint8):
        noise = Image.fromarray(rng.integers(0, 256, (4, 5, 4), dtype=np.uint8), "RGBA")
        values = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))[..., :channels] / 255
        return np.rint(values * np.iinfo(dtype).max).astype(dtype)

    return make


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg", ".exr"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_it_does_not_matter_how_rows_are_cut(smooth, wide_profile, tmp_path, suffix, dtype):
    """With alpha, a profile, and colours beyond sRGB."""
    picture = Picture(pixels=smooth(90, 31, 4, dtype), icc_profile=wide_profile)
    picture.pixels[20:50, 5:20, 3] = 0
    whole = save(picture, tmp_path / f"whole{suffix}", 3)
    strips = save(picture, tmp_path / f"strips{suffix}", 3, heights=(1, 7, 64, 2))
    a, b = (read(path).pixels.astype(np.float64) for path in (whole, strips))
    # Where a strip begins is rounded, in double precision.
    assert np.abs(a - b).max() <= (1e-3 if suffix == ".exr" else 1)
    assert (a != b).mean() < 0.01


@pytest.mark.parametrize("top", range(0, 130, 13))
def test_rows_are_the_same_however_they_are_cut(smooth, top):
    picture = Picture(pixels=smooth(140, 150, 4))
    picture.pixels[..., 3] = 0
    picture.pixels[60:62, 70:72, 3] = 255
    assert np.array_equal(picture.rows(0, 140)[top : top + 5], picture.rows(top, top + 5))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_and_channels_are_kept(rng, tmp_path, suffix, channels, dtype):
    """Every value comes back, though it went through floating point; read by others too."""
    pixels = rng.integers(0, np.iinfo(dtype).max + 1, (23, 19, channels)).astype(dtype)
    if channels in (2, 4):
        pixels[..., -1] |= 1  # nothing hidden
    path = save(Picture(pixels=pixels), tmp_path / f"photo{suffix}", heights=(5,))
    assert np.array_equal(read(path).pixels, pixels)
    if suffix == ".tif":
        assert np.array_equal(tifffile.imread(path).reshape(pixels.shape), pixels)
    elif dtype == np.uint8:
        with Image.open(path) as image:
            image.verify()


def test_floating_point_tiff(rng, tmp_path):
    pixels = rng.random((9, 7, 3), dtype=np.float32)
    path = save(Picture(pixels=pixels), tmp_path / "photo.tif")
    assert np.array_equal(tifffile.imread(path), pixels)
    assert np.array_equal(read(path).pixels, pixels) and read(path).bit_depth == 32


def test_a_ramp_of_16_bits_has_no_steps(tmp_path):
    pixels = np.linspace(20_000, 21_000, 900).astype(np.uint16).reshape(30, 30, 1).repeat(3, axis=2)
    path = save(Picture(pixels=pixels), tmp_path / "photo.png", 2)
    assert len(np.unique(read(path).pixels)) == 900


# Colours


def test_wide_colours_are_kept(tmp_path, wide_profile):
    """All corners of the cube of a space wider than sRGB, which a network is given clipped."""
    axis = np.array([0, 60, 128, 200, 255], np.uint8)
    pixels = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(25, 5, 3)
    picture = Picture(pixels=pixels, icc_profile=wide_profile)
    rows = picture.rows(0, 25)
    assert rows.min() == 0 and rows.max() == 1 and np.abs(rows * 255 - pixels).max() > 20
    again = read(save(picture, tmp_path / "photo.png", heights=(3,)))
    assert again.icc_profile == wide_profile
    assert np.array_equal(again.pixels, pixels)


def test_what_srgb_holds_is_converted_alone(tmp_path, wide_profile):
    """Next to colours beyond it, no bicubic rest changes a colour inside."""
    pixels = np.full((8, 24, 3), 128, np.uint8)
    pixels[:, 20:] = 0, 255, 0
    picture = Picture(pixels=pixels, icc_profile=wide_profile)
    with create(picture, tmp_path / "photo.tif", (16, 48)) as writer:
        writer.begin(picture)
        writer.write(np.full((16, 48, 3), 0.25, np.float32))
    expected = np.rint(colour_space(wide_profile).from_srgb(np.full((1, 3), 0.25, np.float32)) * 255)
    assert np.array_equal(read(tmp_path / "photo.tif").pixels[:, :36], np.broadcast_to(expected, (16, 36, 3)))


def test_colours_that_are_hidden_reach_nothing(tmp_path, wide_profile):
    """Stored beyond sRGB under full transparency, next to grey."""
    pixels = np.full((8, 24, 4), 128, np.uint8)
    pixels[..., 3] = 255
    pixels[:, 12:] = 0, 255, 0, 0
    picture = Picture(pixels=pixels, icc_profile=wide_profile)
    again = read(save(picture, tmp_path / "photo.png", 2))
    assert np.array_equal(again.pixels[:, :24, :3], np.full((16, 24, 3), 128, np.uint8))


def test_a_profile_of_srgb_changes_nothing(noise, srgb_profile):
    picture = Picture(pixels=noise, icc_profile=srgb_profile)
    assert picture.space is None
    assert np.array_equal(picture.rows(0, 13), Picture(pixels=noise).rows(0, 13))


def test_openexr_keeps_what_is_brighter_than_white(tmp_path, caplog):
    pixels = np.full((12, 16, 3), 0.18, np.float32)
    pixels[4:8, 4:12] = 7.5, 3.0, 0.5
    picture = Picture(pixels=pixels, linear=True)
    rows = picture.rows(0, 12)
    np.testing.assert_allclose(rows[0, 0], 0.4613, atol=1e-3)
    assert rows.max() == 1
    again = read(save(picture, tmp_path / "photo.exr"))
    np.testing.assert_allclose(again.pixels, pixels, rtol=1e-5)
    assert caplog.messages == []
    save(picture, tmp_path / "photo.png")
    assert "photo.png" in caplog.text and "write .exr" in caplog.text
    np.testing.assert_allclose(read(tmp_path / "photo.png").rgb, rows, atol=1e-4)


def test_openexr_with_alpha_and_of_half_precision(smooth, tmp_path):
    pixels = smooth(12, 16, 4).astype(np.float32) / 255
    path = save(Picture(pixels=pixels, linear=True, bit_depth=16), tmp_path / "photo.exr")
    again = read(path)
    assert again.bit_depth == 16 and again.pixels.shape == (12, 16, 4)
    seen = pixels[..., 3] > 0.05
    np.testing.assert_allclose(again.pixels[seen], pixels[seen], atol=2e-3)


def test_a_photograph_as_openexr_is_linear_light(noise, tmp_path):
    path = save(Picture(pixels=noise), tmp_path / "photo.exr")
    np.testing.assert_allclose(read(path).pixels, LINEAR_SRGB.from_srgb(noise.astype(np.float32) / 255), atol=1e-3)


# Alpha


def test_no_dark_rim_around_a_light_object_on_transparent_black(tmp_path):
    """A disc of one colour, whose surroundings are stored as black; composited on its own colour it must vanish."""
    rows, columns = np.mgrid[0:64, 0:64] - 31.5
    inside = np.hypot(rows, columns) < 20
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[inside] = 230, 220, 190, 255
    picture = Picture(pixels=pixels)
    near = np.hypot(rows, columns) < 40
    expected = np.tile(np.float32([230, 220, 190]) / 255, (near.sum(), 1))
    np.testing.assert_allclose(picture.rows(0, 64)[near], expected, atol=1e-6)

    whole = picture.rows(0, 64)
    with create(picture, tmp_path / "disc.png", (256, 256)) as writer:
        writer.begin(picture)
        # A network that blurs as it enlarges.
        for top in range(0, 256, 32):
            planes = [
                np.asarray(Image.fromarray(whole[..., c].copy()).resize((256, 256), Image.Resampling.BICUBIC))
                for c in range(3)
            ]
            writer.write(np.stack(planes, axis=2)[top : top + 32])
    result = read(tmp_path / "disc.png").pixels.astype(np.float32)
    opacity = result[..., 3:] / 255
    assert set(np.unique(opacity[100])) - {0, 1}  # its edge is soft
    composite = result[..., :3] * opacity + np.float32([230, 220, 190]) * (1 - opacity)
    assert np.abs(composite - [230, 220, 190]).max() <= 1.01


def test_alpha_of_16_bits_keeps_them(tmp_path):
    pixels = np.zeros((20, 20, 2), np.uint16)
    pixels[..., 1] = np.linspace(30_000, 30_800, 400).reshape(20, 20)
    again = read(save(Picture(pixels=pixels), tmp_path / "photo.png"))
    assert np.array_equal(again.pixels[..., 1], pixels[..., 1])


def test_alpha_is_enlarged_as_a_whole_picture_would_be(smooth, tmp_path):
    pixels = smooth(37, 21, 4)
    path = save(Picture(pixels=pixels), tmp_path / "photo.png", 3, heights=(4,))
    expected = Image.fromarray(pixels[..., 3].astype(np.float32)).resize((63, 111), Image.Resampling.BICUBIC)
    assert np.abs(read(path).pixels[..., 3] - np.clip(np.asarray(expected), 0, 255)).max() <= 0.51


# Metadata


@pytest.mark.parametrize(
    "suffix", [s for s in (".png", ".jpg", ".tif", ".webp", ".avif", ".heic") if s in SUPPORTED_OUTPUT_SUFFIXES]
)
def test_exif_of_the_larger_picture(noise, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 1
    exif[ExifTags.IFD.Exif] = {
        0xA002: 17,
        0xA003: 13,
        0x829A: TiffImagePlugin.IFDRational(1, 50),
        0x9286: b"ASCII\0\0\0hi",
    }
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 8.0, 30.0)}
    picture = Picture(pixels=noise, exif=exif.tobytes(), dpi=(300.0, 150.0))
    path = save(picture, tmp_path / f"photo{suffix}", 2)
    with _opened_heic(path) if suffix == ".heic" else Image.open(path) as image:
        again = image.getexif()
        inner, place = (again.get_ifd(directory) for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo))
    assert again[0x010F] == "Maker"
    assert (inner[0xA002], inner[0xA003]) == (34, 26)
    assert float(inner[0x829A]) == 0.02 and inner[0x9286] == b"ASCII\0\0\0hi"
    assert place[1] == "N" and [float(value) for value in place[2]] == [48, 8, 30]
    if suffix in (".png", ".jpg", ".tif"):
        assert read(tmp_path / f"photo{suffix}").dpi == pytest.approx((600, 300), rel=1e-2)


def _opened_heic(path):
    import pillow_heif

    image = Image.new("RGB", (1, 1))
    image.info["exif"] = pillow_heif.open_heif(path).info["exif"]
    return image


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_thumbnail_of_exif_is_dropped(noise, tmp_path, order):
    import struct

    def entry(tag, kind, count, value):
        return struct.pack(f"{order}HHI", tag, kind, count) + struct.pack(f"{order}I", value)

    thumbnail = b"\xff\xd8" + bytes(500) + b"\xff\xd9"
    maker = b"Maker\0"
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    # IFD0 at 8 with one entry, its text at 26, IFD1 at 32 with two, the thumbnail at 62.
    first = struct.pack(f"{order}H", 1) + entry(0x010F, 2, 6, 26) + struct.pack(f"{order}I", 32) + maker
    second = struct.pack(f"{order}H", 2) + entry(0x0201, 4, 1, 62) + entry(0x0202, 4, 1, len(thumbnail)) + bytes(4)
    picture = Picture(pixels=noise, exif=b"Exif\0\0" + head + first + second + thumbnail)
    again = read(save(picture, tmp_path / "photo.jpg", 2))
    assert len(again.exif) < 60
    assert again.exif.endswith(maker) and again.exif[28:32] == bytes(4)  # no directory after the first


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_xmp_survives(noise, tmp_path, suffix):
    if suffix == ".jpg" and int(PIL.__version__.split(".")[0]) < 11:
        pytest.skip("this Pillow writes no XMP to JPEG")
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>\xc3\xa4</a></x:xmpmeta>'
    again = read(save(Picture(pixels=noise, xmp=packet), tmp_path / f"photo{suffix}"))
    assert packet in (again.xmp, again.text.get("XML:com.adobe.xmp", "").encode())


def test_colour_chunks_of_png_are_handed_on(raw_png, tmp_path):
    chunks = [(b"cICP", bytes([9, 16, 0, 1])), (b"gAMA", bytes([0, 0, 0xB1, 0x8F])), (b"sRGB", b"\0")]
    (tmp_path / "photo.png").write_bytes(raw_png(8, 2, 1, [b"\x80\x90\xa0"], *chunks))
    picture = read(tmp_path / "photo.png")
    assert picture.color_chunks == {name.decode(): data for name, data in chunks}
    assert read(save(picture, tmp_path / "again.png")).color_chunks == picture.color_chunks


# Formats


def test_subsampling(noise, tmp_path):
    sizes = []
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        path = save(Picture(pixels=noise), tmp_path / "photo.jpg", 4, subsampling=subsampling, quality=95)
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(ValueError, match="4:1:1"):
        create(Picture(pixels=noise), tmp_path / "x.jpg", (13, 17), subsampling="4:1:1")


def test_webp_without_loss(noise, tmp_path):
    path = save(Picture(pixels=noise), tmp_path / "photo.webp", lossless=True)
    assert np.array_equal(read(path).pixels, noise)
    with pytest.raises(ValueError, match="without loss"):
        create(Picture(pixels=noise), tmp_path / "photo.jpg", (13, 17), lossless=True)


@pytest.mark.parametrize(("format", "magic"), [("png", b"\x89PNG"), (".tif", b"II*\0"), ("jpg", b"\xff\xd8")])
def test_to_a_stream(noise, format, magic):
    stream = io.BytesIO()
    save(Picture(pixels=noise), stream, format=format)
    assert stream.getvalue().startswith(magic) and not stream.closed
    stream = io.BytesIO()
    with pytest.raises(RuntimeError), create(Picture(pixels=noise), stream, (13, 17), format=format) as writer:
        writer.begin(Picture(pixels=noise))
        raise RuntimeError
    assert stream.getvalue() == b""


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_files_are_no_larger_than_pillows(smooth, rng, tmp_path, suffix):
    """A photograph (smooth and noisy), and a drawing (few colours, repeated)."""
    photograph = smooth(300, 400, 3) // 2 + rng.integers(0, 6, (300, 400, 3), dtype=np.uint8)
    drawing = np.kron(rng.integers(0, 2, (30, 40, 3), dtype=np.uint8) * 255, np.ones((10, 10, 1), np.uint8))
    for pixels in (photograph, drawing):
        path = save(Picture(pixels=pixels), tmp_path / f"ours{suffix}", heights=(64,))
        options = {"compress_level": 4} if suffix == ".png" else {"compression": "tiff_adobe_deflate"}
        Image.fromarray(pixels).save(tmp_path / f"theirs{suffix}", **options)
        assert path.stat().st_size < 1.05 * (tmp_path / f"theirs{suffix}").stat().st_size + 1000


def test_bigtiff(noise):
    """What TIFF becomes over 4 GiB, at a size that a test can hold."""
    from tsdsr.imaging.encoding import Layout
    from tsdsr.imaging.tiff import TiffEncoder

    stream = io.BytesIO()
    encoder = TiffEncoder(stream, 5 << 30)
    for _ in range(2):
        encoder.begin(Layout((13, 17), 3, 8, dpi=(300, 300), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"))
        encoder.write(noise)
        encoder.end()
    encoder.close()
    assert stream.getvalue()[:4] == b"II+\0"
    stream.seek(0)
    with open_frames(stream) as frames:
        assert [np.array_equal(picture.pixels, noise) for picture in frames] == [True, True]
    stream.seek(0)
    assert np.array_equal(tifffile.imread(stream)[1], noise)


@pytest.mark.skipif(sys.platform == "win32", reason="measures memory as Unix does")
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_memory_does_not_grow_with_the_picture(tmp_path, suffix):
    code = f"""
import resource, sys
import numpy as np
from tsdsr.imaging import Picture, create
source = Picture(pixels=np.zeros((1000, 750, 4), np.uint8))
rows = np.broadcast_to(np.linspace(0, 1, 3000, dtype=np.float32)[:, None], (64, 3000, 3))
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)
with create(source, {str(tmp_path / "photo")!r} + {suffix!r}, (4000, 3000)) as writer:
    writer.begin(source)
    for top in range(0, 4000, 64):
        writer.write(rows[: 4000 - top])
        if top == 64:
            before = used()
print(used() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 15  # MiB, of a result of 48
    assert (tmp_path / f"photo{suffix}").exists()


def test_a_stream_of_several_segments(rng):
    """Each packed in its own way, unpacked as one."""
    parts = [bytes(1 << 20), rng.bytes(1 << 20), b"drawing " * (1 << 17), b"the end"]
    deflater = Deflater()
    packed = b"".join(map(deflater.compress, parts)) + deflater.flush()
    assert zlib.decompress(packed) == b"".join(parts)
    assert zlib.decompress(Deflater().flush()) == b""


def test_the_filters_of_png(rng):
    """Undone pixel by pixel as the specification has it (9.2), on values with many ties."""
    from tsdsr.imaging.png import _filter

    lines = rng.integers(0, 4, (6, 12), dtype=np.uint8) * 80
    above, left, corner = (np.zeros_like(lines) for _ in range(3))
    above[1:], left[:, 3:], corner[1:, 3:] = lines[:-1], lines[:, :-3], lines[:-1, :-3]
    a, b, c = (values.astype(int) for values in (left, above, corner))
    distances = np.stack([np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)])
    paeth = np.choose(distances.argmin(axis=0), [a, b, c])  # of equals the first
    for kind, predicted in enumerate([np.zeros_like(a), a, b, (a + b) // 2, paeth]):
        assert np.array_equal(_filter(kind, lines, left, above, 3), (lines - predicted).astype(np.uint8)), kind


# What a writer refuses


def test_rows_that_do_not_fit(noise, tmp_path):
    picture = Picture(pixels=noise)
    with create(picture, tmp_path / "photo.png", (13, 17)) as writer:
        with pytest.raises(ValueError, match="begin"):
            writer.write(picture.rows(0, 1))
        writer.begin(picture)
        with pytest.raises(ValueError, match=r"\(n, 17, 3\)"):
            writer.write(np.zeros((2, 16, 3), np.float32))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(noise)
        writer.write(picture.rows(0, 13))
        with pytest.raises(ValueError, match="13 rows high"):
            writer.write(picture.rows(0, 1))
        with pytest.raises(ValueError, match="one more"):
            writer.begin(picture)
    assert np.array_equal(read(tmp_path / "photo.png").pixels, noise)


@pytest.mark.parametrize(("name", "size"), [("a.jpg", (65501, 8)), ("a.gif", (8, 65536)), ("a.bmp", (50_000, 50_000))])
def test_too_large_for_a_format_is_known_at_once(noise, tmp_path, name, size):
    with pytest.raises(ValueError, match=r"\.png or \.tif"):
        create(Picture(pixels=noise), tmp_path / name, size)
    assert list(tmp_path.iterdir()) == []


def test_a_long_name(noise, tmp_path):
    path = tmp_path / ("ä" * 125 + ".png")
    write(Picture(pixels=noise), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

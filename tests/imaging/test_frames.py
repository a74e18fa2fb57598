"""Files of several pictures, in and out; and files made to take all memory."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, features

from tsdsr.imaging import SUPPORTED_OUTPUT_SUFFIXES, Picture, UnreadableImageError, create, open_frames, read
from tsdsr.imaging.exif import resized

DURATIONS = [100, 200, 300, 50, 70]
ANIMATIONS = [s for s in (".gif", ".png", ".webp", ".avif") if s in SUPPORTED_OUTPUT_SUFFIXES]


@pytest.fixture(scope="session")
def moving():
    """Five frames with a square that moves over nothing: (5, 30, 40, 4)."""
    frames = np.zeros((5, 30, 40, 4), np.uint8)
    for number, frame in enumerate(frames):
        frame[4:20, 2 + 5 * number : 14 + 5 * number] = 250 - 40 * number, 40 * number, 90, 255
    return frames


@pytest.fixture
def animation(moving, tmp_path):
    """Function that writes them by Pillow, with frames that change only what differs."""

    def make(suffix, **options):
        path = tmp_path / f"animation{suffix}"
        first, *others = map(Image.fromarray, moving)
        options = {"lossless": True, **options} if suffix == ".webp" else options
        first.save(path, save_all=True, append_images=others, duration=DURATIONS, disposal=2, **options)
        return path

    return make


def enlarge(source, target, **options):
    with (
        open_frames(source) as frames,
        create(frames, target, (frames.height * 2, frames.width * 2), **options) as writer,
    ):
        for picture in frames:
            writer.begin(picture)
            rows = picture.rows(0, picture.height).repeat(2, axis=0).repeat(2, axis=1)
            for top in range(0, len(rows), 7):
                writer.write(rows[top : top + 7])
    return target


@pytest.mark.parametrize("suffix", ANIMATIONS)
def test_an_animation_comes_frame_by_frame(animation, moving, suffix):
    with open_frames(animation(suffix, loop=3)) as frames:
        assert (len(frames), frames.kind, frames.height, frames.width) == (5, "animation", 30, 40)
        assert frames.loop == {".gif": 4, ".avif": 0}.get(suffix, 3)  # GIF counts repetitions
        assert frames.durations == DURATIONS
        for picture, expected in zip(frames, moving, strict=True):
            visible = expected[..., 3] > 0
            assert np.abs(picture.pixels[..., 3].astype(int) - expected[..., 3]).max() <= (
                40 if suffix == ".avif" else 0
            )
            difference = np.abs(picture.pixels[visible].astype(int) - expected[visible])
            assert difference.mean() <= (8 if suffix == ".avif" else 0)
        assert np.array_equal(frames[1].pixels, list(frames)[1].pixels)


@pytest.mark.parametrize("before", ANIMATIONS)
@pytest.mark.parametrize("after", ANIMATIONS)
def test_an_animation_is_written_with_its_timing(animation, moving, tmp_path, before, after):
    enlarge(animation(before, loop=2), tmp_path / f"result{after}")
    with Image.open(tmp_path / f"result{after}") as image:
        assert image.n_frames == 5 and image.size == (80, 60)
        plays = {".gif": 3, ".avif": 0}.get(before, 2)
        if after != ".avif":
            assert image.info["loop"] == (max(0, plays - 1) if after == ".gif" else plays)
        for number, frame in enumerate(moving):
            image.seek(number)
            image.load()
            assert image.info["duration"] == DURATIONS[number]
            pixels, expected = np.asarray(image.convert("RGBA"))[::2, ::2].astype(int), frame.astype(int)
            assert np.abs(pixels - expected)[frame[..., 3] > 0].mean() < 12
            assert np.abs(pixels - expected)[..., 3].mean() < 4


def test_an_animation_of_16_bits_as_png(tmp_path):
    """Streamed as rows come: every frame in its own chunks."""
    pixels = np.arange(2 * 6 * 5 * 3, dtype=np.uint16).reshape(2, 6, 5, 3) * 300
    Image.new("L", (5, 6)).save(
        tmp_path / "two.png", save_all=True, append_images=[Image.new("L", (5, 6), 9)], duration=10
    )
    with open_frames(tmp_path / "two.png") as frames, create(frames, tmp_path / "a.png", (6, 5)) as writer:
        for values in pixels:
            picture = Picture(pixels=values, duration=40)
            writer.begin(picture)
            writer.write(picture.rows(0, 6))
    data = (tmp_path / "a.png").read_bytes()
    assert data.count(b"fcTL") == 2 and data.count(b"fdAT") == 1
    # Of an animation the high bytes are read.
    assert np.array_equal(read(tmp_path / "a.png").pixels, pixels[0] >> 8)


def test_a_format_of_one_picture_refuses_an_animation(animation, tmp_path):
    with open_frames(animation(".gif")) as frames:
        for suffix in (".jpg", ".tif", ".bmp"):
            with pytest.raises(ValueError, match=r"5 frames.*\.png.*\.gif"):
                create(frames, tmp_path / f"result{suffix}", (60, 80))


def test_too_few_frames(animation, tmp_path):
    with (
        pytest.raises(ValueError, match="1 of 5 pictures"),
        open_frames(animation(".gif")) as frames,
        create(frames, tmp_path / "result.gif", (30, 40)) as writer,
    ):
        writer.begin(frames[0])
        writer.write(frames[0].rows(0, 30))
    assert not (tmp_path / "result.gif").exists()


def test_a_gif_that_runs_once(animation, tmp_path):
    with open_frames(animation(".gif")) as frames:
        assert frames.loop == 1
    enlarge(animation(".gif"), tmp_path / "again.gif")
    with Image.open(tmp_path / "again.gif") as image:
        assert "loop" not in image.info


# Pages


def test_pages_in_and_out(noise, tmp_path):
    """Of different sizes and kinds, one of 16 bits, with a thumbnail between them that is none."""
    deep = (noise[:8].astype(np.uint16) * 257) ^ 85
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        writer.write(noise, photometric="rgb", metadata=None)
        writer.write(noise[::2, ::2].copy(), photometric="rgb", metadata=None, subfiletype=1)
        writer.write(deep, photometric="rgb", metadata=None, compression="zlib")
        writer.write(noise[:5, :, 0].copy(), photometric="minisblack", metadata=None)
    expected = [noise, deep, noise[:5, :, :1]]
    with open_frames(tmp_path / "pages.tif") as frames:
        assert (frames.kind, len(frames), frames.height, frames.width) == ("pages", 3, 13, 17)
        assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(frames, expected, strict=True))
        assert np.array_equal(frames[1].pixels, deep)
    enlarge(tmp_path / "pages.tif", tmp_path / "large.tif")
    with open_frames(tmp_path / "large.tif") as frames:
        for picture, pixels in zip(frames, expected, strict=True):
            assert np.array_equal(picture.pixels, pixels.repeat(2, axis=0).repeat(2, axis=1))
    with open_frames(tmp_path / "pages.tif") as frames, pytest.raises(ValueError, match=r"3 pages.*\.tif"):
        create(frames, tmp_path / "result.png", (26, 34))


def test_the_size_of_a_page_can_be_said(noise, tmp_path):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for height in (13, 7):
            writer.write(noise[:height], photometric="rgb", metadata=None)
    with open_frames(tmp_path / "pages.tif") as frames, create(frames, tmp_path / "x.tif", (20, 26)) as writer:
        for picture, size in zip(frames, [(20, 26), (11, 26)], strict=True):
            writer.begin(picture, size)
            writer.write(np.full((*size, 3), 0.5, np.float32))
    with open_frames(tmp_path / "x.tif") as frames:
        assert [(picture.height, picture.width) for picture in frames] == [(20, 26), (11, 26)]


def test_previews_within_a_jpeg_are_no_pages(noise, tmp_path):
    Image.fromarray(noise).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.fromarray(noise[::2])])
    with open_frames(tmp_path / "a.jpg") as frames:
        assert (len(frames), frames.kind) == (1, "still")


# Metadata that is damaged, or too much


def chunk(name, data, crc=None):
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)
    )


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(1 << 27)))],
        [(b"iTXt", b"bomb\0\1\0\0\0" + zlib.compress(bytes(1 << 27)))],
        [(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(1 << 27)))],
        [(b"iCCP", b"x\0\0broken")],
        [(b"gAMA", b"")],
        [(b"tEXt", b"Title\0damaged", 0)],
        [(b"eXIf", b"II*\0\xff\xff\xff\xff")],
        [(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(1 << 21)))] * 100,
    ],
    ids=["zTXt", "iTXt", "iCCP", "broken iCCP", "short gAMA", "wrong CRC", "broken eXIf", "many zTXt"],
)
def test_metadata_of_a_png_costs_only_itself(raw_png, chunks):
    data = raw_png(8, 2, 2, [bytes([10, 20, 30, 40, 50, 60])])
    picture = read(io.BytesIO(data[:33] + b"".join(chunk(*parts) for parts in chunks) + data[33:]))
    assert picture.pixels.tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_a_profile_larger_than_pillow_reads(raw_png, wide_profile):
    profile = wide_profile + bytes(2 << 20)
    data = raw_png(8, 2, 1, [bytes([10, 20, 30])], (b"iCCP", b"wide\0\0" + zlib.compress(profile)))
    assert read(io.BytesIO(data)).icc_profile == profile


def test_exif_after_the_pixels_turns_them(raw_png, exif_block):
    data = raw_png(8, 2, 2, [bytes([10, 20, 30, 40, 50, 60])])
    end = len(data) - 12
    data = data[:end] + chunk(b"eXIf", exif_block(6)[6:]) + data[end:]
    with open_frames(io.BytesIO(data)) as frames:
        assert (frames.height, frames.width) == (2, 1)
        assert frames[0].pixels.tolist() == [[[10, 20, 30]], [[40, 50, 60]]]


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0XX*\0" + bytes(20)])
def test_damaged_exif_is_dropped(block):
    assert resized(block, (10, 10), None) is None


def test_an_interlaced_png_of_16_bits(rng):
    """Adam7, by hand: of 3 x 3 pixels, passes 1, 4 (none of 2 and 3), 5, 6 and 7."""
    values = rng.integers(0, 65536, (3, 3, 3)).astype(">u2")
    passes = [values[0:1, 0:1], values[0:1, 2:3], values[2:3, 0::2], values[0::2, 1:2], values[1:2]]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    header = struct.pack(">IIBBBBB", 3, 3, 16, 2, 0, 0, 1)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(read(io.BytesIO(data)).pixels, values)


# Decompression bombs


def bombs():
    """Files that are small and say that they are not, by name."""
    side = struct.pack(">II", 60_000, 60_000)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side + b"\x08\2\0\0\0") + chunk(b"IDAT", zlib.compress(bytes(1000)))
    gif = b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, np.zeros((4, 4, 3), np.float32), photometric="rgb", metadata=None)
    tiff = tiff.getvalue()
    for tag in (256, 257):
        for kind, form in ((3, "<HHIH"), (4, "<HHII")):
            tiff = tiff.replace(
                struct.pack(form, tag, kind, 1, 4), struct.pack("<HHII", tag, 4, 1, 60_000)[: struct.calcsize(form)]
            )
    return {"png": png, "gif": gif, "tif": tiff}


@pytest.mark.parametrize("name", ["png", "gif", "tif"])
def test_a_header_that_lies_is_refused_by_its_size(name):
    with pytest.raises(UnreadableImageError, match=r"too large to read safely|cut short"):
        open_frames(io.BytesIO(bombs()[name]))


def test_the_frames_of_an_animation_count_together(monkeypatch, animation):
    path = animation(".gif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 40)
    monkeypatch.setattr("tsdsr.imaging.limits._FRAMES_OF_THE_LARGEST_PICTURE", 2)
    with pytest.raises(UnreadableImageError, match=r"5 frames of 40 x 30.*allow_large=True"):
        open_frames(path)
    with open_frames(path, allow_large=True) as frames:
        assert len(list(frames)) == 5
    assert Image.MAX_IMAGE_PIXELS == 30 * 40


@pytest.mark.parametrize("suffix", [".tif", ".exr", ".heic"])
def test_formats_that_pillow_does_not_decode_have_the_same_limit(monkeypatch, tmp_path, suffix):
    if suffix not in SUPPORTED_OUTPUT_SUFFIXES:
        pytest.skip("its package is not installed")
    picture = Picture(pixels=np.zeros((32, 32, 3), np.float32))
    with create(picture, tmp_path / f"photo{suffix}", (32, 32)) as writer:
        writer.begin(picture)
        writer.write(picture.rows(0, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UnreadableImageError, match=r"too large to read safely.*allow_large=True"):
        open_frames(tmp_path / f"photo{suffix}")
    assert read(tmp_path / f"photo{suffix}", allow_large=True).height == 32


@pytest.mark.parametrize(("suffix", "package"), [(".heic", "pillow_heif"), (".exr", "OpenEXR")])
def test_a_format_whose_package_is_missing(monkeypatch, noise, tmp_path, suffix, package):
    if suffix not in SUPPORTED_OUTPUT_SUFFIXES:
        pytest.skip("its package is not installed")
    picture = Picture(pixels=noise)
    with create(picture, tmp_path / f"photo{suffix}", (13, 17)) as writer:
        writer.begin(picture)
        writer.write(picture.rows(0, 13))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnreadableImageError, match="pip install") as error:
        open_frames(tmp_path / f"photo{suffix}")
    assert "damaged" not in str(error.value)
    monkeypatch.setattr("tsdsr.imaging.writing.SUPPORTED_OUTPUT_SUFFIXES", (".png",))
    with pytest.raises(ValueError, match="pip install"):
        create(picture, tmp_path / f"other{suffix}", (13, 17))


@pytest.mark.skipif(not features.check("jpg"), reason="this Pillow has no JPEG")
def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImageError, match="not an image"):
        open_frames(tmp_path / "a.eps")

"""Files to pictures: every mode, orientation, metadata, and what is said about files that are none."""

import importlib.util
import io
import os
import re
import shutil
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, features

from tsdsr.imaging import Picture, UnreadableImageError, find_images, read

needs_webp = pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")


def unit(values):
    return np.asarray(values).astype(np.float64) / 255


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


def stored(image, suffix="png", **options):
    """The image as a file in memory, read back by this package."""
    buffer = io.BytesIO()
    image.save(buffer, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP", "gif": "GIF"}[suffix], **options)
    buffer.seek(0)
    return read(buffer)


def assert_pixels(picture, rgb, alpha=None, tolerance=1e-6):
    assert picture.rgb.dtype == np.float32
    assert picture.rgb.shape == rgb.shape
    np.testing.assert_allclose(picture.rgb, rgb, rtol=0, atol=tolerance)
    if alpha is None:
        assert picture.alpha is None
    else:
        assert picture.alpha.dtype == np.float32
        np.testing.assert_allclose(picture.alpha, alpha, rtol=0, atol=tolerance)


# 8 bits


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_bilevel(noise, suffix):
    bits = noise[..., 0] > 127
    picture = stored(Image.fromarray(bits), suffix)
    assert picture.grey and picture.bit_depth == 8
    assert_pixels(picture, grey(bits.astype(float)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey(noise, suffix):
    picture = stored(Image.fromarray(noise[..., 0]), suffix)
    assert picture.grey and picture.bit_depth == 8
    assert_pixels(picture, grey(unit(noise[..., 0])))


def test_grey_with_alpha(noise):
    picture = stored(Image.fromarray(noise[..., :2]))
    assert picture.grey
    assert_pixels(picture, grey(unit(noise[..., 0])), unit(noise[..., 1]))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colour(noise, suffix):
    picture = stored(Image.fromarray(noise), suffix)
    assert not picture.grey and picture.bit_depth == 8
    assert_pixels(picture, unit(noise))


def test_grey_pixels_in_a_colour_file_stay_colour():
    picture = stored(Image.new("RGB", (4, 3), (70, 70, 70)))
    assert not picture.grey


@pytest.mark.parametrize("suffix", ["png", "tif", pytest.param("webp", marks=needs_webp)])
def test_colour_with_alpha_keeps_the_colour_under_full_transparency(rng, suffix):
    values = rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    values[:4, :, 3] = 0
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    picture = stored(Image.fromarray(values), suffix, **options)
    assert_pixels(picture, unit(values[..., :3]), unit(values[..., 3]))


def palette_image(rng):
    image = Image.fromarray(rng.integers(0, 5, (9, 7), dtype=np.uint8), "L").convert("P")
    colours = rng.integers(0, 256, (5, 3), dtype=np.uint8)
    image.putpalette(colours.tobytes())
    indices = rng.integers(0, 5, (9, 7), dtype=np.uint8)
    image.putdata(indices.ravel().tolist())
    return image, colours, indices


def test_palette(rng):
    image, colours, indices = palette_image(rng)
    picture = stored(image)
    assert not picture.grey
    assert_pixels(picture, unit(colours[indices]))


def test_palette_with_an_alpha_for_every_entry(rng):
    image, colours, indices = palette_image(rng)
    opacity = np.array([0, 64, 128, 255, 255], dtype=np.uint8)
    picture = stored(image, transparency=opacity.tobytes())
    assert_pixels(picture, unit(colours[indices]), unit(opacity[indices]))


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_one_transparent_entry(rng, suffix):
    image, colours, indices = palette_image(rng)
    picture = stored(image, suffix, transparency=2)
    assert_pixels(picture, unit(colours[indices]), (indices != 2).astype(float))


def test_grey_with_a_transparent_value(noise):
    values = noise[..., 0]
    picture = stored(Image.fromarray(values), transparency=int(values[3, 4]))
    assert picture.grey
    assert_pixels(picture, grey(unit(values)), (values != values[3, 4]).astype(float))


def test_colour_with_a_transparent_colour(noise):
    picture = stored(Image.fromarray(noise), transparency=tuple(int(v) for v in noise[3, 4]))
    assert picture.alpha[3, 4] == 0
    assert picture.alpha.sum() == noise.shape[0] * noise.shape[1] - 1
    assert_pixels(picture, unit(noise), picture.alpha)


@pytest.mark.parametrize(
    ("depth", "row", "values"),
    [(1, 0b01100000, [0, 1, 1, 0]), (2, 0b00011011, [0, 1, 2, 3]), (4, 0x0F57, [0, 15, 5, 7])],
)
@pytest.mark.parametrize("transparent", [0, 1, 2])
def test_packed_grey_with_a_transparent_value(raw_png, depth, row, values, transparent):
    """PNG gives the transparent value in the file's own range, 0..2^depth - 1."""
    value = values[transparent]
    data = raw_png(depth, 0, 4, [row.to_bytes((4 * depth + 7) // 8, "big")], (b"tRNS", struct.pack(">H", value)))
    picture = read(io.BytesIO(data))
    expected = np.array([values], dtype=float)
    assert_pixels(picture, grey(expected / (2**depth - 1)), (expected != value).astype(float))


def test_cmyk_jpeg_without_profile():
    """Solid inks: cyan, magenta, half black."""
    inks = np.zeros((16, 48, 4), dtype=np.uint8)
    inks[:, :16, 0] = inks[:, 16:32, 1] = 255
    inks[:, 32:, 3] = 128
    picture = stored(Image.fromarray(inks, "CMYK"), "jpg", quality=100, subsampling=0)
    assert not picture.grey and picture.alpha is None
    for column, colour in ((8, (0, 1, 1)), (24, (1, 0, 1)), (40, (0.5, 0.5, 0.5))):
        np.testing.assert_allclose(picture.rgb[8, column], colour, atol=0.02)


def test_cmyk_jpeg_with_a_profile_that_does_not_fit(srgb_profile):
    picture = stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", quality=100, icc_profile=srgb_profile)
    np.testing.assert_allclose(picture.rgb[8, 8], (1, 0, 0), atol=0.02)
    assert picture.icc_profile is None


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_ycbcr(suffix):
    """Y 100, Cb 90, Cr 200 by JFIF's formulas."""
    # Pillow 12.3 cannot read back the YCbCr TIFF that it writes uncompressed.
    options = {"quality": 100} if suffix == "jpg" else {"compression": "tiff_lzw"}
    picture = stored(Image.new("YCbCr", (16, 16), (100, 90, 200)), suffix, **options)
    y, cb, cr = 100, 90 - 128, 200 - 128
    expected = np.array([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]) / 255
    np.testing.assert_allclose(picture.rgb[8, 8], expected, atol=2.5 / 255)


def test_lab():
    colour = (180, 90, 60)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    picture = stored(ImageCms.applyTransform(Image.new("RGB", (4, 4), colour), to_lab), "tif")
    np.testing.assert_allclose(picture.rgb[2, 2], unit(colour), atol=3 / 255)


def test_first_frame_of_an_animation_and_first_page(noise):
    frames = [Image.fromarray(noise[..., channel]) for channel in range(3)]
    for suffix in ("gif", "tif"):
        picture = stored(frames[0], suffix, save_all=True, append_images=frames[1:])
        assert_pixels(picture, grey(unit(noise[..., 0])))


# More than 8 bits


@pytest.mark.parametrize(("suffix", "kind"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_16_bit_grey_is_exact(rng, suffix, kind):
    values = rng.integers(0, 65536, (9, 11)).astype(kind)
    values[0, :3] = 0, 1, 65535
    picture = stored(Image.fromarray(values), suffix)
    assert picture.grey and picture.bit_depth == 16 and picture.alpha is None
    assert np.array_equal(np.rint(picture.rgb.astype(np.float64) * 65535), grey(values))
    assert_pixels(picture, grey(values / 65535))


def test_16_bit_grey_with_a_transparent_value(raw_png):
    data = raw_png(16, 0, 3, [struct.pack(">HHH", 1000, 1001, 65535)], (b"tRNS", struct.pack(">H", 1001)))
    picture = read(io.BytesIO(data))
    assert picture.bit_depth == 16
    assert_pixels(picture, grey(np.array([[1000, 1001, 65535]]) / 65535), np.array([[1.0, 0.0, 1.0]]))


def test_16_bit_grey_where_white_is_zero():
    """A TIFF may count darkness; Pillow leaves that to the reader at 16 bits."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 1, 65535]], dtype=np.uint16)).save(buffer, "TIFF")
    black_is_zero, white_is_zero = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
    assert buffer.getvalue().count(black_is_zero) == 1
    picture = read(io.BytesIO(buffer.getvalue().replace(black_is_zero, white_is_zero)))
    assert_pixels(picture, grey(np.array([[65535, 65534, 0]]) / 65535))


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bits_per_channel_are_exact(raw_png, rng, colour_type, channels):
    values = rng.integers(0, 65536, (5, 6, channels)).astype(">u2")
    picture = read(io.BytesIO(raw_png(16, colour_type, 6, [row.tobytes() for row in values])))
    assert picture.bit_depth == 16 and picture.pixels.dtype == np.uint16
    assert picture.grey == (channels == 2)
    assert np.array_equal(picture.pixels, values)


def test_16_bit_colour_with_a_transparent_colour(raw_png):
    """Two colours that differ in their low bytes alone."""
    values = np.array([[[1000, 2000, 3000], [1001, 2000, 3000]]], dtype=">u2")
    key = (b"tRNS", struct.pack(">HHH", 1001, 2000, 3000))
    picture = read(io.BytesIO(raw_png(16, 2, 2, [row.tobytes() for row in values], key)))
    assert np.array_equal(picture.pixels[..., :3], values)
    assert picture.pixels[..., 3].tolist() == [[65535, 0]]


def imagemagick() -> str | None:
    """The program `convert`, if it is ImageMagick's."""
    program = shutil.which("convert")
    said = program and subprocess.run([program, "-version"], capture_output=True, text=True).stdout
    return program if said and "Version: ImageMagick" in said else None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "lzma"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("planar", [False, True])
def test_16_bit_tiff_is_exact(rng, tmp_path, order, compression, channels, planar):
    """Written by tifffile, or by ImageMagick where that has no encoder."""
    values = rng.integers(0, 65536, (9, 11, channels)).astype(f"{order}u2")
    path = tmp_path / "photo.tif"
    if compression == "lzw" and (planar or channels == 2 or not imagemagick()):
        pytest.skip("not read with LZW, or no ImageMagick to write it")
    alpha = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
    data = np.moveaxis(values, 2, 0) if planar else values
    tifffile.imwrite(
        path,
        data if channels > 1 else values[..., 0],
        byteorder=order,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig=None if channels == 1 else "separate" if planar else "contig",
        compression=None if compression == "lzw" else compression,
        predictor=compression in ("zlib", "lzma"),
        metadata=None,
        **alpha,
    )
    if compression == "lzw":
        subprocess.run(["convert", path, "-compress", "LZW", path], check=True)
    picture = read(path)
    assert picture.bit_depth == 16
    assert np.array_equal(picture.pixels, values)


@pytest.mark.parametrize("largest", [60_000, 3_000_000])
def test_32_bit_integers(largest):
    values = np.array([[0, largest // 3, largest]], dtype=np.int32)
    picture = stored(Image.fromarray(values), "tif")
    assert picture.grey and picture.bit_depth == 16
    assert_pixels(picture, grey(values / max(largest, 65535)))


@pytest.mark.parametrize(("largest", "scale"), [(0.5, 1), (200, 255), (40_000, 65535), (100_000, 100_000)])
def test_floating_point(largest, scale):
    values = np.array([[0, largest / 4, largest, -0.25, np.nan]], dtype=np.float32)
    picture = stored(Image.fromarray(values), "tif")
    assert picture.grey and picture.bit_depth == 32
    assert_pixels(picture, grey(np.array([[0, largest / 4, largest, 0, 0]]) / scale))


# Orientation

STORED_FROM_UPRIGHT = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_its_tag_reset(ramp, exif_block, orientation, suffix):
    pixels = np.ascontiguousarray(STORED_FROM_UPRIGHT[orientation](ramp))
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    picture = stored(Image.fromarray(pixels), suffix, exif=exif_block(orientation), **options)
    assert_pixels(picture, unit(ramp), tolerance=0.03 if suffix == "jpg" else 1e-6)
    assert picture.exif.startswith(b"Exif\0\0")
    exif = Image.Exif()
    exif.load(picture.exif)
    assert exif.get(0x0112, 1) == 1
    assert exif[0x010F] == "Maker"


def test_orientation_turns_alpha_too(rng, exif_block):
    upright = rng.integers(0, 256, (5, 8, 4), dtype=np.uint8)
    picture = stored(Image.fromarray(np.rot90(upright).copy()), exif=exif_block(6))
    assert_pixels(picture, unit(upright[..., :3]), unit(upright[..., 3]))


def test_orientation_turns_the_resolution_too(ramp, exif_block):
    """300 pixels per inch along a stored row are 300 along a column of the upright picture."""
    for suffix in ("png", "jpg", "tif"):
        turned = stored(Image.fromarray(ramp), suffix, exif=exif_block(6), dpi=(300, 150))
        assert turned.dpi == pytest.approx((150, 300), rel=1e-3), suffix
        mirrored = stored(Image.fromarray(ramp), suffix, exif=exif_block(3), dpi=(300, 150))
        assert mirrored.dpi == pytest.approx((300, 150), rel=1e-3), suffix


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def test_orientation_of_an_xmp_packet(raw_png, ramp):
    pixels = np.rot90(ramp)
    chunk = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode())
    picture = read(io.BytesIO(raw_png(8, 2, pixels.shape[1], [row.tobytes() for row in pixels], chunk)))
    assert_pixels(picture, unit(ramp))
    assert 'Orientation="6"' not in picture.text["XML:com.adobe.xmp"]


def test_damaged_exif_costs_neither_the_picture_nor_a_warning(ramp):
    """The EXIF block says there are entries, and ends."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0\x0f\x01\x02\0\xff\0"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = stored(Image.fromarray(ramp), "jpg", exif=exif, quality=95)
    assert_pixels(picture, unit(ramp), tolerance=0.1)
    assert [str(warning.message) for warning in caught] == []


# Metadata


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_profile_is_kept_byte_for_byte(noise, srgb_profile, suffix):
    assert stored(Image.fromarray(noise), suffix, icc_profile=srgb_profile).icc_profile == srgb_profile


def test_grey_keeps_only_a_grey_profile(noise, srgb_profile, gray_profile):
    image = Image.fromarray(noise[..., 0])
    assert stored(image, icc_profile=gray_profile).icc_profile == gray_profile
    assert stored(image, icc_profile=srgb_profile).icc_profile is None
    assert stored(Image.fromarray(noise), icc_profile=gray_profile).icc_profile is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_resolution(noise, suffix):
    assert stored(Image.fromarray(noise), suffix, dpi=(300, 150)).dpi == pytest.approx((300, 150), rel=1e-3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif"])
def test_without_metadata(noise, suffix):
    picture = stored(Image.fromarray(noise), suffix)
    assert picture.dpi is None and picture.exif is None and picture.icc_profile is None and picture.text == {}


def test_text_chunks_before_and_after_the_pixels(raw_png):
    data = raw_png(8, 0, 1, [b"\x80"], (b"tEXt", b"Author\0M\xfcller"), (b"iTXt", b"Title\0\0\0\0\0\xe5\xb1\xb1"))
    end = data.rindex(b"IEND") - 4
    late = b"tEXtComment\0late"
    data = data[:end] + struct.pack(">I", 12) + late + struct.pack(">I", zlib.crc32(late)) + data[end:]
    assert read(io.BytesIO(data)).text == {"Author": "Müller", "Title": "山", "Comment": "late"}


# Streams and paths


def test_a_stream_is_left_open_and_a_path_may_be_text(noise, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(noise).save(path)
    with open(path, "rb") as stream:
        from_stream = read(stream)
        assert not stream.closed
    assert_pixels(from_stream, unit(noise))
    assert_pixels(read(str(path)), unit(noise))
    path.unlink()  # fails on Windows if the file was left open


def test_the_contents_count_and_not_the_suffix(noise, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise).save(path, "PNG")
    assert_pixels(read(path), unit(noise))


def test_streams_that_cannot_be_read():
    with pytest.raises(UnreadableImageError, match="binary"):
        read(io.StringIO("not bytes"))
    with pytest.raises(UnreadableImageError, match="the image stream is empty"):
        read(io.BytesIO())


# Files that are no pictures


def assert_one_sentence(error, path):
    message = str(error.value)
    assert str(path) in message
    assert message.endswith(".") and "\n" not in message
    assert not re.search(r"[.!?]\s", message)
    assert "Error" not in message and "Traceback" not in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", pytest.param("webp", marks=needs_webp)])
def test_truncated(rng, tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError) as error:
        read(path)
    assert_one_sentence(error, path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"Dear diary, today I renamed a text file.\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"<html><body>404</body></html>", "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_not_a_picture(tmp_path, content, part):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=re.escape(part)) as error:
        read(path)
    assert_one_sentence(error, path)


def test_missing_and_folder(tmp_path):
    for path, part in ((tmp_path / "none.png", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UnreadableImageError, match=part) as error:
            read(path)
        assert_one_sentence(error, path)


def test_a_path_that_no_file_can_have():
    with pytest.raises(UnreadableImageError, match="cannot be opened"):
        read("photo\0.png")


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "TIFF", "GIF", "BMP"])
def test_damage_gives_a_picture_or_one_kind_of_error(monkeypatch, rng, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged header may ask for a gigabyte
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(buffer, suffix)
    whole = buffer.getvalue()
    refused = 0
    for _ in range(150):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for position in rng.integers(0, len(data), rng.integers(1, 6)):
            data[position] = rng.integers(0, 256)
        try:
            assert isinstance(read(io.BytesIO(data)), Picture)
        except UnreadableImageError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


# Decompression bombs


def test_too_large_is_refused_and_allow_large_lifts_the_limit(monkeypatch, noise, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = tmp_path / "photo.png"
    Image.fromarray(noise).save(path)
    with pytest.raises(UnreadableImageError, match=r"too large.*allow_large=True") as error:
        read(path)
    assert_one_sentence(error, path)
    assert_pixels(read(path, allow_large=True), unit(noise))
    assert Image.MAX_IMAGE_PIXELS == 50


def test_the_limit_is_back_after_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    (tmp_path / "photo.png").write_bytes(b"none")
    with pytest.raises(UnreadableImageError):
        read(tmp_path / "photo.png", allow_large=True)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_large_but_allowed_does_not_warn(monkeypatch, noise):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", noise.shape[0] * noise.shape[1] - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_pixels(stored(Image.fromarray(noise)), unit(noise))


# Folders


def test_find_images_in_natural_order(tmp_path):
    names = ["10.png", "2.png", "1.JPG", "b2.tiff", "B10.webp", "b1.gif"]
    for name in [*names, ".hidden.png", "notes.txt", "film.mpg", "no_suffix"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inside.png").write_bytes(b"")
    assert [path.name for path in find_images(tmp_path)] == [
        "1.JPG",
        "2.png",
        "10.png",
        "b1.gif",
        "b2.tiff",
        "B10.webp",
    ]
    assert all(path.parent == tmp_path for path in find_images(str(tmp_path)))


def test_find_images_of_an_empty_folder_and_of_none(tmp_path):
    assert find_images(tmp_path) == []
    with pytest.raises(UnreadableImageError) as error:
        find_images(tmp_path / "none")
    assert_one_sentence(error, tmp_path / "none")


def test_find_images_below_a_folder(tmp_path):
    """In natural order folder by folder, hidden folders left out, links that lead in a circle entered once."""
    for name in ("2/b.png", "2/a.png", "10/c.jpg", ".hidden/d.png", "2/.thumbs/e.png", "z.png", "2/deep/er/f.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    if hasattr(os, "symlink") and os.name != "nt":
        (tmp_path / "2" / "circle").symlink_to(tmp_path)
        (tmp_path / "10" / "again").symlink_to(tmp_path / "2")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path, recursive=True)]
    below = {"a.png", "b.png", "deep/er/f.tif"}
    assert len(found) == 5 and {name for name in found if name[0] == "z" or name.endswith("c.jpg")} == {
        "z.png",
        "10/c.jpg",
    }
    assert {re.sub(r"^(2|10/again)/", "", name) for name in found} >= below
    assert [path.name for path in find_images(tmp_path)] == ["z.png"]


def test_formats_of_other_packages_count_where_they_are_installed(tmp_path):
    for name in ("a.heic", "b.HEIF", "c.exr", "d.apng", "e.eps"):
        (tmp_path / name).write_bytes(b"")
    expected = [
        name
        for name, package in (
            ("a.heic", "pillow_heif"),
            ("b.HEIF", "pillow_heif"),
            ("c.exr", "OpenEXR"),
            ("d.apng", None),
        )
        if package is None or importlib.util.find_spec(package)
    ]
    assert [path.name for path in find_images(tmp_path)] == expected

"""Pictures to files: exact where the format can be, whole or not at all."""

import os
import re
import stat

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from tsdsr.imaging import SUPPORTED_OUTPUT_SUFFIXES, Picture, create, read, write

FORMATS = {
    ".apng": "PNG",
    ".gif": "GIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".exr": "EXR",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".avif": "AVIF",
}
LOSSY = (".jpg", ".jpeg", ".webp", ".avif", ".gif", ".heic", ".heif")
BY_PILLOW = [suffix for suffix in SUPPORTED_OUTPUT_SUFFIXES if suffix not in (".heic", ".heif", ".exr")]


def unit(values):
    return np.asarray(values).astype(np.float32) / np.float32(np.iinfo(values.dtype).max)


def colour(values, **fields):
    return Picture(unit(values), **fields)


def grey(values, **fields):
    return Picture(np.repeat(unit(values)[..., None], 3, axis=2), grey=True, **fields)


def solid(value, **fields):
    return Picture(np.full((16, 16, 3), value, dtype=np.float32), **fields)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# Exactness


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp"])
def test_round_trip_is_exact(noise, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    assert write(colour(noise), path) == path
    with Image.open(path) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), noise)
    assert np.array_equal(read(path).rgb, unit(noise))
    write(grey(noise[..., 0]), path)
    with Image.open(path) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), noise[..., 0])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_round_trip_with_alpha_is_exact(noise, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    alpha = noise[::-1, :, 0].copy()
    alpha[:3] = 0  # colour under full transparency survives too
    write(colour(noise, alpha=unit(alpha)), path)
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        assert np.array_equal(np.asarray(image), np.dstack([noise, alpha]))
    write(grey(noise[..., 0], alpha=unit(alpha)), path)
    with Image.open(path) as image:
        assert image.mode == "LA"
        assert np.array_equal(np.asarray(image), np.dstack([noise[..., 0], alpha]))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_round_trip_of_16_bit_grey_is_exact(rng, tmp_path, suffix):
    values = rng.integers(0, 65536, (9, 11)).astype(np.uint16)
    values[0, :3] = 0, 1, 65535
    path = tmp_path / f"photo{suffix}"
    write(grey(values, bit_depth=16), path)
    with Image.open(path) as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(image), values)
    again = read(path)
    write(again, tmp_path / f"again{suffix}")
    with Image.open(tmp_path / f"again{suffix}") as image:
        assert np.array_equal(np.asarray(image), values)


def test_16_bit_grey_in_a_format_of_8(tmp_path):
    path = tmp_path / "photo.bmp"
    write(grey(np.array([[0, 257 * 100 + 100, 65535]], dtype=np.uint16), bit_depth=16), path)
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == [[0, 100, 255]]


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_values_are_rounded_and_clipped(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    steps = np.arange(256, dtype=np.float32)
    rows = np.stack([steps - 0.45, steps, steps + 0.45]) / 255
    write(Picture(np.repeat(rows[..., None], 3, axis=2)), path)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image)[..., 0], np.tile(np.arange(256), (3, 1)))
    write(Picture(np.array([[[-3.0, 0.5, 7.0]]])), path)
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("suffix", SUPPORTED_OUTPUT_SUFFIXES)
def test_every_suffix_is_written_in_its_format(ramp, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    write(colour(ramp), path)
    if suffix in BY_PILLOW:
        with Image.open(path) as image:
            assert image.format == FORMATS[suffix]
    again = read(path)
    assert np.abs(again.rows(0, again.height) - unit(ramp)).max() <= (0.1 if suffix in LOSSY else 1e-3)
    assert files(tmp_path) == [path.name]


def test_a_suffix_in_capitals(noise, tmp_path):
    write(colour(noise), tmp_path / "PHOTO.PNG")
    with Image.open(tmp_path / "PHOTO.PNG") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_one_pixel(tmp_path, suffix):
    write(Picture(np.full((1, 1, 3), 0.5)), tmp_path / f"dot{suffix}")
    assert read(tmp_path / f"dot{suffix}").rgb.shape == (1, 1, 3)


# Alpha


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_alpha_goes_onto_white(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    for opacity, expected in ((0.0, (1, 1, 1)), (0.5, (1, 0.5, 0.5)), (1.0, (1, 0, 0))):
        picture = Picture(np.tile(np.float32([1, 0, 0]), (16, 16, 1)), alpha=np.full((16, 16), opacity, np.float32))
        write(picture, path, quality=100)
        result = read(path)
        assert result.alpha is None
        np.testing.assert_allclose(result.rgb[8, 8], expected, atol=0.015)
    write(solid(0.0, grey=True, alpha=np.zeros((16, 16), np.float32)), path)
    with Image.open(path) as image:
        assert image.mode == "L" and image.getextrema() == (255, 255)


@pytest.mark.parametrize("suffix", [s for s in SUPPORTED_OUTPUT_SUFFIXES if s in (".webp", ".avif")])
def test_lossy_formats_keep_alpha(tmp_path, suffix):
    alpha = np.zeros((32, 32), dtype=np.float32)
    alpha[:, 16:] = 1
    write(Picture(np.full((32, 32, 3), 0.5), alpha=alpha), tmp_path / f"photo{suffix}")
    np.testing.assert_allclose(read(tmp_path / f"photo{suffix}").alpha, alpha, atol=0.05)
    write(Picture(np.full((32, 32, 3), 0.5), alpha=alpha, grey=True), tmp_path / f"grey{suffix}")
    again = read(tmp_path / f"grey{suffix}")
    np.testing.assert_allclose(again.alpha, alpha, atol=0.05)
    np.testing.assert_allclose(again.rgb[:, 20:], 0.5, atol=0.03)


@pytest.mark.skipif(".webp" not in SUPPORTED_OUTPUT_SUFFIXES, reason="this Pillow has no WebP")
def test_webp_keeps_the_colour_under_full_transparency(ramp, tmp_path):
    write(colour(ramp, alpha=np.zeros(ramp.shape[:2], np.float32)), tmp_path / "photo.webp")
    assert np.abs(read(tmp_path / "photo.webp").rgb - unit(ramp)).mean() < 0.03


# Metadata


@pytest.mark.parametrize("suffix", [s for s in SUPPORTED_OUTPUT_SUFFIXES if s not in (".bmp", ".gif", ".exr")])
def test_profile_and_exif_survive(noise, srgb_profile, exif_block, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    write(colour(noise, icc_profile=srgb_profile, exif=exif_block(1)), path)
    again = read(path)
    assert again.icc_profile == srgb_profile
    exif = Image.Exif()
    exif.load(again.exif)
    assert exif[0x010F] == "Maker"


@pytest.mark.parametrize("suffix", BY_PILLOW)
def test_grey_profile_only_with_grey_pixels(noise, gray_profile, tmp_path, suffix):
    write(grey(noise[..., 0], icc_profile=gray_profile), tmp_path / f"photo{suffix}")
    kept = suffix not in (".webp", ".avif", ".bmp", ".gif")
    assert read(tmp_path / f"photo{suffix}").icc_profile == (gray_profile if kept else None)
    with Image.open(tmp_path / f"photo{suffix}") as image:
        assert ("icc_profile" in image.info) == kept


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_resolution_survives(noise, tmp_path, suffix):
    write(colour(noise, dpi=(300.0, 150.0)), tmp_path / f"photo{suffix}")
    assert read(tmp_path / f"photo{suffix}").dpi == pytest.approx((300, 150), rel=1e-2)


@pytest.mark.parametrize("suffix", SUPPORTED_OUTPUT_SUFFIXES)
@pytest.mark.parametrize("dpi", [1e-6, 80_000.0, 1e12])
def test_a_resolution_that_a_format_cannot_hold_costs_only_itself(noise, tmp_path, suffix, dpi):
    """80,000 is what 20,000 pixels per inch come to when a picture is enlarged four times."""
    write(colour(noise, dpi=(dpi, dpi)), tmp_path / f"photo{suffix}")
    again = read(tmp_path / f"photo{suffix}")
    assert again.rgb.shape == noise.shape
    if dpi == 80_000 and suffix in (".png", ".tif", ".bmp"):
        assert again.dpi == pytest.approx((dpi, dpi), rel=1e-2)


def test_text_survives_in_png_and_hurts_nowhere(noise, tmp_path):
    text = {"Author": "Müller", "Title": "山", "parameters": "steps: 1\nseed: 7"}
    for suffix in SUPPORTED_OUTPUT_SUFFIXES:
        write(colour(noise, text=text), tmp_path / f"photo{suffix}")
        assert read(tmp_path / f"photo{suffix}").text == (text if suffix in (".png", ".apng") else {})


def test_orientation_is_not_applied_twice(ramp, exif_block, tmp_path):
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif_block(6))
    once = read(tmp_path / "turned.png")
    for suffix in (".png", ".tif", ".jpg"):
        write(once, tmp_path / f"upright{suffix}")
        twice = read(tmp_path / f"upright{suffix}")
        assert (twice.height, twice.width) == (40, 24)
        assert np.abs(twice.rgb - once.rgb).max() < 0.08


def test_exif_too_large_for_jpeg_is_left_out(noise, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    picture = colour(noise, exif=exif.tobytes())
    write(picture, tmp_path / "photo.jpg")
    assert read(tmp_path / "photo.jpg").exif is None
    write(picture, tmp_path / "photo.png")
    assert read(tmp_path / "photo.png").exif == picture.exif


# Quality


def test_quality_decides_size_and_chroma(noise, tmp_path):
    sizes = {}
    for quality, sampling in ((100, 0), (90, 0), (89, 2), (30, 2)):
        path = write(colour(noise), tmp_path / f"{quality}.jpg", quality=quality)
        sizes[quality] = path.stat().st_size
        with Image.open(path) as image:
            assert JpegImagePlugin.get_sampling(image) == sampling
    assert sizes[100] > sizes[90] > sizes[89] > sizes[30]


@pytest.mark.parametrize("quality", [0, 101])
def test_refuses_a_quality(noise, tmp_path, quality):
    with pytest.raises(ValueError, match=r"1\.\.100"):
        write(colour(noise), tmp_path / "photo.jpg", quality=quality)


# Refusals


@pytest.mark.parametrize("name", ["photo.xcf", "photo.xyz", "photo", ".png"])
def test_unsupported_suffix(noise, tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(name) + r".*\.png, \.jpg") as error:
        write(colour(noise), tmp_path / name)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("suffix", "side"), [(".jpg", 65501), *([(".webp", 16384)] if ".webp" in SUPPORTED_OUTPUT_SUFFIXES else [])]
)
def test_a_side_longer_than_the_format_allows(tmp_path, suffix, side):
    picture = Picture(np.zeros((1, side, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=rf"{side} x 1 pixels.*\.png"):
        write(picture, tmp_path / f"photo{suffix}")
    assert files(tmp_path) == []
    write(Picture(picture.rgb[:, 1:]), tmp_path / f"photo{suffix}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers(tmp_path, value):
    rgb = np.zeros((4, 4, 3), dtype=np.float32)
    rgb[1, 2, 0] = value
    with pytest.raises(ValueError, match="NaN"):
        write(Picture(rgb), tmp_path / "photo.png")
    with pytest.raises(ValueError, match="NaN"):
        write(Picture(np.zeros((4, 4, 3)), alpha=rgb[..., 0]), tmp_path / "photo.png")
    assert files(tmp_path) == []


def test_no_folder_and_a_folder(noise, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        write(colour(noise), tmp_path / "none" / "photo.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write(colour(noise), tmp_path / "folder.png")
    assert files(tmp_path) == ["folder.png"]


# Whole or not at all


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("old", [None, b"the old result"])
def test_a_failure_leaves_the_old_file_and_no_debris(monkeypatch, noise, tmp_path, error, old):
    path = tmp_path / "photo.jpg"
    if old is not None:
        path.write_bytes(old)

    def fail_half_way(image, stream, *names, **options):
        stream.write(b"half a picture")
        stream.flush()
        raise error

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(type(error)):
        write(colour(noise), path)
    assert files(tmp_path) == ([] if old is None else [path.name])
    if old is not None:
        assert path.read_bytes() == old


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".gif", ".webp", ".exr"])
def test_an_error_between_strips_leaves_nothing(noise, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    picture = colour(noise)
    with pytest.raises(KeyboardInterrupt), create(picture, path, noise.shape[:2]) as writer:
        writer.begin(picture)
        writer.write(picture.rows(0, 5))
        (part,) = files(tmp_path)
        assert re.fullmatch(rf"\.photo\{suffix}\.[0-9a-f]{{32}}\.part", part)
        raise KeyboardInterrupt
    assert files(tmp_path) == []


def test_the_name_appears_only_when_the_picture_is_whole(noise, tmp_path):
    picture, path = colour(noise), tmp_path / "photo.png"
    with create(picture, path, noise.shape[:2]) as writer:
        writer.begin(picture)
        writer.write(picture.rows(0, picture.height))
        assert not path.exists()
    assert files(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="12 of 13 rows"), create(picture, path, noise.shape[:2]) as writer:
        writer.begin(picture)
        writer.write(picture.rows(0, 12))
    assert np.array_equal(read(path).rgb, picture.rgb) and files(tmp_path) == [path.name]


def test_an_existing_file_is_replaced(noise, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"the old result")
    write(colour(noise), path)
    assert np.array_equal(read(path).rgb, unit(noise))


@pytest.mark.skipif(os.name == "nt", reason="permissions and links of POSIX")
def test_permissions_follow_the_umask_and_links_are_followed(noise, tmp_path):
    old = os.umask(0o027)
    try:
        write(colour(noise), tmp_path / "photo.png")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "photo.png").stat().st_mode) == 0o640
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "photo.png")
    write(solid(0.0), link)
    assert link.is_symlink()
    assert read(tmp_path / "photo.png").rgb.shape == (16, 16, 3)

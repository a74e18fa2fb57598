"""Damaged pictures of all formats, the same ones for the same seed."""

import importlib.util
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms, features

HEIGHT, WIDTH = 20, 28


def whole_files() -> dict[str, bytes]:
    """Small pictures by name; the suffix is that of their format."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    rgb = np.stack([columns * 9, rows * 12, rng.integers(0, 256, rows.shape)], axis=2).astype(np.uint8)
    rgba = np.dstack([rgb, columns * 9]).astype(np.uint8)
    deep = (rgb.astype(np.uint16) * 257) ^ rng.integers(0, 256, rgb.shape).astype(np.uint16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # the time it was made at
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    described = {"exif": exif.tobytes(), "icc_profile": profile, "dpi": (300, 300)}
    image = Image.fromarray(rgb)
    frames = [Image.fromarray(np.roll(rgba, 3 * number, axis=1)) for number in range(3)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}

    def saved(image: Image.Image, format: str, **options: object) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format, **options)
        return stream.getvalue()

    def tiff(pixels: np.ndarray, **options: object) -> bytes:
        stream = io.BytesIO()
        tifffile.imwrite(stream, pixels, photometric="rgb", metadata=None, **options)
        return stream.getvalue()

    files = {
        "rgb.png": saved(image, "PNG", **described),
        "grey.png": saved(image.convert("L"), "PNG"),
        "palette.png": saved(image.quantize(30), "PNG", transparency=3),
        "deep.png": _deep_png(deep),
        "animated.png": saved(frames[0], "PNG", **animated),
        "rgb.jpg": saved(image, "JPEG", quality=90, **described),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "grey.jpg": saved(image.convert("L"), "JPEG"),
        "animated.gif": saved(frames[0], "GIF", disposal=2, **animated),
        "still.gif": saved(image, "GIF"),
        "rgb.bmp": saved(image, "BMP"),
        "palette.bmp": saved(image.quantize(16), "BMP"),
        "raw.tif": saved(image, "TIFF", **described),
        "lzw.tif": saved(image, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": saved(image, "TIFF", compression="jpeg"),
        "pages.tif": saved(image, "TIFF", save_all=True, append_images=[image, image.convert("L")]),
        "deep.tif": tiff(deep, compression="zlib", predictor=True),
        "planes.tif": tiff(np.moveaxis(deep, 2, 0), planarconfig="separate"),
        "float.tif": tiff(rgb.astype(np.float32) / 255),
        "big.tif": tiff(rgb, bigtiff=True),
        "rgb.ppm": saved(image, "PPM"),
        "rgb.tga": saved(image, "TGA"),
    }
    if features.check("webp"):
        files["lossy.webp"] = saved(image, "WEBP", quality=80, exif=exif.tobytes())
        files["lossless.webp"] = saved(frames[0], "WEBP", lossless=True)
        files["animated.webp"] = saved(frames[0], "WEBP", **animated)
    if "avif" in features.modules and features.check_module("avif"):
        files["rgb.avif"] = saved(image, "AVIF")
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        stream = io.BytesIO()
        pillow_heif.from_pillow(image).save(stream, quality=80)
        files["rgb.heic"] = stream.getvalue()
    return files


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _deep_png(pixels: np.ndarray) -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    text = b"bomb\0\0" + zlib.compress(bytes(1 << 22))
    chunks = [(b"IHDR", header), (b"zTXt", text), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _with_absurd_size(data: bytes, side: int) -> bytes:
    """The picture, if its header says how large it is in two or four bytes, with a header that lies."""
    for form, most in ((">II", 0xFFFFFFFF), ("<II", 0xFFFFFFFF), (">HH", 0xFFFF), ("<HH", 0xFFFF)):
        for order in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
            place = data.find(struct.pack(form, *order))
            if place >= 0:
                size = struct.calcsize(form)
                data = data[:place] + struct.pack(form, min(side, most), min(side, most)) + data[place + size :]
    if data.startswith(b"\x89PNG"):
        data = data[:8] + _chunk(b"IHDR", data[16:29]) + data[33:]
    if data[:2] in (b"II", b"MM"):
        for tag in (256, 257):
            for kind, form in ((3, "<HHIH"), (4, "<HHII")):
                for value in (WIDTH, HEIGHT):
                    lie = struct.pack(form, tag, kind, 1, min(side, 0xFFFF if kind == 3 else side))
                    data = data.replace(struct.pack(form, tag, kind, 1, value), lie)
    return data


def mutated(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """The file with one kind of damage, drawn at random."""
    kind = rng.integers(0, 8)
    if kind == 0:  # cut short
        return data[: rng.integers(0, len(data))]
    if kind == 1:  # another file's contents
        return others[rng.integers(0, len(others))]
    if kind == 2:
        return _with_absurd_size(data, int(rng.choice([0, 1, 20_000, 60_000, 0x7FFFFFFF, 0xFFFFFFFF])))
    changed = bytearray(data)
    if kind == 3:  # a hole
        start = rng.integers(0, len(data))
        changed[start : start + rng.integers(1, 64)] = b""
    elif kind == 4:  # a block twice
        start = rng.integers(0, len(data))
        changed[start:start] = changed[start : start + rng.integers(1, 256)]
    elif kind == 5:  # bytes of extreme values, where headers are
        for place in rng.integers(0, min(len(data), 256), 3):
            changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
    else:  # flipped bits, anywhere
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            changed[place] ^= 1 << rng.integers(0, 8)
    return bytes(changed)


def mutated_files(folder: Path, count: int, seed: int) -> list[Path]:
    """Writes `count` files into `folder`: damaged ones of all formats, a few whole ones, and some that are no pictures.

    A file whose name begins with "whole" is a picture.
    """
    rng = np.random.default_rng(seed)
    whole = whole_files()
    names = list(whole)
    paths = []
    for number in range(count):
        name = names[number % len(names)]
        stem, suffix = name.split(".")
        if number % 20 == 7:
            label, data = "whole", whole[name]
        elif number % 20 == 13:
            label, data = "noise", rng.bytes(int(rng.integers(0, 300)))
        else:
            label, data = "damaged", mutated(whole[name], rng, list(whole.values()))
        if label == "damaged" and rng.random() < 0.1:
            suffix = names[rng.integers(0, len(names))].split(".")[1]
        paths.append(folder / f"{label}_{number:03d}_{stem}.{suffix}")
        paths[-1].write_bytes(data)
    return paths

"""Pictures to look at side by side: resized, as one sheet of labelled crops, and as data within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from .picture import Picture
from .writing import quantized

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
COLORS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#008080")
"""Of the boxes of a sheet, in turn."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SMALLEST_CELL = 256  # pixels a side: smaller crops are shown with larger pixels
_GAP = 8
_INK, _FAINT, _PAPER = "#111111", "#666666", "#ffffff"


@dataclass(frozen=True)
class Crops:
    """What several methods make of the same places of one picture.

    Attributes:
        title: of the picture.
        overview: the whole picture, (H, W, 3), float32, 0..1.
        boxes: places in it: x, y, side, in its pixels.
        labels: of the methods.
        notes: a line below each label, such as "PSNR-Y 25.15 dB"; may be empty strings.
        cells: box by box, method by method, (S, S, 3), float32, 0..1, one S for all of a box.
    """

    title: str
    overview: np.ndarray
    boxes: list[tuple[int, int, int]]
    labels: list[str]
    notes: list[str]
    cells: list[list[np.ndarray]]


@dataclass(frozen=True)
class LabelledPicture:
    """A picture with what is written above it.

    Attributes:
        label: its name.
        note: a line below it, such as "PSNR-Y 25.15 dB"; may be empty.
        rgb: (H, W, 3), float32, 0..1.
    """

    label: str
    note: str
    rgb: np.ndarray


def resize(rgb: np.ndarray, size: tuple[int, int], method: str = "bicubic") -> np.ndarray:
    """A picture of another size, as Pillow resizes it, in float.

    Args:
        rgb: (H, W, 3), float32, 0..1.
        size: (width, height) in pixels.
        method: one of RESAMPLING; when reducing, all but "nearest" average.

    Returns:
        (height, width, 3), float32, 0..1: overshoots are clipped.
    """
    channels = [
        np.asarray(Image.fromarray(channel).resize(size, RESAMPLING[method])) for channel in np.moveaxis(rgb, 2, 0)
    ]
    return np.clip(np.stack(channels, axis=2), 0, 1)


def data_uri(rgb: np.ndarray) -> str:
    """A picture (H, W, 3), float, 0..1 as an address that holds its 8-bit pixels without loss: WebP, else PNG."""
    webp = features.check_module("webp") and max(rgb.shape) <= 16383
    stream = io.BytesIO()
    image = Image.fromarray(quantized(rgb, 8))
    if webp:
        image.save(stream, "WEBP", lossless=True, quality=50)
    else:
        image.save(stream, "PNG", optimize=True)
    return f"data:image/{'webp' if webp else 'png'};base64,{base64.b64encode(stream.getvalue()).decode()}"


def draw_sheet(pictures: Sequence[Crops]) -> Picture:
    """One sheet: picture below picture, each with its overview at the left and a row of labelled crops for each box.

    Crops are shown pixel by pixel, or with every pixel as a square of 2, 3, ... where that keeps them below 256.
    """
    parts = [_draw(crops) for crops in pictures]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), _PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return Picture(np.asarray(sheet, dtype=np.float32) / 255)


def draw_rows(title: str, rows: Sequence[Sequence[LabelledPicture]]) -> Picture:
    """One sheet: a title, and below it rows of pictures in columns, with square pixels as `draw_sheet` shows crops."""
    title_font, label_font, note_font = (ImageFont.load_default(size) for size in (20, 18, 15))
    images = [[_enlarged(cell.rgb) for cell in row] for row in rows]
    column = max(image.width for row in images for image in row) + _GAP
    # As high as label and note together; rows without notes have no room for them.
    heads = [18 + _GAP + (15 + _GAP if any(cell.note for cell in row) else 0) for row in rows]
    heights = [head + max(image.height for image in row) + _GAP for head, row in zip(heads, images, strict=True)]
    width = max(len(row) for row in rows) * column + _GAP
    top = 20 + 3 * _GAP
    sheet = Image.new("RGB", (width, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _shortened(title, title_font, width - 2 * _GAP), _INK, title_font)
    for row, cells, head, height in zip(rows, images, heads, heights, strict=True):
        for index, (cell, image) in enumerate(zip(row, cells, strict=True)):
            left = _GAP + index * column
            draw.text((left, top), _shortened(cell.label, label_font, column - _GAP), _INK, label_font)
            draw.text((left, top + 22), _shortened(cell.note, note_font, column - _GAP), _FAINT, note_font)
            sheet.paste(image, (left, top + head))
        top += height
    return Picture(np.asarray(sheet, dtype=np.float32) / 255)


def _draw(crops: Crops) -> Image.Image:
    label_font, note_font = ImageFont.load_default(18), ImageFont.load_default(15)
    cells = [[_enlarged(cell) for cell in row] for row in crops.cells]
    cell = max(image.width for row in cells for image in row)
    height, width = crops.overview.shape[:2]
    # The overview fills a column of its own, as wide as a crop, without growing taller than the rows beside it.
    rows_height = sum(row[0].height + _GAP for row in cells) - _GAP
    scale = min(cell / width, max(rows_height, cell) / height)
    overview_size = (max(1, round(width * scale)), max(1, round(height * scale)))

    head = 18 + 15 + 2 * _GAP
    sheet = Image.new(
        "RGB",
        ((cell + _GAP) * (len(crops.labels) + 1) + _GAP, 2 * _GAP + head + max(rows_height, overview_size[1])),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _shortened(crops.title, label_font, cell), _INK, label_font)
    draw.text((_GAP, _GAP + 24), f"{width} x {height}", _FAINT, note_font)
    sheet.paste(_image(resize(crops.overview, overview_size)), (_GAP, _GAP + head))
    for number, (x, y, side) in enumerate(crops.boxes):
        corner = (_GAP + round(x * scale), _GAP + head + round(y * scale))
        end = (corner[0] + round(side * scale) - 1, corner[1] + round(side * scale) - 1)
        draw.rectangle((corner, end), outline=COLORS[number % len(COLORS)], width=3)
        _badge(draw, corner, number, note_font)

    for column, (label, note) in enumerate(zip(crops.labels, crops.notes, strict=True), start=1):
        left = _GAP + column * (cell + _GAP)
        draw.text((left, _GAP), _shortened(label, label_font, cell), _INK, label_font)
        draw.text((left, _GAP + 24), _shortened(note, note_font, cell), _FAINT, note_font)
        top = _GAP + head
        for number, row in enumerate(cells):
            sheet.paste(row[column - 1], (left, top))
            if column == 1:
                _badge(draw, (left, top), number, note_font)
            top += row[0].height + _GAP
    return sheet


def _enlarged(cell: np.ndarray) -> Image.Image:
    zoom = -(-_SMALLEST_CELL // cell.shape[1])
    return _image(cell).resize((cell.shape[1] * zoom, cell.shape[0] * zoom), Image.Resampling.NEAREST)


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(quantized(rgb, 8))


def _badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], number: int, font: Font) -> None:
    """The number of a box in its colour, in a corner that it has in common with its crops."""
    x, y = corner
    draw.rectangle((x, y, x + 20, y + 20), fill=COLORS[number % len(COLORS)])
    draw.text((x + 10, y + 10), str(number + 1), "#ffffff", font, anchor="mm")


def _shortened(text: str, font: Font, width: int) -> str:
    """The text, with its middle left out where it is too long: ends of names tell them apart."""
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 1 and font.getlength(f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}") > width:
        kept -= 1
    return f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}" if kept > 1 else "…"

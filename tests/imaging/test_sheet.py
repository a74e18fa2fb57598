"""Resizing, sheets of labelled crops, and pictures as data."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from tsdsr.imaging import COLORS, Crops, LabelledPicture, data_uri, draw_rows, draw_sheet, resize, write
from tsdsr.imaging.sheet import _shortened


@pytest.fixture
def crops(rng):
    """Function that makes a comparison of two methods, each cell of one colour of its own."""

    def make(sides=(64, 32), labels=("one", "two"), title="photo.png"):
        colors = rng.random((len(sides), len(labels), 3)).astype(np.float32)
        return Crops(
            title,
            np.full((40, 50, 3), 0.5, np.float32),
            [(5, 6, 10), (30, 20, 10)][: len(sides)],
            list(labels),
            ["20.00 dB"] * len(labels),
            [[np.full((side, side, 3), color) for color in row] for side, row in zip(sides, colors, strict=True)],
        )

    return make


@pytest.mark.parametrize("method", ["bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("size", [(34, 26), (5, 9)])
def test_resize_is_pillows_in_float(noise, method, size):
    noise = noise // 2 + 64  # overshoots stay within 0..255, where Pillow clips them after each of its two passes
    rgb = noise.astype(np.float32) / 255
    expected = Image.fromarray(noise).resize(size, Image.Resampling[method.upper()])
    found = resize(rgb, size, method)
    assert found.shape == (size[1], size[0], 3) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(found * 255, np.asarray(expected), atol=1.01)


@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
def test_overshoots_are_clipped(noise, method):
    found = resize((noise > 127).astype(np.float32), (51, 39), method)
    assert found.min() == 0 and found.max() == 1


def test_data_uri_holds_the_pixels_exactly(noise):
    kind, data = data_uri(noise.astype(np.float32) / 255).split(",")
    assert kind.startswith("data:image/") and kind.endswith(";base64")
    found = Image.open(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_array_equal(np.asarray(found), noise)


def test_every_crop_is_on_the_sheet_with_square_pixels(rng):
    cell = rng.random((16, 16, 3)).astype(np.float32)
    other = rng.random((16, 16, 3)).astype(np.float32)
    sheet = draw_sheet([Crops("a", cell, [(2, 2, 4)], ["x", "y"], ["", ""], [[cell, other]])]).rgb
    # 16 pixels become squares of 16: the second column has no number drawn over it.
    wanted = np.rint(np.kron(other, np.ones((16, 16, 1))) * 255)
    pixels = np.rint(sheet * 255)
    starts = np.argwhere((np.abs(pixels[:-255, :-255] - wanted[0, 0]) < 1).all(axis=2))
    assert any(
        pixels[y : y + 256, x : x + 256].shape == wanted.shape
        and np.array_equal(pixels[y : y + 256, x : x + 256], wanted)
        for y, x in starts
    )


def test_boxes_and_rows_are_marked_alike(crops):
    sheet = np.rint(draw_sheet([crops()]).rgb * 255)
    for color in COLORS[:2]:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        columns = np.nonzero((sheet == rgb).all(axis=2).any(axis=0))[0]
        assert columns.min() < 264 < columns.max(), "once in the overview, once at its row"


def test_pictures_stand_below_each_other_and_labels_are_drawn(crops, tmp_path):
    parts = [crops(), crops((64,)), crops((64,), ("a", "b", "c"))]
    sheet, alone = draw_sheet(parts), [draw_sheet([part]) for part in parts]
    assert (sheet.height, sheet.width) == (sum(part.height for part in alone), max(part.width for part in alone))
    top = 0
    for part in alone:
        np.testing.assert_array_equal(sheet.rgb[top : top + part.height, : part.width], part.rgb)
        top += part.height
    assert (draw_sheet([crops((64,), ("long", "two"))]).rgb[:57] != draw_sheet([crops((64,))]).rgb[:57]).any()
    write(sheet, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (sheet.width, sheet.height)


def test_rows_stand_below_each_other_with_square_pixels(rng):
    """Pictures of 128 pixels as squares of 2, larger ones as they are; every row's columns begin at the same places."""
    small, wide = rng.random((128, 128, 3)).astype(np.float32), rng.random((40, 300, 3)).astype(np.float32)
    cells = [LabelledPicture(f"name {index}", "", small) for index in range(3)]
    rows = [cells, [LabelledPicture("name", "20.00 dB", small), LabelledPicture("name", "", wide)]]
    sheet = np.rint(draw_rows("a title", rows).rgb * 255)
    assert sheet.shape[1] == 8 + 3 * (300 + 8)
    top, places = 44, []
    for row, head in zip(rows, (26, 49), strict=True):
        top += head
        for index, cell in enumerate(row):
            zoom = 2 if cell.rgb is small else 1
            wanted = np.rint(np.kron(cell.rgb, np.ones((zoom, zoom, 1))) * 255)
            left = 8 + index * 308
            found = sheet[top : top + wanted.shape[0], left : left + wanted.shape[1]]
            np.testing.assert_allclose(found, wanted, atol=1)
            places.append((top, left))
        top += 256 + 8
    assert top == sheet.shape[0]
    plain = np.rint(draw_rows("a title", [rows[0], [LabelledPicture("name", "20.00 dB", small), cells[0]]]).rgb * 255)
    assert plain.shape[1] == 8 + 3 * 264
    for left, text in ((0, sheet[:44]), (8, sheet[44:70]), (8, sheet[334:356]), (8, sheet[356:380])):
        assert text[:, left : left + 100].min() < 255, "title, labels and note are drawn"


def test_long_names_keep_both_ends_and_fit():
    font = ImageFont.load_default(18)
    name = "runs/2026-01-01/pipeline-with-a-very-long-name/checkpoint-20000"
    short = _shortened(name, font, 200)
    assert font.getlength(short) <= 200 and short.startswith("runs") and short.endswith("20000") and "…" in short
    assert _shortened("embedded", font, 200) == "embedded"
    assert _shortened(name, font, 1) == "…"

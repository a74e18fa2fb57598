"""Comparisons: which methods, which crops of whole pictures, one model at a time, and the page."""

import weakref

import numpy as np
import pytest
import torch

from tsdsr.evaluation import compare as module
from tsdsr.evaluation.compare import compare, methods, structure_boxes, write_page
from tsdsr.evaluation.metrics import METRICS
from tsdsr.imaging import Picture, read, resize, write
from tsdsr.pipelines.loading import load_pipeline

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8}


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory):
    """Folder of a pipeline with random weights, and an encoder that has a posterior to draw from."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    make_pipeline("kl").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sources(picture, tmp_path):
    """Two pictures of 20x16 and 16x16, and ground truths four times as large; one more that has no small picture."""
    for name, (height, width) in {"a": (16, 20), "b": (16, 16)}.items():
        for role, scale in (("lq", 1), ("hr", 4)):
            (tmp_path / role).mkdir(exist_ok=True)
            write(Picture(picture(height * scale, width * scale)), tmp_path / role / f"{name}.png")
    write(Picture(picture(8, 8)), tmp_path / "hr" / "more.png")
    return tmp_path


def test_crops_are_cut_from_whole_results(sources, model):
    (a, _) = compare(
        sources / "lq", [model, "nearest"], boxes=[(2, 3, 8)], seed=3, calling={**SMALL, "sample_posterior": True}
    )
    rgb = read(sources / "lq" / "a.png").rgb
    pipeline = load_pipeline(model)
    generator = torch.Generator().manual_seed(3)
    whole = pipeline(rgb, output_type="np", sample_posterior=True, generator=generator, **SMALL).images[0]
    expected = [resize(rgb, (80, 64), "bicubic"), whole, resize(rgb, (80, 64), "nearest")]
    assert a.labels == ["bicubic (input)", "tiny", "nearest"] and a.notes == ["", "", ""]
    assert a.title == "a.png" and a.boxes == [(2, 3, 8)]
    np.testing.assert_array_equal(a.overview, rgb)
    for cell, result in zip(a.cells[0], expected, strict=True):
        np.testing.assert_allclose(cell, result[12:44, 8:40], atol=0.5 / 255 + 1e-6)


def test_ground_truth_comes_last_with_psnr_of_the_whole(sources):
    a, b = compare(sources / "lq", ["lanczos"], hr=sources / "hr", crops=1, crop_size=4)
    assert a.labels == ["bicubic (input)", "lanczos", "ground truth"] and a.notes[-1] == ""
    truth, rgb = (read(sources / folder / "a.png").rgb for folder in ("hr", "lq"))
    x, y, side = (4 * number for number in a.boxes[0])
    np.testing.assert_array_equal(a.cells[0][-1], truth[y : y + side, x : x + side])
    sr, hr = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (resize(rgb, (80, 64), "lanczos"), truth))
    assert a.notes[1] == f"PSNR-Y {METRICS['psnr'].measure((sr * 255).round() / 255, hr):.2f} dB"
    assert a.notes != b.notes


def test_one_model_at_a_time(sources, model, monkeypatch):
    """The first is gone before the second is loaded."""
    made, alive = [], []

    def watched(name, **options):
        alive.append(sum(reference() is not None for reference in made))
        upscaler = make(name, **options)
        made.append(weakref.ref(upscaler))
        return upscaler

    make = module.make_upscaler
    monkeypatch.setattr(module, "make_upscaler", watched)
    compare(sources / "lq", [model, "nearest"], crops=1, calling=SMALL)
    assert alive == [0, 0, 0]


@pytest.mark.parametrize(("factor", "left", "top", "side"), [(1, 12, 8, 8), (1.5, 18, 12, 12), (2.3, 28, 18, 18)])
def test_fractional_factors(sources, factor, left, top, side):
    path = sources / "lq" / "a.png"
    (found,) = compare(path, ["nearest"], boxes=[(12, 8, 8), (0, 0, 16)], upscale=factor)
    whole = resize(read(path).rgb, (round(20 * factor), round(16 * factor)), "nearest")
    np.testing.assert_allclose(found.cells[0][1], whole[top : top + side, left : left + side], atol=1e-6)
    assert found.cells[1][1].shape == (round(16 * factor), round(16 * factor), 3)


def test_methods_and_their_labels(tmp_path):
    folders = [tmp_path / name for name in ("x/pipeline", "y/pipeline", "y/other")]
    for folder in folders:
        folder.mkdir(parents=True)
    models = [*map(str, folders), "owner/name", "bicubic"]
    assert list(methods(models)) == ["bicubic", *models[:4]]
    assert list(methods(models).values()) == ["bicubic", "x/pipeline", "y/pipeline", "other", "owner/name"]
    assert methods(["lanczos"]) == {"bicubic": "bicubic (input)", "lanczos": "lanczos"}
    assert methods(["embedded", "bicubic"], ["ours", "before"]) == {"bicubic": "before", "embedded": "ours"}
    assert methods(["embedded"], ["ours"]) == {"bicubic": "bicubic (input)", "embedded": "ours"}
    with pytest.raises(ValueError, match="2 models but 1 labels"):
        methods(["embedded", "nearest"], ["ours"])
    with pytest.raises(ValueError, match="embedded is there twice"):
        methods(["embedded", "embedded"])


def test_automatic_crops():
    """Where there is structure, apart from each other, within the picture, and the same every time."""
    rgb = np.full((60, 90, 3), 0.5, np.float32)
    noise = np.random.default_rng(0).random((12, 12, 1)).astype(np.float32)
    for top, left in ((4, 4), (44, 70)):
        rgb[top : top + 12, left : left + 12] = noise
    boxes = structure_boxes(rgb, 3, 16)
    assert boxes == structure_boxes(rgb, 3, 16) and len(boxes) == 3
    for top, left in ((4, 4), (44, 70)):
        assert any(x <= left and y <= top and x + 16 >= left + 12 and y + 16 >= top + 12 for x, y, _ in boxes)
    for i, (x, y, side) in enumerate(boxes):
        assert 0 <= x <= 90 - side and 0 <= y <= 60 - side
        assert all(max(abs(x - u), abs(y - v)) >= side for u, v, _ in boxes[:i])
    assert structure_boxes(rgb, 1, 100)[0][2] == 60, "no larger than the picture"
    crowded = structure_boxes(rgb, 3, 60)  # no room for two side by side
    assert len(crowded) == 2 and abs(crowded[0][0] - crowded[1][0]) == 30
    assert len(structure_boxes(rgb, 3, 1)) == 3
    assert len(structure_boxes(np.zeros((64, 64, 3), np.float32), 3, 16)) == 3, "a flat picture has crops as well"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "absent.png"}, ("absent.png", "does not exist")),
        ({"source": "empty"}, ("empty", "no pictures")),
        ({"source": "hr/notes.txt"}, ("notes.txt", "not an image")),
        ({"models": ["absent/folder/x"]}, ("absent/folder/x", "neither a folder nor a Hub id")),
        ({"models": ["hr"]}, ("not a pipeline folder",)),
        ({"boxes": [(0, 0, 16), (5, 0, 16)]}, ("5,0,16", "a.png", "20x16")),
        ({"source": "lq", "boxes": [(4, 0, 16)]}, ("4,0,16", "b.png", "16x16")),
        ({"hr": "lq"}, ("a.png is 20x16", "80x64")),
        ({"hr": "other"}, ("other", "a, the ground truth")),
        ({"source": "lq", "hr": "hr/a.png"}, ("hr/a.png", "not a folder")),
        ({"upscale": 0.5}, ("at least 1", "0.5")),
        ({"upscale": float("nan")}, ("at least 1", "nan")),
    ],
)
def test_refusals_before_anything_runs(sources, one_sentence, monkeypatch, arguments, words):
    monkeypatch.chdir(sources)
    (sources / "empty").mkdir()
    (sources / "other").mkdir()
    (sources / "hr" / "notes.txt").write_text("no picture")
    ran = []
    with pytest.raises(ValueError) as error:
        compare(
            **{"source": "lq/a.png", "models": ["nearest"], **arguments},
            progress=lambda *finished: ran.append(finished),
        )
    one_sentence(error.value, *words)
    assert ran == []


def test_page(sources, page, tmp_path):
    (sources / "lq" / "b.png").rename(sources / "lq" / "<b>&\"'.png")
    found = compare(sources / "lq", ["nearest"], labels=["<i>near</i>"], boxes=[(0, 0, 8), (8, 8, 4)])
    write_page(tmp_path / "page.html", found)
    read = page(tmp_path / "page.html")
    assert not any(tag in ("b", "i") for tag, _ in read.tags)
    for text in ("a.png", "<b>&\"'.png", "<i>near</i>", "bicubic (input)", "20×16"):
        assert text in read.text
    images = [given for tag, given in read.tags if tag == "img"]
    assert len(images) == 2 * (1 + 2 * 2) and all(given["alt"] for given in images)
    buttons = [given for tag, given in read.tags if tag == "button"]
    assert len(buttons) == 4 and "left: 40.0%; top: 50.0%; width: 20.0%; height: 25.0%" in buttons[3]["style"]

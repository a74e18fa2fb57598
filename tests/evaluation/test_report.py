"""The report as a page: self-contained, escaped, complete, quick."""

import re
import time

import numpy as np
import pytest

from tsdsr.evaluation.metrics.metric import Column
from tsdsr.evaluation.published import Published, published_results
from tsdsr.evaluation.report import _cases, _distribution, _rows, busiest, flat, write_report
from tsdsr.evaluation.results import Evaluation, Pictures, Unavailable

HOSTILE = "<b>&\"'</script><img src=x onerror=alert(1)>.png"
PSNR = Column("psnr", "PSNR-Y", "full-reference", "higher", "Ratio of signal to noise.", "dB", 2)
NIQE = Column("niqe", "NIQE", "no-reference", "lower", "Naturalness.")
RATIO = Column("ratio", "Sharpness", "full-reference", "one", "Ratio of gradients.")
FID = Column("fid", "FID", "set", "lower", "Distance of sets.", digits=2)


def evaluation(names=("a", "b", "c"), columns=(PSNR, NIQE, RATIO), **more):
    images = [
        {"name": name, **{column.name: 20.0 + index + 3 * place for place, column in enumerate(columns)}}
        for index, name in enumerate(names)
    ]
    average = {column.name: float(np.mean([image[column.name] for image in images])) for column in columns}
    more.setdefault("settings", {"label": "ours", "set": "RealSR", "versions": {"torch": "9.9"}, "checksum_hr": "abc"})
    return Evaluation(average=average, images=images, columns=list(columns), **more)


@pytest.fixture
def pictures(picture):
    def of(name):
        return Pictures(sr=picture(32, 40), lq=picture(8, 10, 1), hr=picture(32, 40, 2))

    return of


def test_a_whole_report(pictures, tmp_path, page):
    found = evaluation(
        columns=(PSNR, NIQE, RATIO, FID),
        unavailable=[Unavailable("lpips", "its weights are not here", "tsdsr evaluate --fetch lpips")],
        ground_truth={"average": {"niqe": 4.125}, "images": [{"name": "a", "niqe": 4.125}]},
    )
    found.average["seconds"] = 1.5
    write_report(
        tmp_path / "report.html", found, pictures, published_results("RealSR"), [("before", evaluation(names=("a",)))]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    read = page(tmp_path / "report.html")
    for text in (
        *("ours", "before", "Ground truth", "OSEDiff", "StableSR", "TSD-SR paper, Table 1", "0.136 (A100)"),
        *("PSNR-Y", "NIQE", "Sharpness", "FID", "21.00", "4.1250", "Ratio of gradients."),
        *("lpips", "its weights are not here", "tsdsr evaluate --fetch lpips"),
        *("versions.torch", "9.9", "checksum_hr", "abc", "3 pictures", "against ground truth"),
        "They are of 100 pictures, this run is of 3.",
    ):
        assert text in read.text, text
    assert len([1 for tag, given in read.tags if tag == "img"]) == 9, "three pictures of three images"
    ranges = [given for tag, given in read.tags if tag == "input" and given["type"] == "range"]
    assert len(ranges) == 3 and all(given["aria-label"] for given in ranges)
    data = read.data()
    assert data["names"] == ["a", "b", "c"] and data["values"][1] == [21.0, 24.0, 27.0, None]
    assert [column["name"] for column in data["columns"]] == ["psnr", "niqe", "ratio", "seconds"]
    assert {"kind": "published", "label": "SeeSR, 50 steps", "values": [25.21, 5.3978, None, None]} in data["averages"]


def test_hostile_names_are_escaped(pictures, tmp_path, page):
    found = evaluation(names=(HOSTILE,), settings={"label": HOSTILE, HOSTILE: HOSTILE})
    found.unavailable = [Unavailable(HOSTILE, HOSTILE, HOSTILE)]
    row = Published("RealSR", HOSTILE, 1, {"psnr": 1.0}, HOSTILE)
    write_report(tmp_path / "report.html", found, pictures, [row], [(HOSTILE, found)])
    read = page(tmp_path / "report.html")
    assert not any(tag == "b" or "onerror" in given for tag, given in read.tags)
    assert read.data()["names"] == [HOSTILE]
    assert read.text.count(HOSTILE) >= 8


@pytest.mark.parametrize("names", [("only",), tuple("abcdefghijkl")])
def test_without_reference_and_without_published_rows(picture, names, tmp_path, page):
    found = evaluation(names=names, columns=(NIQE,), settings={})
    write_report(tmp_path / "report.html", found, lambda name: Pictures(sr=picture(16, 16)))
    read = page(tmp_path / "report.html")
    assert "without ground truth" in read.text
    assert "scatter" not in read.ids and "distributions" in read.ids
    assert len([1 for tag, _ in read.tags if tag == "img"]) == (1 if len(names) == 1 else 8)


def test_missing_values(pictures, tmp_path, page):
    found = evaluation()
    found.images[0]["psnr"] = None
    found.images[1] |= {"psnr": None, "niqe": None}
    found.average["ratio"] = None
    for image in found.images:
        image["ratio"] = None
    found.settings["undefined"] = {"psnr": "The picture is flat."}
    write_report(tmp_path / "report.html", found, pictures)
    read = page(tmp_path / "report.html")
    assert "1 of 3 pictures have a value (The picture is flat.)" in " ".join(read.text.split())
    assert read.data()["values"][1] == [None, None, None]


def test_a_missing_picture_leaves_no_file(tmp_path):
    def absent(name):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_report(tmp_path / "report.html", evaluation(), absent)
    assert list(tmp_path.iterdir()) == []


def test_three_thousand_pictures(pictures, tmp_path, page):
    names = [f"picture_{number:04d}" for number in range(3000)]
    asked = []
    begun = time.perf_counter()
    write_report(tmp_path / "report.html", evaluation(names=names), lambda name: asked.append(name) or pictures(name))
    assert time.perf_counter() - begun < 3
    assert (tmp_path / "report.html").stat().st_size < 500_000
    assert len(asked) <= 8
    assert len(page(tmp_path / "report.html").data()["values"]) == 3000


def test_best_of_each_column():
    ours = evaluation(names=("a",))
    ours.average = {"psnr": 25.0, "niqe": 5.0, "ratio": 1.2}
    other = evaluation(names=("a",))
    other.average = {"psnr": 24.0, "niqe": 4.0, "ratio": 0.7}
    ours.ground_truth = {"average": {"niqe": 3.0}, "images": []}
    rows = _rows(
        ours, [PSNR, NIQE, RATIO, FID], [Published("RealSR", "P", 1, {"psnr": 25.0, "fid": 1.0}, "x")], [("o", other)]
    )
    assert [(row["kind"], row["best"]) for row in rows] == [
        ("this run", {"psnr", "ratio"}),
        ("earlier run", {"niqe"}),
        ("ground truth", set()),
        ("published", {"psnr"}),  # a draw; alone in a column it has won against nobody
    ]


def test_worst_and_best_cases(pictures):
    found = evaluation(names=[f"n{number:02d}" for number in range(20)])
    found.images[4]["psnr"] = None
    shown = {case["name"]: case["why"] for case in _cases(found, pictures)}
    assert shown == {
        "n00": ["worst PSNR-Y", "best NIQE"],
        "n01": ["2nd worst PSNR-Y", "2nd best NIQE"],
        "n19": ["best PSNR-Y", "worst NIQE"],
        "n18": ["2nd best PSNR-Y", "2nd worst NIQE"],
    }


def test_of_large_pictures_the_part_that_differs_most(picture):
    hr = picture(1000, 900)
    sr = hr.copy()
    sr[940:960, 30:50] = 1 - sr[940:960, 30:50]
    (case,) = _cases(evaluation(names=("a",)), lambda name: Pictures(sr=sr, hr=hr))
    assert (case["width"], case["height"]) == (768, 768)
    assert re.match(r"768x768 of 900x1000 pixels, from \d+, (19\d|2\d\d):", case["part"])


def test_pictures_of_other_sizes_than_the_result_are_not_laid_over_it(picture):
    shown = Pictures(sr=picture(32, 32), lq=picture(8, 8), hr=picture(30, 32))
    (case,) = _cases(evaluation(names=("a",)), lambda name: shown)
    assert [name for name, _ in case["layers"]] == ["input, bicubic", "ours"]


def test_distribution():
    found = evaluation(names=range(100))
    found.ground_truth = {"average": {}, "images": [{"name": "x", "niqe": 10.0}]}
    plot = _distribution(NIQE, found)
    assert (plot["low"], plot["high"], plot["mean"], plot["median"]) == (10, 122, 72.5, 72.5)
    assert sum(bar["count"] for bar in plot["bars"]) == 100
    assert plot["bars"][0]["count"] == 0 and plot["bars"][0]["truth"] == 100
    assert plot["mean_at"] == pytest.approx(100 * 62.5 / 112)
    same = _distribution(NIQE, evaluation(names=("a",)))
    assert same["low"] < same["mean"] < same["high"] and same["mean_at"] == pytest.approx(50)
    assert _distribution(FID, evaluation(columns=(FID,))) is None


def test_busiest_is_the_mean_of_every_window():
    values = np.random.default_rng(0).random((20, 31))
    tops, lefts, means = busiest(values, 8, 5, stride=7)
    assert list(tops) == [0, 7, 12] and list(lefts) == [0, 7, 14, 21, 26]
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            assert means[row, column] == pytest.approx(values[top : top + 8, left : left + 5].mean())


def test_flat_settings():
    assert flat({"a": 1, "b": {"c": None, "d": {"e": "x"}}, "f": ["g"]}) == {
        "a": "1",
        "b.c": "null",
        "b.d.e": "x",
        "f": '["g"]',
    }

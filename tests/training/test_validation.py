"""What is measured, and on which pictures."""

import json
import sys

import numpy as np
import pytest
import torch

from tsdsr.evaluation.metrics import METRICS
from tsdsr.evaluation.sets import eight_bit
from tsdsr.imaging import Picture, read, write
from tsdsr.training.config import ConfigError
from tsdsr.training.validation import (
    Validation,
    bicubic,
    crop_centre,
    make_metrics,
    psnr_y,
    save_sheet,
    validation_pairs,
)


@pytest.fixture
def two():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 3, 32, 24, generator=generator)
    return (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def test_psnr_of_a_batch_is_the_mean(two):
    assert psnr_y(*two) == METRICS["psnr"].measure(*two)
    batch = [torch.cat([a, b]) for a, b in zip(two, two[::-1], strict=True)]
    batch[0][1] = batch[0][1] * 0.5
    each = [psnr_y(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(2)]
    assert each[0] != each[1] and psnr_y(*batch) == pytest.approx(sum(each) / 2, abs=1e-4)


def test_pictures_a_metric_is_not_defined_for():
    """NIQE of flat pictures is not."""
    generator = torch.Generator().manual_seed(0)
    flat, busy = torch.full((1, 3, 96, 96), 0.5), torch.rand(1, 3, 96, 96, generator=generator)
    metrics = make_metrics(["psnr_y", "niqe"], torch.device("cpu"))
    lq = torch.zeros(1, 3, 24, 24)
    pairs = [("flat", lq, busy), ("busy", lq, busy)]
    outputs = iter([flat, busy.flip(2), flat, flat])
    means, results = Validation(pairs, metrics).run(lambda lq, size: next(outputs))
    assert means["niqe"] == metrics["niqe"](results[1], busy)
    assert means["psnr_y"] == np.mean([metrics["psnr_y"](result, busy) for result in results])
    means, _ = Validation(pairs, metrics).run(lambda lq, size: next(outputs))
    assert list(means) == ["psnr_y"]


def test_bicubic_is_clamped():
    lq = torch.tensor([0.0, 1.0]).repeat(4, 2).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    image = bicubic(lq, (16, 16))
    assert image.shape == (1, 3, 16, 16) and image.min() == 0 and image.max() == 1


def test_crop_centre():
    image = torch.arange(3 * 13 * 22).view(3, 13, 22)
    crop = crop_centre(image, 10, 4)
    assert crop.shape == (3, 8, 8) and torch.equal(crop, image[:, 2:10, 7:15])
    assert crop_centre(image, 100, 4).shape == (3, 12, 20)


def test_metrics_by_name(two):
    metrics = make_metrics(["psnr_y", "ssim_y", "gmsd"], torch.device("cpu"))
    expected = {"psnr_y": METRICS["psnr"], "ssim_y": METRICS["ssim"], "gmsd": METRICS["gmsd"]}
    assert {name: metric(*two) for name, metric in metrics.items()} == {
        name: metric.measure(*two) for name, metric in expected.items()
    }


def test_metrics_that_cannot_be_had(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", None)
    with pytest.raises(ConfigError) as refused:
        make_metrics(["psnr_y", "musiq"], torch.device("cpu"))
    one_sentence(
        refused.value, "metric musiq is unavailable", "pip install 'tsdsr[eval]' && tsdsr evaluate --fetch musiq"
    )


def test_pairs_are_fixed_by_the_seed(photographs):
    paths = sorted(photographs.iterdir())[:2]
    first, again, other = (validation_pairs(paths, None, 48, 4, seed) for seed in (0, 0, 1))
    for (name, lq, hq), (_, lq_again, hq_again), (_, lq_other, hq_other), path in zip(
        first, again, other, paths, strict=True
    ):
        assert name == path.stem and lq.shape == (1, 3, 12, 12) and hq.shape == (1, 3, 48, 48)
        assert torch.equal(lq, lq_again) and torch.equal(hq, hq_again) and torch.equal(hq, hq_other)
        assert not torch.equal(lq, lq_other)
        sharp = torch.from_numpy(read(path).rgb).permute(2, 0, 1)[:, 8:56, 8:56]
        torch.testing.assert_close(hq[0], sharp, rtol=0, atol=1e-6)
    # Each photograph has noise of its own, and keeps it when others are left out.
    assert torch.equal(validation_pairs(paths[:1], None, 48, 4, 0)[0][1], first[0][1])
    same = validation_pairs([paths[0], paths[0]], None, 48, 4, 0)
    assert not torch.equal(same[0][1], same[1][1])
    assert validation_pairs(paths, None, 48, 2, 0)[0][1].shape == (1, 3, 24, 24)


def save(path, height, width, value=0.5):
    path.parent.mkdir(exist_ok=True)
    return write(Picture(np.full((height, width, 3), value, np.float32)), path)


def test_ready_pairs_are_used_whole(tmp_path):
    hq, lq = save(tmp_path / "hq" / "a.png", 40, 24, 0.2), save(tmp_path / "lq" / "a.png", 10, 6, 0.8)
    ((name, small, sharp),) = validation_pairs([hq], lq.parent, 16, 4, 0)
    assert name == "a" and small.shape == (1, 3, 10, 6) and sharp.shape == (1, 3, 40, 24)
    assert small.mean() == pytest.approx(0.8, abs=1 / 255) and sharp.mean() == pytest.approx(0.2, abs=1 / 255)


def test_pairs_that_cannot_be_used(tmp_path):
    hq, _ = save(tmp_path / "hq" / "a.png", 40, 24), save(tmp_path / "lq" / "a.png", 10, 5)
    with pytest.raises(ConfigError, match=r"24x40 pixels and its partner 5x10; it must be 4 times as large"):
        validation_pairs([hq], tmp_path / "lq", 16, 4, 0)
    lonely = save(tmp_path / "hq" / "b.png", 40, 24)
    with pytest.raises(ConfigError, match="holds no picture named b"):
        validation_pairs([lonely], tmp_path / "lq", 16, 4, 0)
    small = save(tmp_path / "hq" / "c.png", 3, 40)
    with pytest.raises(ConfigError, match=r"c\.png is too small to be reduced 4 times"):
        validation_pairs([small], None, 16, 4, 0)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    return "one", torch.rand(1, 3, 4, 6, generator=generator), torch.rand(1, 3, 16, 24, generator=generator)


def test_what_is_measured_is_what_a_file_would_hold(pair):
    """Rounded to 256 levels, at the size of HQ; the mean over the photographs."""
    other = ("two", pair[1], pair[2] * 0.5)
    validation = Validation([pair, other], {"psnr_y": psnr_y})
    asked = []

    def upscale(lq, size):
        asked.append(size)
        return bicubic(lq, size) + 0.001

    means, results = validation.run(upscale)
    assert asked == [(16, 24)] * 2
    expected = eight_bit(bicubic(pair[1], (16, 24)) + 0.001)
    assert torch.equal(results[0], expected)
    assert means == {"psnr_y": pytest.approx((psnr_y(expected, pair[2]) + psnr_y(expected, other[2])) / 2)}
    json.dumps(means)


def test_the_pipeline_is_run_plainly(pair):
    """At HQ's size, without colour correction and without enlarging small pictures first."""
    seen = {}

    def pipeline(lq, **arguments):
        seen.update(arguments)
        return type("Output", (), {"images": bicubic(lq, (arguments["height"], arguments["width"]))})

    means, _ = Validation([pair], {"psnr_y": psnr_y}).with_pipeline(pipeline)
    assert seen == {"height": 16, "width": 24, "process_size": 0, "color_fix": "none", "output_type": "pt"}
    assert means == Validation([pair], {"psnr_y": psnr_y}).run(bicubic)[0]


def test_the_sheet_shows_lq_student_hq(pair, tmp_path):
    wide = ("two", torch.rand(1, 3, 4, 8), torch.rand(1, 3, 16, 32))
    results = [torch.full((1, 3, 16, 24), 0.25), torch.full((1, 3, 16, 32), 0.75)]
    validation = Validation([pair, wide], {})
    sheet = validation.sheet(results)
    assert sheet.shape == (3, 32, 96)
    lq, hq = pair[1][0], pair[2][0]
    assert torch.equal(sheet[:, :16, :24], lq.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2))
    assert (sheet[:, :16, 24:48] == 0.25).all() and torch.equal(sheet[:, :16, 48:72], hq)
    assert (sheet[:, :16, 72:] == 0).all() and (sheet[:, 16:, 32:64] == 0.75).all()
    assert torch.equal(sheet[:, 16:, 64:], wide[2][0])
    assert validation.sheet(results, rows=1).shape == (3, 16, 72)
    save_sheet(sheet, tmp_path / "new" / "sheet.png")
    back = torch.from_numpy(read(tmp_path / "new" / "sheet.png").rgb).permute(2, 0, 1)
    torch.testing.assert_close(back, sheet, rtol=0, atol=0.51 / 255)

"""Full-reference metrics: figures of independent implementations, closed forms, the published log."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tsdsr
from tsdsr.evaluation.metrics.fidelity import gmsd, haarpsi, ms_ssim, psnr, ssim
from tsdsr.evaluation.metrics.niqe import niqe
from tsdsr.imaging import read

ALL = (psnr, ssim, ms_ssim, gmsd, haarpsi)
REALSR = Path(tsdsr.__file__).resolve().parents[1] / "shared" / "data" / "eval" / "RealSR"
needs_realsr = pytest.mark.skipif(not REALSR.is_dir(), reason=f"no RealSR in {REALSR}: NOT compared with published log")


@pytest.mark.parametrize(
    ("metric", "colour", "grey"),
    [  # pyiqa 0.1.16 with color_space="ycbcr", piq 0.8.0 in float64
        (psnr, 25.7498951, 22.4184799),
        (ssim, 0.7762470, 0.7470467),
        (ms_ssim, 0.9639462, 0.9615018),
        (gmsd, 0.1332264, 0.1611613),
        (haarpsi, 0.7128018, 0.7057587),
    ],
)
def test_independent_implementations(metric, colour, grey, pair):
    assert metric(*pair(200, 301)) == pytest.approx(colour, abs=2e-6)
    assert metric(*pair(200, 301, grey=True)) == pytest.approx(grey, abs=2e-6)


@pytest.mark.parametrize("offset", [1, 10, 100])
def test_psnr_of_a_constant_offset(offset, from_levels):
    hr = np.full((5, 7, 1), 100.0)
    mse = (offset / 255 * 219 / 255) ** 2
    assert psnr(from_levels(hr + offset), from_levels(hr)) == pytest.approx(-10 * math.log10(mse + 1e-8), abs=1e-5)


def test_identical_pictures(pair):
    picture = pair(161, 170)[1]
    assert psnr(picture, picture) == pytest.approx(80)
    assert [metric(picture, picture) for metric in ALL[1:]] == pytest.approx([1, 1, 0, 1])


def test_two_black_pictures_are_identical():
    black = torch.zeros(1, 3, 161, 161)
    assert [metric(black, black) for metric in ALL] == pytest.approx([80, 1, 1, 0, 1])


def test_opposite_pictures_are_no_less_than_zero(pair):
    hr = pair(161, 161, grey=True)[1]
    assert 0 <= ssim(1 - hr, hr) < 0.1
    assert 0 <= ms_ssim(1 - hr, hr) < 0.1


@pytest.mark.parametrize("metric", ALL)
def test_pictures_that_do_not_fit_are_refused(metric, pair, one_sentence):
    sr, hr = pair(170, 180)
    with pytest.raises(ValueError) as error:
        metric(sr, hr[..., :-4])
    one_sentence(error.value, "180x170", "176x170")
    with pytest.raises(ValueError) as error:
        metric(torch.cat([sr, sr]), torch.cat([hr, hr]))
    one_sentence(error.value, "(2, 3, 170, 180)")
    with pytest.raises(ValueError) as error:
        metric(sr[:, :1], hr[:, :1])
    one_sentence(error.value, "(1, 1, 170, 180)")


@pytest.mark.parametrize(("metric", "least"), [(psnr, 1), (ssim, 11), (ms_ssim, 161), (gmsd, 2), (haarpsi, 16)])
def test_least_sizes(metric, least, pair, one_sentence):
    sr, hr = pair(least, least + 3)
    assert math.isfinite(metric(sr, hr))
    if least > 1:
        with pytest.raises(ValueError) as error:
            metric(sr[:, :, 1:], hr[:, :, 1:])
        one_sentence(error.value, f"{least + 3}x{least - 1}", f"{least}x{least}")


def published() -> list[dict[str, str]]:
    with (REALSR / "osediff_published_metrics.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def realsr(folder: str, name: str) -> torch.Tensor:
    return torch.from_numpy(read(REALSR / folder / f"{name}.webp").rgb).permute(2, 0, 1)[None]


@needs_realsr
def test_published_psnr_and_ssim():
    """OSEDiff's log of its results for all of RealSR, six digits a picture; in its paper 25.15 and 0.7341."""
    found = []
    for row in published():
        sr, hr = realsr("osediff_published", row["image"]), realsr("test_HR", row["image"])
        found.append((psnr(sr, hr), ssim(sr, hr)))
        assert found[-1] == pytest.approx((float(row["PSNR"]), float(row["SSIM"])), abs=5e-6), row["image"]
    assert len(found) == 100
    assert np.mean(found, 0).round(4).tolist() == [25.1511, 0.7341]


@needs_realsr
def test_published_niqe():
    """As above, without the ground truth. Four digits hold for 95 pictures of 100, the others are within 0.003."""
    for row in published()[::10]:
        assert niqe(realsr("osediff_published", row["image"])) == pytest.approx(float(row["NIQE"]), abs=2e-4)

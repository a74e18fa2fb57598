"""Flicker: closed forms."""

import math

import numpy as np
import pytest

from tsdsr.evaluation.metrics.flicker import Flicker


def measured(sources, results):
    flicker = Flicker()
    for source, result in zip(sources, results, strict=True):
        flicker.add(np.asarray(source, np.float32), np.asarray(result, np.float32))
    return flicker.values()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def picture(rng):
    return rng.uniform(20, 230, (40, 60))


def enlarged(picture):
    return picture.repeat(4, 0).repeat(4, 1)


def test_a_picture_that_stands_still_has_none(picture):
    values = measured([picture] * 4, [enlarged(picture)] * 4)
    assert values == {"flicker": 0.0, "source": 0.0, "ratio": None, "still": 1.0}


@pytest.mark.parametrize("sigma", [0.5, 2, 10])
def test_noise_on_the_result_adds_what_it_comes_to(rng, picture, sigma):
    large = enlarged(picture)
    values = measured([picture] * 6, [large + rng.normal(0, sigma, large.shape) for _ in range(6)])
    # |difference of two| is half-normal with the standard deviation sigma * sqrt(2).
    assert values["flicker"] == pytest.approx(2 * sigma / math.sqrt(math.pi), rel=0.01)
    assert values["source"] == 0 and values["ratio"] is None


def test_the_ratio_is_one_for_the_source_itself(rng, picture):
    sources = [picture + rng.normal(0, 1, picture.shape) for _ in range(6)]
    values = measured(sources, [enlarged(source) for source in sources])
    assert values["ratio"] == pytest.approx(1) and values["still"] == 1
    assert values["source"] == pytest.approx(2 / math.sqrt(math.pi), rel=0.03)
    # Twice as much change, and none.
    doubled = [enlarged(picture + 2 * (source - picture)) for source in sources]
    assert measured(sources, doubled)["ratio"] == pytest.approx(2)
    assert measured(sources, [enlarged(picture)] * 6)["ratio"] == 0


def test_what_moves_is_left_out(rng, picture):
    # The left half is replaced in every frame, and nothing of what the result does there counts.
    sources, results = [], []
    for _ in range(5):
        source = picture.copy()
        source[:, :30] = rng.uniform(20, 230, (40, 30))
        sources.append(source)
        results.append(enlarged(source))
    values = measured(sources, results)
    assert values["flicker"] == 0 and values["source"] == 0
    assert 0.4 < values["still"] < 0.5
    for result in results:
        result[:, 160:] += rng.normal(0, 3, (160, 80))
    assert measured(sources, results)["flicker"] > 2


def test_a_step_counts_up_to_the_limit(picture):
    for step, still in ((3.9, 1.0), (4.1, 0.0)):
        values = measured([picture, picture + step], [enlarged(picture), enlarged(picture + step)])
        assert values["still"] == still
    assert values["flicker"] is None


def test_sizes_need_not_be_multiples(picture):
    # Nearest pixel, so any factor works; a change of one pixel of the source counts where that pixel lies.
    other = picture.copy()
    other[18:23, 28:33] += 3.5
    rows, columns = np.arange(101) * 40 // 101, np.arange(151) * 60 // 151
    values = measured([picture, other], [picture[np.ix_(rows, columns)], other[np.ix_(rows, columns)]])
    assert values["ratio"] == pytest.approx(1) and values["source"] > 0


def test_it_goes_on_from_a_state(rng, picture):
    sources = [picture + rng.normal(0, 1, picture.shape) for _ in range(6)]
    results = [enlarged(source) + rng.normal(0, 1, (160, 240)) for source in sources]
    first = Flicker()
    for source, result in zip(sources[:4], results[:4], strict=True):
        first.add(source, result)
    second = Flicker(first.state)
    for source, result in zip(sources[3:], results[3:], strict=True):
        second.add(source, result)
    assert second.values() == pytest.approx(measured(sources, results), rel=1e-6)


def test_frames_must_fit(picture):
    flicker = Flicker()
    with pytest.raises(ValueError, match="lumas"):
        flicker.add(picture, picture[:20])
    flicker.add(picture, picture)
    with pytest.raises(ValueError, match="change their size"):
        flicker.add(picture[:20], picture[:20])


def test_without_two_frames_nothing_is_said(picture):
    assert set(Flicker().values().values()) == {None}
    assert set(measured([picture], [picture]).values()) == {None}

"""The metrics by name."""

import json

import pytest

from tsdsr.evaluation.metrics import METRICS, artefacts, fidelity
from tsdsr.evaluation.metrics.niqe import niqe


def test_names_and_order():
    assert list(METRICS) == [
        *("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "niqe"),
        *("edge_energy", "noise_floor", "grid_score", "seam_score"),
    ]
    assert all(name == metric.name for name, metric in METRICS.items())
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_each_measures(name, pair):
    metric = METRICS[name]
    sr, hr = pair(170, 180)
    value = metric.measure(sr, hr)
    assert type(value) is float
    json.dumps(value, allow_nan=False)
    if metric.kind == "no-reference":
        assert metric.measure(sr, None) == value
    else:
        assert metric.measure(sr, sr) == {"higher": max, "lower": min, "one": lambda a, b: 1}[metric.better](
            metric.measure(sr, sr), value
        )
    assert metric.about.endswith(".")


def test_each_measures_what_it_is_called(pair):
    sr, hr = pair(170, 180)
    for name in ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi"):
        assert METRICS[name].measure is getattr(fidelity, name)
    assert METRICS["edge_energy"].measure is artefacts.edge_energy_ratio
    for name in ("noise_floor", "grid_score", "seam_score"):
        assert METRICS[name].measure(sr, hr) == getattr(artefacts, name)(sr)
    assert METRICS["niqe"].measure(sr, hr) == niqe(sr)

"""NIQE: figures of pyiqa on pictures whose rounding has no ties, and where it is not defined."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tsdsr
from tsdsr.evaluation.metrics.niqe import _rounded_luma, niqe


def test_independent_implementation(pair):
    """pyiqa 0.1.16. Grey colours are whole levels, so that nothing hangs on how halves are rounded."""
    sr, hr = pair(200, 301, grey=True)
    assert niqe(sr) == pytest.approx(24.5936401, abs=2e-5)
    assert niqe(hr) == pytest.approx(34.2753107, abs=2e-5)
    assert niqe(pair(96, 96, grey=True)[0]) == pytest.approx(
        55.3202300, abs=2e-5
    )  # one block: no covariance of its own


def test_flat_parts(pair):
    """Blocks that are flat, black and half flat; pyiqa 0.1.16."""
    sr = pair(200, 301, grey=True)[0].clone()
    sr[..., :110] = 200 / 255
    sr[:, :, :105, 100:] = 0
    assert niqe(sr) == pytest.approx(20.6822492, abs=2e-5)


def test_ties_of_the_luma_are_rounded_as_in_the_published_runs():
    """299 R + 587 G + 114 B = 1000 n + 500: by the last bit n or n + 1; other colours go to the nearest."""
    levels = torch.cartesian_prod(*[torch.arange(0, 256, 5)] * 3)
    exact = levels @ torch.tensor([299, 587, 114])
    rounded = _rounded_luma((levels.float() / 255).T[None, :, :, None])[0, 0, :, 0]
    tie = exact % 1000 == 500
    assert torch.equal(rounded[~tie], ((exact[~tie] + 500) // 1000).double())
    up = rounded[tie] - exact[tie] // 1000
    assert (int(up.sum()), len(up)) == (564, 712)


def test_what_is_left_of_whole_blocks_does_not_count(pair):
    sr = pair(200, 301)[0]
    assert niqe(sr) == niqe(sr[..., :192, :288])
    assert niqe(sr) != niqe(sr[..., :192, 1:289])


def test_blur_and_noise_are_less_natural(pair):
    sr = pair(192, 192)[0]
    noise = torch.randn(sr.shape, generator=torch.Generator().manual_seed(0))
    assert niqe((sr + noise).clamp(0, 1)) > niqe(sr)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_pictures_are_refused(value, one_sentence):
    with pytest.raises(ValueError) as error:
        niqe(torch.full((1, 3, 192, 192), value))
    one_sentence(error.value, "flat")


def test_small_pictures_are_refused(pair, one_sentence):
    with pytest.raises(ValueError) as error:
        niqe(pair(300, 95)[0])
    one_sentence(error.value, "95x300", "96x96")


def test_parameters_carry_their_notice():
    path = Path(tsdsr.__file__).parent / "evaluation" / "metrics" / "niqe_parameters.safetensors"
    with safe_open(path, "pt") as file:
        assert "niqe_release" in file.metadata()["source"]
        assert "University of Texas at Austin" in file.metadata()["notice"]

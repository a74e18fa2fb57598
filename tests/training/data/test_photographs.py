"""Photographs: split by photograph, never by crop."""

import numpy as np
import pytest
import torch

from tsdsr.imaging import Picture, write
from tsdsr.training.data import load_uint8, photograph_of, split_photographs


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for photograph in range(6):
        for crop in range(1 + photograph % 3):
            pixels = generator.random((40, 48, 3), dtype=np.float32)
            write(Picture(pixels), tmp_path / f"tr_{photograph:04d}_{crop:02d}.png")
    return tmp_path


def test_no_photograph_is_on_both_sides(folder):
    train, held = split_photographs(folder, 2)
    assert len(held) == 2 and train
    assert not {photograph_of(path) for path in train} & {photograph_of(path) for path in held}
    assert split_photographs(folder, 2) == (train, held)


def test_too_few_photographs(folder):
    with pytest.raises(ValueError, match="holds 6 photographs; more than 6 are needed"):
        split_photographs(folder, 6)


def test_pixels_as_they_are_in_the_file(folder):
    image = load_uint8(sorted(folder.iterdir())[0])
    assert image.shape == (3, 40, 48) and image.dtype == torch.uint8

"""Photographs: split by photograph, batches that depend on seed and step alone."""

import numpy as np
import pytest
import torch

from tsdsr.imaging import Picture, write
from tsdsr.training.data import DegradedBatches, load_uint8, photograph_of, split_photographs


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


def test_batches(folder):
    images = [load_uint8(path) for path in sorted(folder.iterdir())]
    assert images[0].shape == (3, 40, 48) and images[0].dtype == torch.uint8
    batches = DegradedBatches(images, {16: (0.5, 3), 32: (0.5, 2)}, steps=20, seed=1)
    seen = {(batch["hq"].shape, batch["lq"].shape) for batch in (batches[i] for i in range(len(batches)))}
    assert seen == {((3, 3, 16, 16), (3, 3, 4, 4)), ((2, 3, 32, 32), (2, 3, 8, 8))}
    again = DegradedBatches(images, {16: (0.5, 3), 32: (0.5, 2)}, steps=20, seed=1)
    assert torch.equal(batches[7]["lq"], again[7]["lq"]) and torch.equal(batches[7]["hq"], again[7]["hq"])
    assert not torch.equal(batches[7]["lq"][:1, :, :4, :4], batches[8]["lq"][:1, :, :4, :4])

"""What to try where memory runs out."""

import pytest
import torch

from tsdsr.pipelines.memory import (
    SMALLEST_TILE,
    Tiles,
    fitting_vae_tile,
    is_out_of_memory,
    smaller_tiles,
    vae_bytes_per_pixel,
)


def test_ladder_goes_from_batch_to_tiles_to_nothing():
    tiles, steps = Tiles(512, 64, 4, 2048), []
    while (smaller := smaller_tiles(tiles, 3000)) is not None:
        tiles = smaller
        steps.append((tiles.tile_batch_size, tiles.vae_tile_size, tiles.tile_size))
        assert 0 <= tiles.tile_overlap <= min(tiles.tile_size, tiles.vae_tile_size) - 16
    assert steps == [(2, 2048, 512), (1, 2048, 512), (1, 1024, 512), (1, 512, 512), (1, 256, 256)]


def test_ladder_skips_tiles_that_are_larger_than_the_picture():
    first = smaller_tiles(Tiles(512, 64, 1, 8192), 700)
    assert first is not None and first.vae_tile_size == 320
    assert smaller_tiles(Tiles(512, 64, 1, 8192), SMALLEST_TILE) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_allocator_says_it_that_way():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_vae_tile_that_fits():
    each = vae_bytes_per_pixel(128, 2)  # SD3's in half precision
    assert each == 2048
    assert fitting_vae_tile(2048, 24e9, each) == 2048
    side = fitting_vae_tile(2048, 5e9, each)
    assert side**2 * each <= 5e9 < (side + 256) ** 2 * each
    assert fitting_vae_tile(2048, 0, each) == SMALLEST_TILE

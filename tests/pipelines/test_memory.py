"""What to try where memory runs out."""

import psutil
import pytest
import torch

from tsdsr.pipelines.memory import (
    SMALLEST_STRIP,
    SMALLEST_TILE,
    USABLE,
    Tiles,
    _control_group_room,
    fitting_side,
    free_memory,
    is_out_of_memory,
    smaller_tiles,
    strips_of,
    vae_bytes_per_pixel,
)


def test_ladder_goes_from_batch_to_tiles_to_nothing():
    tiles, steps = Tiles(512, 64, 4, 2048), []
    while (smaller := smaller_tiles(tiles, 3000)) is not None:
        tiles = smaller
        steps.append((tiles.tile_batch_size, tiles.vae_tile_size, tiles.tile_size))
        assert 0 <= tiles.tile_overlap <= tiles.tile_size - 16
    assert steps == [(2, 2048, 512), (1, 2048, 512), (1, 1024, 512), (1, 512, 512), (1, 256, 512), (1, 256, 256)]


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


def test_side_that_fits():
    each = vae_bytes_per_pixel([128, 256, 512, 512], 2, local=False)  # SD3's in half precision
    assert each == 2048
    assert fitting_side(2048, 24e9, each) == 2048 == fitting_side(2048, None, each)
    side = fitting_side(2048, 5e9, each)
    assert side**2 * each <= USABLE * 5e9 < (side + 1) ** 2 * each
    assert fitting_side(2048, 0, each) == SMALLEST_STRIP


@pytest.mark.parametrize(("height", "width"), [(4096, 4096), (100, 100_000), (100_000, 16)])
def test_strips_have_few_pixels_and_whole_patches(height, width):
    strips = strips_of(height, width, 512, 16)
    rows = -(-height // strips)
    assert rows <= max(16, 512 * 512 // width)


def test_free_memory_is_what_the_system_has():
    free = free_memory("cpu")
    assert 2**26 < free <= psutil.virtual_memory().total
    assert free_memory("meta") is None


def test_a_container_has_less(tmp_path):
    assert _control_group_room(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 100\n")
    assert _control_group_room(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert _control_group_room(tmp_path) == 800

"""What a run needs in memory, and which smaller tiles to try where it was too much.

Pure functions of numbers; no torch, so that the command line can ask what an error means.
"""

from dataclasses import dataclass, replace

# Below this side, in pixels, tiles are mostly overlap and border.
SMALLEST_TILE = 256


@dataclass(frozen=True)
class Tiles:
    """The pipeline's arguments of the same names, in pixels of the result."""

    tile_size: int
    tile_overlap: int
    tile_batch_size: int
    vae_tile_size: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. CUDA has a class for it, the CPU's allocator and MPS have words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def smaller_tiles(tiles: Tiles, longest: int) -> Tiles | None:
    """The next thing to try where memory ran out, or None where nothing is left.

    First fewer tiles at once, then smaller ones: the VAE's down to the transformer's size, then both.

    Args:
        tiles: what was too much.
        longest: the longer side in pixels of what was worked on; larger tiles than that are no larger in effect.
    """
    if tiles.tile_batch_size > 1:
        return replace(tiles, tile_batch_size=tiles.tile_batch_size // 2)
    largest = min(tiles.vae_tile_size, longest)
    if largest <= SMALLEST_TILE:
        return None
    side = max(SMALLEST_TILE, largest // 2 // 64 * 64)
    return replace(
        tiles,
        vae_tile_size=side,
        tile_size=min(tiles.tile_size, side),
        # Both kinds of tile share the overlap.
        tile_overlap=min(tiles.tile_overlap, side // 4),
    )


def vae_bytes_per_pixel(first_width: int, itemsize: int) -> int:
    """Peak memory of a VAE, in bytes for each pixel of a tile.

    Decoding with SD3's (first width 128) was seen to take 3870 to 4040 bytes a pixel in float32, encoding 2600: eight
    full-resolution maps of the first width.
    """
    return 8 * first_width * itemsize


def fitting_vae_tile(preferred: int, free: float, bytes_per_pixel: int) -> int:
    """The side of the largest VAE tile, up to `preferred`, that fits into `free` bytes; never under the smallest."""
    side = preferred
    while side > SMALLEST_TILE and side**2 * bytes_per_pixel > free:
        side = max(SMALLEST_TILE, side - 256)
    return side

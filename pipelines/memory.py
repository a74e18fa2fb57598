"""What a run needs in memory, what is free, and what to try next where it was too much.

Pure functions of numbers; torch is imported where a device is asked, so that the command line can ask what an error
means.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Below this side, in pixels, tiles of the network are mostly overlap and border.
SMALLEST_TILE = 256
# Sides in pixels of the square with as many pixels as:
# a strip of a VAE whose layers are all local, so that its strips cost nothing;
STREAMED = 512
# the largest picture whose group norms and attention a VAE computes over all of it;
EXACT = 2048
# the smallest strip worth trying.
SMALLEST_STRIP = 256
# Of what is free, how much a run may plan to take: other programs, and the allocator's own losses.
USABLE = 0.7


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

    First fewer tiles at once, then smaller strips of the VAE, which change nothing in the result; last smaller tiles of
    the network, which see less of the picture around them.

    Args:
        tiles: what was too much.
        longest: the longer side in pixels of what was worked on; larger tiles than that are no larger in effect.
    """
    if tiles.tile_batch_size > 1:
        return replace(tiles, tile_batch_size=tiles.tile_batch_size // 2)
    strip = min(tiles.vae_tile_size, longest)
    if strip > SMALLEST_STRIP:
        return replace(tiles, vae_tile_size=_half(strip, SMALLEST_STRIP))
    tile = min(tiles.tile_size, longest)
    if tile > SMALLEST_TILE:
        side = _half(tile, SMALLEST_TILE)
        return replace(tiles, tile_size=side, tile_overlap=min(tiles.tile_overlap, side // 4))
    return None


def _half(side: int, smallest: int) -> int:
    return max(smallest, side // 2 // 64 * 64)


def vae_bytes_per_pixel(widths: list[int], itemsize: int, local: bool) -> int:
    """Peak memory of a VAE beside its weights, in bytes for each pixel it works on.

    With SD3's (first width 128) decoding was seen to take 3870 to 4040 bytes a pixel in float32, encoding 2600: eight
    full-resolution maps of the first width. One of local layers alone holds five maps: about 1000 bytes were seen at a
    width of 48.

    Args:
        widths: channels of the VAE's maps, the finest first.
        itemsize: bytes of a number.
        local: whether it has convolutions alone (AutoencoderTiny), or normalises over the whole map (AutoencoderKL).
    """
    return (5 if local else 8) * widths[0] * itemsize


def kept_bytes_per_pixel(widths: list[int], itemsize: int) -> int:
    """What a VAE with group norms keeps of the whole picture, on the CPU, while it works in strips: a residual block's
    input, twice as wide as the finest maps at first, and its inner map."""
    return 3 * widths[0] * itemsize


def strips_of(height: int, width: int, side: int, multiple: int) -> int:
    """In how many strips of `side` squared pixels at most, but of `multiple` rows at least, a picture is worked on."""
    rows = max(multiple, side * side // width // multiple * multiple)
    return math.ceil(height / rows)


def fitting_side(side: int, free: float | None, bytes_per_pixel: int) -> int:
    """The side of the largest square up to `side` whose pixels fit into what may be used of `free` bytes."""
    if free is None:
        return side
    return max(min(side, SMALLEST_STRIP), min(side, int(math.sqrt(USABLE * free / bytes_per_pixel))))


def free_memory(device: Any = "cpu") -> float | None:
    """Bytes that can be taken on a device now, with what torch holds and does not use; None where nobody knows.

    On the CPU what the system calls available, within the limit of the process's control group (containers).
    """
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        import psutil

        return min(psutil.virtual_memory().available, _control_group_room())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def _control_group_room(root: Path = Path("/sys/fs/cgroup")) -> float:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            # What is cached of files counts as used there and is given back when it is needed.
            stat = dict(line.split() for line in (root / used).with_name("memory.stat").read_text().splitlines())
            cached = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
            return int((root / limit).read_text()) - int((root / used).read_text()) + cached
        except (OSError, ValueError):
            continue
    return math.inf
